"""Pictures from every source, of every mode, and every way in which one can be bad."""

import base64
import http.server
import io
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image as hf_load_image

from minivlm.errors import InputError
from minivlm.processor import images
from minivlm.processor.images import load_image

RNG = np.random.default_rng(0)


def colours(height=9, width=7, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def same(image, expected):
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


PALETTE = Image.fromarray(colours()).convert("P", palette=Image.Palette.ADAPTIVE)
PALETTE_ALPHA = PALETTE.copy()
PALETTE_ALPHA.info["transparency"] = 3
GREY_ALPHA = Image.fromarray(colours(channels=1)[..., 0])
GREY_ALPHA.info["transparency"] = int(np.asarray(GREY_ALPHA)[0, 0])
MODES = {
    "RGB": Image.fromarray(colours()),
    "RGBA": Image.fromarray(colours(channels=4), "RGBA"),
    "LA": Image.fromarray(colours(channels=2), "LA"),
    "L": Image.fromarray(colours(channels=1)[..., 0]),
    "1": Image.fromarray(colours(channels=1)[..., 0]).convert("1"),
    "P": PALETTE,
    "P with a transparent colour": PALETTE_ALPHA,
    "L with a transparent grey": GREY_ALPHA,
    "CMYK": Image.fromarray(colours()).convert("CMYK"),
    "YCbCr": Image.fromarray(colours()).convert("YCbCr"),
    "HSV": Image.fromarray(colours()).convert("HSV"),
    "PA": Image.fromarray(colours()).convert("P").convert("PA"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_become_rgb_as_in_transformers(mode):
    """checklist 24: transparency is composited onto white, the rest is converted as Pillow does."""
    same(load_image(MODES[mode]), convert_to_rgb(MODES[mode], return_numpy=True))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P with a transparent colour", "1", "P", "CMYK"])
def test_files_of_these_modes_become_the_same_rgb(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    MODES[mode].save(path)
    with Image.open(path) as opened:
        same(load_image(path), convert_to_rgb(opened, return_numpy=True))


def test_transparent_becomes_white_and_half_transparent_is_mixed():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    assert np.asarray(load_image(image)).tolist() == [[[255, 255, 255], [127, 127, 127]]]


def test_tall_pictures_are_put_on_white_as_in_one_piece():
    image = Image.effect_noise((3, 2 * images.STRIP + 5), 90)
    image = Image.merge("RGBA", [image, image.rotate(180), image, Image.effect_noise(image.size, 90)])
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    same(load_image(image), Image.alpha_composite(white, image).convert("RGB"))


def test_sixteen_bits_keep_the_high_byte():
    """Pillow, and so transformers, would clip every sample above 255 to white."""
    samples = np.array([[0x0000, 0x00FF, 0x1234, 0xABCD, 0xFFFF]], np.uint16)
    grey = Image.fromarray(samples)
    assert grey.mode == "I;16"
    for image in (grey, encoded(grey, "PNG"), encoded(grey, "TIFF")):
        assert np.asarray(load_image(image))[0, :, 0].tolist() == [0x00, 0x00, 0x12, 0xAB, 0xFF]


def test_sixteen_bit_colour_keeps_the_high_byte():
    """What Pillow does with colour, and the reason for doing the same with grey."""
    pixel = b"".join(sample.to_bytes(2, "big") for sample in (0xABCD, 0x12FF, 0x00FF))
    data = encoded(Image.new("RGB", (1, 1)))
    header = (1).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    body = b"".join(
        len(part).to_bytes(4, "big") + kind + part + zlib.crc32(kind + part).to_bytes(4, "big")
        for kind, part in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + pixel)), (b"IEND", b""))
    )
    assert np.asarray(load_image(data[:8] + body)).tolist() == [[[0xAB, 0x12, 0x00]]]


def test_sixteen_bits_with_a_transparent_sample():
    samples = np.array([[0x0100, 0x0101, 0x8000]], np.uint16)
    image = load_image(encoded(Image.fromarray(samples), transparency=0x0101))
    assert np.asarray(image)[0, :, 0].tolist() == [0x01, 0xFF, 0x80]


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_defined_white_are_refused(mode):
    image = Image.new("LAB", (2, 2)) if mode == "LAB" else Image.new(mode, (2, 2), 7)
    with pytest.raises(InputError, match=f"mode {mode} is not supported, convert it to RGB"):
        load_image(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright_and_pil_images_are_not(orientation, tmp_path):
    """checklist 24: EXIF orientation belongs to the file; a PIL image is taken as it stands."""
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(colours(5, 3)).save(path, exif=exif)
    same(load_image(path), hf_load_image(str(path)))
    assert load_image(path).size == ((5, 3) if orientation >= 5 else (3, 5))
    with Image.open(path) as opened:
        same(load_image(opened), opened.convert("RGB"))


def test_every_source_gives_the_same_picture(tmp_path):
    image = Image.fromarray(colours())
    data = encoded(image)
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[i : i + 60] for i in range(0, len(text), 60))
    sources = [image, np.asarray(image), data, path, str(path)]
    sources += [f"data:image/png;base64,{text}", f"DATA:image/png;base64,{wrapped}"]
    sources += ["data:image/png," + "".join(f"%{byte:02x}" for byte in data)]
    for source in sources:
        same(load_image(source), image)


def test_a_preview_in_a_photograph_is_no_second_frame(tmp_path):
    photo, preview = Image.fromarray(colours(40, 30)), Image.fromarray(colours(20, 15))
    data = encoded(photo, "MPO", save_all=True, append_images=[preview])
    assert load_image(data).size == (30, 40)


def test_one_frame_of_a_gif_is_a_picture():
    assert load_image(encoded(PALETTE, "GIF")).size == PALETTE.size


def test_a_colour_profile_is_no_obstacle():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(colours())
    same(load_image(encoded(image, icc_profile=profile)), image)


def frames(form):
    first, *others = (Image.fromarray(colours()).convert("L") for _ in range(3))
    return encoded(first, form, save_all=True, append_images=others)


def png_claiming(width, height):
    """A PNG header that promises more pixels than there are."""
    data = bytearray(encoded(Image.new("L", (8, 8))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


PHOTO = encoded(Image.fromarray(colours(64, 64)), "JPEG")
PNG = encoded(Image.fromarray(colours(64, 64)))
BAD = {
    "an animated GIF": (frames("GIF"), "has 3 frames, expected one"),
    "a TIFF of three pages": (frames("TIFF"), "has 3 frames, expected one"),
    "an animated PNG": (frames("PNG"), "has 3 frames, expected one"),
    "a truncated JPEG": (PHOTO[: len(PHOTO) // 2], "damaged or truncated"),
    "a truncated PNG": (PNG[: len(PNG) // 2], "damaged or truncated"),
    "a text": (b"hello, this is no picture", "not a picture in a format that is read"),
    "nothing": (b"", "is empty"),
    "a decompression bomb": (png_claiming(20000, 20000), "decompression bomb"),
    "a small decompression bomb": (png_claiming(10000, 10000), "decompression bomb"),
    "no pixels": (Image.new("RGB", (0, 5)), "5x0 pixels"),
    "an array of floats": (np.zeros((3, 3, 3)), r"an array float64 \(3, 3, 3\), expected uint8"),
    "an array of channels first": (np.zeros((3, 5, 5), np.uint8), r"uint8 \(3, 5, 5\)"),
    "a number": (7, "a int, expected a path"),
    "a missing file": ("no/such/file.png", "no/such/file.png: no such file"),
    "a null byte": ("a\0b.png", "cannot be read"),
    "a data URI without data": ("data:image/png;base64", "without a comma"),
    "a data URI that is not base64": ("data:image/png;base64,@@@@", "not valid base64"),
    "a data URI that is no picture": ("data:text/plain,hello", "not a picture"),
    "a URL without a host": ("http://", "cannot be fetched"),
    "a URL whose host has no end": ("http://[::1", "cannot be fetched"),
    "a URL that nobody serves": ("http://127.0.0.1:9/a.png", "cannot be fetched"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_give_one_clear_line(name):
    source, message = BAD[name]
    with pytest.raises(InputError, match=message) as error:
        load_image(source)
    assert str(error.value).startswith("picture") and "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder, expected a file"):
        load_image(tmp_path)


def test_an_empty_path_is_refused():
    with pytest.raises(InputError, match="picture: an empty path, expected a file"):
        load_image("")


def test_a_line_of_pixels_is_legal():
    assert load_image(Image.new("L", (20000, 1))).size == (20000, 1)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "JPEG2000", "AVIF"])
def test_no_damage_raises_anything_else(form):
    """Cut anywhere or with bytes changed, a file is either still a picture or refused in one line."""
    data = encoded(Image.fromarray(colours(24, 24)), form)
    rng = np.random.default_rng(1)
    for _ in range(150):
        bad = bytearray(data[: rng.integers(1, len(data) + 1)])
        for at in rng.integers(0, len(bad), rng.integers(0, 4)):
            bad[at] = rng.integers(0, 256)
        try:
            assert load_image(bytes(bad)).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing.png":
            return self.send_error(404)
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            return self.end_headers()
        body = {"/a.png": PNG, "/long": b"x" * 5000, "/text": b"hello"}[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (10 if self.path == "/short" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls(server):
    same(load_image(f"{server}/a.png"), Image.open(io.BytesIO(PNG)))
    same(load_image(f"{server}/moved.png"), Image.open(io.BytesIO(PNG)))
    with pytest.raises(InputError, match="the server answered 404"):
        load_image(f"{server}/missing.png")
    with pytest.raises(InputError, match="/text: not a picture"):
        load_image(f"{server}/text")


def test_urls_are_bounded_in_size_and_time(server, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 4000)
    with pytest.raises(InputError, match="larger than"):
        load_image(f"{server}/long")
    monkeypatch.setattr(images, "URL_DEADLINE", -1.0)
    with pytest.raises(InputError, match="not received within"):
        load_image(f"{server}/text")


def test_long_names_are_shortened():
    with pytest.raises(InputError) as error:
        load_image("data:image/png;base64," + "A" * 10000)
    assert "(10022 characters)" in str(error.value) and len(str(error.value)) < 250
    with pytest.raises(InputError) as error:
        load_image(Path("a\nb.png"))
    assert "\n" not in str(error.value)


def test_a_file_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    with pytest.raises(InputError, match="picture /dev/zero: larger than 1 MiB"):
        images.load_image("/dev/zero")
