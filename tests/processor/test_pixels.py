"""Tiles against transformers' PIL image processors, bit for bit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaNextImageProcessorPil

from minivlm.errors import InputError
from minivlm.processor.pixels import ImageConfig, preprocess

SIZES = [
    *[(1, 1), (1, 50), (50, 1), (2, 3), (37, 900), (900, 37), (336, 336), (335, 337), (673, 671)],
    *[(640, 480), (333, 1000), (500, 300), (3, 20000), (1, 20000), (20000, 1)],
]


def picture(size, seed=0):
    rng = np.random.default_rng([seed, *size])
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def as_saved(processor):
    """What the processor writes to a folder, which is what a checkpoint has."""
    return json.loads(processor.to_json_string())


def assert_equal(processor, image, anyres):
    config = ImageConfig.from_hf(as_saved(processor), "test", anyres)
    theirs = processor(image, return_tensors="pt").pixel_values
    ours = preprocess(image, config)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs[0] if anyres else theirs)


@pytest.mark.parametrize("size", SIZES)
def test_anyres_tiles_equal_transformers(size):
    assert_equal(LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=336), picture(size), True)


@pytest.mark.parametrize("size", [(480, 640), (100, 41), (17, 23)])
@pytest.mark.parametrize("resample", [0, 2, 3])
def test_anyres_tiles_of_another_geometry_equal_transformers(size, resample):
    processor = LlavaNextImageProcessorPil(
        size={"height": 32, "width": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32], [96, 96]],
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.1, 0.2, 0.3],
        resample=resample,
    )
    assert_equal(processor, picture(size), True)


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) / min(size) < 500])
@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, LlavaImageProcessorPil])
def test_single_tile_equals_transformers(size, kind):
    assert_equal(kind(size={"shortest_edge": 336}, crop_size=336), picture(size), False)


@pytest.mark.parametrize("size", [(37, 90), (90, 37), (50, 51), (64, 64), (1, 60)])
@pytest.mark.parametrize(
    "options",
    [
        {"size": 48, "crop_size": 48, "do_pad": True},
        {"size": 50, "crop_size": 33},
        {"size": {"height": 40, "width": 60}, "crop_size": 40},
        {"size": {"height": 40, "width": 40}, "do_center_crop": False},
        {"size": 48, "crop_size": 48, "do_rescale": False},
        {"size": 48, "crop_size": 48, "do_normalize": False},
        {"size": 48, "crop_size": 48, "rescale_factor": 1 / 127.5, "image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_single_tile_options_equal_transformers(size, options):
    assert_equal(LlavaImageProcessorPil(**options), picture(size), False)


def test_a_line_of_pixels_is_no_memory_bomb():
    """Resized to a shorter side of 336 it would have 2.3 * 10**9 pixels; only the centre is computed."""
    column = picture((20000, 1))
    tile = preprocess(column, ImageConfig(tile=336, image_grid_pinpoints=None, resize=336))
    centre = column.crop((0, 9990, 1, 10010)).resize((336, 336 * 20), Image.Resampling.BICUBIC)
    expected = preprocess(centre.crop((0, 336 * 9 + 168, 336, 336 * 10 + 168)), ImageConfig(336, None, 336))
    assert (tile - expected).abs().max() <= 1.01 / 255 / 0.26  # Pillow's float32 box: one grey level


def test_absent_keys_take_the_class_defaults():
    image = picture((100, 150))
    assert torch.equal(
        preprocess(image, ImageConfig.from_hf({}, "test", False)),
        CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values,
    )
    config = ImageConfig.from_hf({"size": {"shortest_edge": 336}, "crop_size": 336}, "test", True)
    assert config.image_grid_pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert config.resample == 3 and config.image_mean[0] == 0.48145466


@pytest.mark.parametrize("size", [336, [336, 336], {"shortest_edge": 336}, {"height": 336, "width": 336}])
@pytest.mark.parametrize("crop", [336, [336, 336], {"height": 336, "width": 336}])
def test_spellings_of_size(size, crop):
    config = ImageConfig.from_hf({"size": size, "crop_size": crop}, "test", True)
    assert config.tile == 336


@pytest.mark.parametrize("name", ["CLIPFeatureExtractor", "CLIPImageProcessorFast", "LlavaImageProcessorPil"])
def test_spellings_of_the_class(name):
    key = "feature_extractor_type" if "Extractor" in name else "image_processor_type"
    config = ImageConfig.from_hf({key: name, "size": 336, "crop_size": 336}, "test", True)
    assert config.image_grid_pinpoints is None


@pytest.mark.parametrize(
    "values, message",
    [
        ({"do_resize": False}, "do_resize = False"),
        ({"do_convert_rgb": False}, "do_convert_rgb = False"),
        ({"do_center_crop": False}, "do_center_crop = False"),
        ({"do_flip": True}, "do_flip = True"),
        ({"size": {"longest_edge": 336}}, "size = {'longest_edge': 336}"),
        ({"size": "large"}, "size = 'large'"),
        ({"crop_size": 336}, "crop_size = 336 is larger than"),
        ({"crop_size": {"height": 200, "width": 100}}, "crop_size = .* only a square"),
        ({"resample": 9}, "resample = 9"),
        ({"rescale_factor": "1/255"}, "rescale_factor = '1/255'"),
        ({"image_mean": [0.5, 0.5]}, "image_mean = .* three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std = .* divides"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type = 'SiglipImageProcessor'"),
        ({"image_grid_pinpoints": [[224, 448]]}, "image_grid_pinpoints = "),
    ],
)
def test_what_is_not_implemented_is_refused_by_name_and_value(values, message):
    with pytest.raises(InputError, match=message) as error:
        ImageConfig.from_hf(values, "preprocessor_config.json", False)
    assert "\n" not in str(error.value) and str(error.value).startswith("preprocessor_config.json: ")


def test_anyres_needs_size_equal_to_the_tile():
    with pytest.raises(InputError, match="expected the tile size 224"):
        ImageConfig.from_hf({"size": 336, "crop_size": 224}, "test", True)


def test_saved_configuration_reads_back():
    for anyres in (True, False):
        values = {"size": 336, "crop_size": 336, "image_mean": [0.5, 0.4, 0.3]}
        config = ImageConfig.from_hf(values, "test", anyres)
        assert ImageConfig.from_hf(json.loads(json.dumps(config.to_hf())), "test", anyres) == config


def test_only_rgb_is_preprocessed():
    with pytest.raises(InputError, match="mode L, expected RGB"):
        preprocess(Image.new("L", (3, 3)), ImageConfig(tile=8, image_grid_pinpoints=None, resize=8))
