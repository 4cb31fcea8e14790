"""From an RGB picture to normalised tiles [N, 3, T, T], bit for bit as Hugging Face's PIL image processors.

`LlavaNextImageProcessorPil` (any resolution), `LlavaImageProcessorPil` and `CLIPImageProcessorPil` (one tile)
of transformers 5; their torchvision twins differ by up to two grey levels. It knows nothing of files, text or
the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.fields import Fields
from minivlm.processor.anyres import Size, check_pinpoints, fitted_size, margins, select_best_resolution

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
CLASSES = ("LlavaNextImageProcessor", "LlavaImageProcessor", "CLIPImageProcessor")
# Keys of the file that change no pixel of a single picture.
BOOKKEEPING = {
    *("processor_class", "_processor_class", "_valid_processor_keys", "auto_map", "aspect_ratio_setting"),
    *("data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "image_seq_length"),
}
# Of an intermediate picture: 1x20000 resized to a shorter side of 336 would have 2.3 * 10**9 pixels.
MAX_PIXELS = 2**26


@dataclass(frozen=True)
class ImageConfig:
    """What preprocessor_config.json says. Sizes in pixels.

    tile: side T of a tile; resize: (height, width) to squash to, or the new length of the shorter side;
    image_grid_pinpoints: the canvases (height, width) of LLaVA-NeXT, or None for one tile a picture;
    pad_to_square: first pad with the mean colour, as the original LLaVA-1.5 does and `llava-hf` does not;
    resample: Pillow's number, 3 is bicubic.
    """

    tile: int
    image_grid_pinpoints: tuple[Size, ...] | None
    resize: int | Size
    pad_to_square: bool = False
    resample: int = 3
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = OPENAI_CLIP_MEAN
    image_std: tuple[float, ...] = OPENAI_CLIP_STD

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str, anyres: bool) -> "ImageConfig":
        """From a preprocessor_config.json, or the `image_processor` of a processor_config.json.

        anyres: whether LlavaNextImageProcessor or CLIPImageProcessor reads a file that names no class. Absent
        and null keys take that class's defaults; what is not implemented raises InputError by name and value.
        """
        f = Fields({key: value for key, value in values.items() if value is not None}, where)
        f.read |= BOOKKEEPING
        kind = _class_name(f, CLASSES[0] if anyres else CLASSES[2])
        f.only("do_resize", True)
        f.only("do_convert_rgb", True)
        resize = _resize(f)
        tile = _tile(f, resize)
        if kind == CLASSES[0] and resize not in (tile, (tile, tile)):
            raise InputError(f"{where}: size = {f.values.get('size')!r}, expected the tile size {tile}")
        do_pad = f.get("do_pad", bool, False)  # of the other classes it pads a batch, not a picture
        config = cls(
            tile=tile,
            image_grid_pinpoints=_pinpoints(f, tile) if kind == CLASSES[0] else None,
            resize=resize,
            pad_to_square=do_pad and kind == CLASSES[1],
            resample=f.get("resample", int, 3),
            do_rescale=f.get("do_rescale", bool, True),
            rescale_factor=f.get("rescale_factor", float, 1 / 255),
            do_normalize=f.get("do_normalize", bool, True),
            image_mean=_channels(f, "image_mean", OPENAI_CLIP_MEAN),
            image_std=_channels(f, "image_std", OPENAI_CLIP_STD),
        )
        f.finish()
        if config.resample not in list(Image.Resampling):
            raise InputError(f"{where}: resample = {config.resample}, expected one of Pillow's 0 to 5")
        return config

    def to_hf(self) -> dict[str, Any]:
        """The preprocessor_config.json that `from_hf` reads back, complete, so that no default matters."""
        anyres, resize = self.image_grid_pinpoints is not None, self.resize
        whole = isinstance(resize, int)
        size = {"shortest_edge": resize} if whole else {"height": resize[0], "width": resize[1]}
        values: dict[str, Any] = {
            "image_processor_type": CLASSES[0] if anyres else CLASSES[1],
            "do_convert_rgb": True,
            "do_pad": True if anyres else self.pad_to_square,
            "do_resize": True,
            "size": size,
            "do_center_crop": True,
            "crop_size": {"height": self.tile, "width": self.tile},
            "resample": self.resample,
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        if self.image_grid_pinpoints is not None:
            values["image_grid_pinpoints"] = [list(canvas) for canvas in self.image_grid_pinpoints]
        return values


def preprocess(image: Image.Image, config: ImageConfig) -> Tensor:
    """Normalised tiles [N, 3, T, T] float32 of an RGB picture; with pinpoints the base tile comes first."""
    if image.mode != "RGB":
        raise InputError(f"preprocess: a picture of mode {image.mode}, expected RGB (load_image gives it)")
    pixels = _one_tile(image, config) if config.image_grid_pinpoints is None else _anyres_tiles(image, config)
    # A sample has 256 values, so the arithmetic is done once for each; order and casts are transformers'.
    table = np.arange(256, dtype=np.float64)[:, None].repeat(3, axis=1)  # [256, 3]
    table = (table * config.rescale_factor if config.do_rescale else table).astype(np.float32)
    if config.do_normalize:
        table = (table - np.array(config.image_mean, np.float32)) / np.array(config.image_std, np.float32)
    tiles = np.empty((len(pixels), 3, config.tile, config.tile), np.float32)
    for channel in range(3):
        tiles[:, channel] = table[pixels[..., channel], channel]
    return torch.from_numpy(tiles)


def _anyres_tiles(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """[N, T, T, 3] uint8: the whole picture squashed to one tile, then the tiles of the canvas row by row."""
    size, tile = (image.height, image.width), config.tile
    canvas = select_best_resolution(size, config.image_grid_pinpoints)
    fitted = fitted_size(size, canvas)
    top, _, left, _ = margins(fitted, canvas)
    padded = Image.new("RGB", (canvas[1], canvas[0]))  # black, before normalisation
    padded.paste(_resized(image, fitted, config), (left, top))
    tiles = rearrange(np.asarray(padded), "(rows h) (columns w) c -> (rows columns) h w c", h=tile, w=tile)
    base = np.asarray(_resized(image, (tile, tile), config))  # [T, T, 3]
    return np.concatenate([base[None], tiles])


def _one_tile(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """[1, T, T, 3] uint8: the picture resized, and its centre cut out."""
    if config.pad_to_square:
        image = _squared(image, config)
    if isinstance(config.resize, tuple):
        height, width = config.resize
    elif image.width <= image.height:
        height, width = int(config.resize * image.height / image.width), config.resize
    else:
        height, width = config.resize, int(config.resize * image.width / image.height)
    tile = config.tile
    top, left = (height - tile) // 2, (width - tile) // 2
    if height * width <= MAX_PIXELS:
        image = _resized(image, (height, width), config).crop((left, top, left + tile, top + tile))
    else:  # only the centre is computed; Pillow's box is float32, so a pixel may round differently
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + tile) * across, (top + tile) * down)
        image = image.resize((tile, tile), config.resample, box=box)
    return np.asarray(image)[None]


def _resized(image: Image.Image, size: Size, config: ImageConfig) -> Image.Image:
    return image.resize((size[1], size[0]), config.resample)


def _squared(image: Image.Image, config: ImageConfig) -> Image.Image:
    side = max(image.size)
    if side * side > MAX_PIXELS:
        raise InputError(f"a picture of {image.height}x{image.width} is too long to be padded to a square")
    colour = tuple(int(mean * 255) for mean in config.image_mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _class_name(f: Fields, default: str) -> str:
    name = f.get("image_processor_type", str, f.get("feature_extractor_type", str, default))
    plain = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if plain not in CLASSES:
        raise InputError(f"{f.where}: image_processor_type = {name!r} is not supported, only {', '.join(CLASSES)}")
    return plain


def _resize(f: Fields) -> int | Size:
    """`size`: 336, [336, 336], {"shortest_edge": 336} or {"height": 336, "width": 336}."""
    f.read |= {"size", "default_to_square"}
    value = f.values.get("size", {"shortest_edge": 224})
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"} and _is_side(value["shortest_edge"]):
        return value["shortest_edge"]
    if _is_side(value):  # of these classes a bare number is the shorter side, unless the file says otherwise
        return (value, value) if f.get("default_to_square", bool, False) else value
    return _height_width(f, "size", value)


def _tile(f: Fields, resize: int | Size) -> int:
    """The side of a tile: `crop_size`, or `size` where nothing is cropped."""
    f.read.add("crop_size")
    crop = f.values.get("crop_size", 224)
    if not f.get("do_center_crop", bool, True):
        if isinstance(resize, int):  # the length of the longer side would depend on the picture
            raise InputError(f"{f.where}: do_center_crop = False is not supported, unless size is a square")
        crop = resize
    height, width = (crop, crop) if _is_side(crop) else _height_width(f, "crop_size", crop)
    if height != width:
        raise InputError(f"{f.where}: crop_size = {crop!r} is not supported, only a square")
    if height > (resize if isinstance(resize, int) else min(resize)):
        raise InputError(f"{f.where}: crop_size = {crop!r} is larger than size = {f.values.get('size')!r}")
    return height


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _height_width(f: Fields, key: str, value: Any) -> Size:
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        value = (value["height"], value["width"])
    if isinstance(value, list | tuple) and len(value) == 2 and all(_is_side(side) for side in value):
        return value[0], value[1]
    raise InputError(f"{f.where}: {key} = {value!r} is not supported, expected pixels or height and width")


def _pinpoints(f: Fields, tile: int) -> tuple[Size, ...]:
    value = f.get("image_grid_pinpoints", list, list(LLAVA_NEXT_PINPOINTS))
    pinpoints = tuple(_height_width(f, "image_grid_pinpoints", canvas) for canvas in value)
    check_pinpoints(pinpoints, tile)
    return pinpoints


def _channels(f: Fields, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    f.read.add(key)
    value = f.values.get(key, default)
    numbers = value if isinstance(value, list | tuple) else (value,) * 3
    if len(numbers) != 3 or not all(isinstance(number, int | float) for number in numbers):
        raise InputError(f"{f.where}: {key} = {value!r}, expected three numbers")
    if key == "image_std" and 0 in numbers:
        raise InputError(f"{f.where}: image_std = {value!r}, expected no 0: it divides")
    return tuple(float(number) for number in numbers)
