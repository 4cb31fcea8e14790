"""Geometry of any-resolution tiling against transformers' processor and model."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from minivlm.errors import InputError
from minivlm.processor import Inputs
from minivlm.processor.anyres import (
    VisionGeometry,
    check_pinpoints,
    fitted_size,
    image_token_count,
    margins,
    pack_image_features,
    select_best_resolution,
    tile_count,
    tile_grid,
    unpadded_grid,
)

PINS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def hf_count(size, pins, tile, patch):
    stub = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=[list(pin) for pin in pins]),
        patch_size=patch,
        num_additional_image_tokens=1,
        _get_unpadded_features=lambda *args: LlavaNextProcessor._get_unpadded_features(None, *args),
    )
    return LlavaNextProcessor._get_number_of_features(stub, *size, tile, tile) - 1


def hf_pack(features, newline, size, pins, tile, patch):
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=patch),
        image_grid_pinpoints=[list(pin) for pin in pins],
    )
    packed, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [features], [size], "default", image_newline=newline
    )
    return packed[0]


def features_for(size, pins, tile, patch, width=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tile_count(size, pins, tile), (tile // patch) ** 2, width, generator=generator)


@pytest.mark.parametrize(
    "size, count",
    [
        ((480, 640), 2340),
        ((640, 480), 2352),
        ((336, 336), 1176),
        ((672, 672), 2928),
        ((300, 500), 1560),
        ((500, 300), 1576),
        ((1080, 1920), 1948),
        ((900, 37), 792),
        ((1, 5000), 576),
        ((88, 55), 984),
        ((88, 99), 1272),
        ((55, 176), 1360),
    ],
)
def test_published_counts(size, count):
    """checklist 3: rounding to 7 digits, without which the last three would give 936, 1224 and 1262."""
    assert image_token_count(size, PINS, 336, 14) == count


@settings(max_examples=400, deadline=None)
@given(SIZES)
def test_count_equals_transformers_processor(size):
    """checklist 2, 3: formula against the processor's, for portraits and landscapes."""
    assert image_token_count(size, PINS, 336, 14) == hf_count(size, PINS, 336, 14)
    assert tile_count(size, PINS, 336) == image_size_to_num_patches(size, [list(pin) for pin in PINS], 336)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.sampled_from([(28, 14), (42, 14), (32, 8), (16, 16)]))
