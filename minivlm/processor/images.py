"""Opens pictures: from a path, URL, `data:` URI, bytes, array or PIL image to RGB.

It knows nothing of tiles, text or the model. What a picture is:
- A file (path, bytes, URI, URL) is shown as a viewer shows it: its EXIF orientation is applied.
  A PIL image or an array is pixels already and is taken as it stands, also its current frame.
- Transparency is composited onto white, as transformers 5 does.
- 16-bit samples keep their high byte, as Pillow itself reads 16-bit colour: 0xABCD becomes 0xAB.
- Several frames (an animation, a multi-page TIFF) are refused: choosing one would be a guess.
  The exception is MPO, a photograph followed by its previews.
"""

import base64
import binascii
import http.client
import io
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from minivlm.errors import InputError

URL_TIMEOUT = 20.0  # seconds without a byte
URL_DEADLINE = 120.0  # seconds in all
MAX_BYTES = 64 * 2**20
# What Pillow may open: pictures that cameras and programs write, nothing that runs a program (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF")
STRIP = 256  # rows
RGB_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
ALPHA_MODES = ("LA", "PA", "RGBA")
# What Pillow's decoders raise on damaged files; UnidentifiedImageError is an OSError.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)

ImageSource = Image.Image | np.ndarray | str | Path | bytes


def load_image(source: ImageSource) -> Image.Image:
    """An RGB picture from a path, `data:` URI, http(s) URL, a file's bytes, a PIL image or uint8 [H, W, 3].

    Raises InputError, naming the source, for whatever cannot be shown whole: missing, truncated, animated,
    empty, too large (Pillow's limit against decompression bombs), or of samples without a defined range.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, f"a PIL image of mode {source.mode}")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise InputError(f"picture: an array {source.dtype} {source.shape}, expected uint8 [height, width, 3]")
        return _to_rgb(Image.fromarray(source), f"an array {source.shape}")
    if isinstance(source, bytes):
        return _decode(source, f"{len(source)} bytes")
    if not isinstance(source, str | Path):
        raise InputError(f"picture: a {type(source).__name__}, expected a path, URL, data: URI, bytes or PIL image")
    name = _shorten(str(source))
    scheme = source[:8].lower() if isinstance(source, str) else ""
    if scheme.startswith("data:"):
        return _decode(_read_data_uri(source, name), name)
    if scheme.startswith(("http://", "https://")):
        return _decode(_read_url(source, name), name)
    return _decode(_read_file(Path(source), name), name)


def _shorten(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= 100 else f"{name[:80]}... ({len(name)} characters)"


def _read_file(path: Path, name: str) -> bytes:
    if not name:
        raise InputError("picture: an empty path, expected a file")
    if path.is_dir():
        raise InputError(f"picture {name}: is a folder, expected a file")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"picture {name}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"picture {name}: cannot be read ({_reason(error)})") from None
    if len(data) > MAX_BYTES:  # also what has no end, such as /dev/zero
        raise InputError(f"picture {name}: larger than {MAX_BYTES // 2**20} MiB")
    return data


def _read_data_uri(uri: str, name: str) -> bytes:
    header, comma, data = uri.partition(",")
    if not comma:
        raise InputError(f"picture {name}: a data: URI without a comma")
    raw = urllib.parse.unquote_to_bytes(data)
    if not header.endswith(";base64"):
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error as error:
        raise InputError(f"picture {name}: not valid base64 ({error})") from None


def _read_url(url: str, name: str) -> bytes:
    deadline = time.monotonic() + URL_DEADLINE
    parts, size = [], 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "minivlm"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            while part := response.read1(2**16):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise InputError(f"picture {name}: larger than {MAX_BYTES // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise InputError(f"picture {name}: not received within {URL_DEADLINE:.0f} s")
    except InputError:
        raise
    except urllib.error.HTTPError as error:
        raise InputError(f"picture {name}: the server answered {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"picture {name}: cannot be fetched ({_reason(error)})") from None
    return b"".join(parts)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise InputError(f"picture {name}: is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on harmless damage
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if hasattr(image, "n_frames") and image.n_frames > 1 and image.format != "MPO":
                raise InputError(f"picture {name}: has {image.n_frames} frames, expected one")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(
            f"picture {name}: more than {Image.MAX_IMAGE_PIXELS} pixels, refused as a decompression bomb"
        ) from None
    except Image.UnidentifiedImageError:
        raise InputError(f"picture {name}: not a picture in a format that is read ({', '.join(FORMATS)})") from None
    except DAMAGED as error:
        raise InputError(f"picture {name}: damaged or truncated ({_reason(error)})") from None
    return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB, transparency on white; transformers' convert_to_rgb for the modes that have 8 bits a sample."""
    if image.width < 1 or image.height < 1:
        raise InputError(f"picture {name}: {image.height}x{image.width} pixels (height x width), expected at least 1x1")
    try:
        image.load()  # a PIL image may not have been read yet
        if image.mode.startswith("I;16"):
            return _grey_16_to_rgb(image)
        keyed = image.mode in RGB_MODES and image.info.get("transparency") is not None
        if image.mode in ALPHA_MODES or keyed:
            return _on_white(image)
        if image.mode in RGB_MODES:
            return image.convert("RGB")
    except DAMAGED as error:
        raise InputError(f"picture {name}: damaged or truncated ({_reason(error)})") from None
    # "I" and "F" samples have no defined white; the premultiplied modes and LAB are nobody's file format.
    raise InputError(f"picture {name}: mode {image.mode} is not supported, convert it to RGB first")


def _on_white(image: Image.Image) -> Image.Image:
    """Strip by strip: as a whole it would take the picture's memory three times more."""
    shown = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        shown.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return shown


def _grey_16_to_rgb(image: Image.Image) -> Image.Image:
    # transformers converts through Pillow, which clips: every sample above 255 turns white.
    samples = np.array(image).astype(np.uint16)  # [H, W], in this machine's byte order
    grey = (samples >> 8).astype(np.uint8)
    if image.info.get("transparency") is not None:  # PNG: this one sample value is fully transparent
        grey[samples == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")