def test_packed_features_equal_transformers_bit_for_bit(size, sides):
    """checklist 2: the count is the length of what is packed, for every size."""
    tile, patch = sides
    pins = tuple((height // 336 * tile, width // 336 * tile) for height, width in PINS)
    features, newline = features_for(size, pins, tile, patch), torch.randn(2)
    packed = pack_image_features(features, newline, size, pins, tile, patch)
    assert torch.equal(packed, hf_pack(features, newline, size, pins, tile, patch))
    assert len(packed) == image_token_count(size, pins, tile, patch)


@pytest.mark.parametrize("size", [(480, 640), (899, 1024), (88, 55), (1, 5000), (5000, 1), (900, 37)])
def test_packed_features_at_the_published_size(size):
    features, newline = features_for(size, PINS, 336, 14), torch.randn(2)
    packed = pack_image_features(features, newline, size, PINS, 336, 14)
    assert torch.equal(packed, hf_pack(features, newline, size, PINS, 336, 14))


@pytest.mark.parametrize("size, grid", [((400, 900), (1, 3)), ((900, 400), (3, 1)), ((300, 500), (1, 2))])
def test_height_and_width_are_not_swapped(size, grid):
    """checklist 1: rows follow the height, and a probe that rises along one axis keeps rising along it."""
    assert tile_grid(size, PINS, 336) == grid
    rows, columns = grid
    probe = torch.zeros(1 + rows * columns, 576, 2)
    for tile in range(rows * columns):
        y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
        probe[1 + tile, :, 0] = (y + 24 * (tile // columns)).flatten()
        probe[1 + tile, :, 1] = (x + 24 * (tile % columns)).flatten()
    packed = pack_image_features(probe, torch.full((2,), -1.0), size, PINS, 336, 14)
    height, width = unpadded_grid(size, (24 * rows, 24 * columns))
    grid_map = packed[576:].view(height, width + 1, 2)
    assert (grid_map[:, :-1, 0].diff(dim=0) == 1).all() and (grid_map[:, :-1, 1].diff(dim=1) == 1).all()
    assert (grid_map[:, -1] == -1).all()  # a newline ends every row


@pytest.mark.parametrize("size", [(899, 1024), (88, 55)])
def test_size_type_does_not_change_the_result(size):
    """checklist 4: tensors and arrays are cast to Python ints before any arithmetic."""
    for same in (list(size), torch.tensor(size), torch.tensor(size, dtype=torch.int32), np.array(size)):
        assert select_best_resolution(same, PINS) == select_best_resolution(size, PINS)
        assert image_token_count(same, PINS, 336, 14) == image_token_count(size, PINS, 336, 14)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.sampled_from([*PINS, (896, 896), (768, 768)]))
def test_padding_fills_the_canvas_exactly(size, canvas):
    """checklist 5: never 768x767; the odd pixel goes to the bottom or right."""
    fitted = fitted_size(size, canvas)
    top, bottom, left, right = margins(fitted, canvas)
    assert (fitted[0] + top + bottom, fitted[1] + left + right) == canvas
    assert bottom - top in (0, 1) and right - left in (0, 1) and min(top, left) >= 0


@pytest.mark.parametrize("pin", [(336, 700), (300, 336), (0, 336), (-336, 336)])
def test_pinpoints_off_the_tile_grid_are_refused(pin):
    """checklist 6"""
    with pytest.raises(InputError, match="multiple of the tile size 336"):
        check_pinpoints([(336, 672), pin], 336)
    with pytest.raises(InputError, match="multiple of the tile size 336"):
        VisionGeometry(336, 14, ((336, 672), pin))


def test_image_size_off_the_patch_grid_is_refused():
    with pytest.raises(InputError, match="image_size 336 is not a multiple of patch_size 15"):
        VisionGeometry(336, 15, None)


def test_no_token_is_lost_to_the_class_token():
    """checklist 7: 576 and 1176, never 575 or 1175."""
    assert VisionGeometry(336, 14, None).image_token_count((480, 640)) == 576
    assert VisionGeometry(336, 14, PINS).image_token_count((336, 336)) == 1176
    assert VisionGeometry(336, 14, None, "full").image_token_count((480, 640)) == 577


def test_class_token_is_the_encoders_property():
    """checklist 8: SigLIP has no class token, so "default" would drop a patch and give 728 for 729."""
    assert VisionGeometry(378, 14, None, "full", 0).image_token_count((100, 100)) == 729
    with pytest.raises(InputError, match="'default' drops one class token, the encoder has 0"):
        VisionGeometry(378, 14, None, "default", 0)


def test_full_strategy_with_a_class_token_is_refused_in_anyres():
    """checklist 9"""
    with pytest.raises(InputError, match="'full' keeps a class token"):
        VisionGeometry(336, 14, PINS, "full")


def test_image_sizes_is_required():
    """checklist 15: neither the packing nor the model's inputs have a default for it."""
    assert inspect.signature(pack_image_features).parameters["image_size"].default is inspect.Parameter.empty
    with pytest.raises(TypeError, match="image_sizes"):
        Inputs(ids=(1,), tiles=torch.empty(0, 3, 336, 336), tile_counts=())


def test_a_small_picture_has_three_tiles():
    """checklist 16: 336x336 gives the base tile and two more, not five."""
    assert tile_count((336, 336), PINS, 336) == 3


@pytest.mark.parametrize("size", [(300, 300), (336, 336), (198, 294), (1, 1)])
def test_ties_are_broken_as_in_transformers(size):
    """checklist 23: the original code, which reads pinpoints as (width, height), would take (672, 336)."""
    assert select_best_resolution(size, PINS) == (336, 672)


def test_wrong_features_are_refused():
    with pytest.raises(InputError, match=r"expected 5 tiles of 576 patches for a picture of \(480, 640\)"):
        pack_image_features(torch.zeros(3, 576, 2), torch.zeros(2), (480, 640), PINS, 336, 14)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (5.5, 3), "ab", None])
def test_bad_sizes_are_refused(size):
    with pytest.raises(InputError, match="image size"):
        image_token_count(size, PINS, 336, 14)
