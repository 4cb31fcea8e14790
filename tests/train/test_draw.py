"""Pictures against the scenes they show: boxes, colours, object maps, other renderers, and labelled pages."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from minivlm.errors import InputError
from minivlm.evaluate.renderers import OTHER_FONTS, VARIANTS, render
from minivlm.train import outlines
from minivlm.train.draw import draw
from minivlm.train.outlines import FONTS, densified, glyph, inset, unit_shape, within
from minivlm.train.pages import CHARACTERS, Table, crowded_page, page, patch_labels, scene_page
from minivlm.train.styles import COLOURS, SHAPES
from minivlm.train.world import scene

SCENES = [scene("train", index, 21) for index in range(120)]


def drawn_extent(mask):
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_boxes_are_the_extent_of_what_is_drawn():
    for shown in SCENES:
        picture, ids = draw(shown)
        assert picture.shape == (shown.height, shown.width, 3) and picture.dtype == np.uint8
        assert ids.shape == (shown.height, shown.width) and ids.dtype == np.uint8
        size = np.array([shown.width, shown.height] * 2)
        for k, item in enumerate(shown.objects, 1):
            off = np.abs(drawn_extent(ids == k) - item.box * size).max()
            assert off <= (1.0 if item.shape in ("circle", "square", "cross") else 2.5), (item, off)
        if shown.text is not None:
            assert np.abs(drawn_extent(ids > len(shown.objects)) - shown.text.box * size).max() <= 2.0
            assert ids.max() == len(shown.objects) + len(shown.text.string)


def test_object_pixels_have_the_objects_colour_and_the_rest_the_background():
    for shown in SCENES:
        clean = replace(shown, finish=replace(shown.finish, smooth=False, blur=0.0, noise=0, jpeg=0))
        picture, ids = draw(clean)
        assert (picture[ids == 0] == shown.background).all()
        for k, item in enumerate(shown.objects, 1):
            inside = picture[ids == k]
            is_fill, is_edge = (inside == item.style.rgb).all(1), (inside == item.style.edge_rgb).all(1)
            assert (is_fill | is_edge).all() and is_fill.any()


def test_drawing_is_repeatable():
    shown = next(shown for shown in SCENES if shown.finish.noise)
    assert (draw(shown)[0] == draw(shown)[0]).all()


def test_anti_aliasing_mixes_colours_only_at_edges():
    shown = replace(SCENES[0], finish=replace(SCENES[0].finish, smooth=True, blur=0.0, noise=0, jpeg=0))
    hard = replace(shown, finish=replace(shown.finish, smooth=False))
    same = (draw(shown)[0] == draw(hard)[0]).all(-1)
    assert 0.8 < same.mean() < 1.0


@pytest.mark.parametrize("font", FONTS + OTHER_FONTS)
def test_glyphs_stand_on_the_line_with_capital_height_one(font):
    for character in CHARACTERS:
        outline = glyph(font, character)
        assert outline.solid[0] and outline.ends[-1] == len(outline.points) and outline.advance > 0
        assert -1.2 < outline.points[:, 1].min() < -0.9 and -0.05 < outline.points[:, 1].max() < 0.4
    assert [glyph(font, letter).solid.count(False) for letter in "ICAB"] == [0, 0, 1, 2]


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    glyph.cache_clear()
    outlines._face.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib.ft2font", None)
    with pytest.raises(InputError, match=r"pip install 'minivlm\[train\]'"):
        glyph("DejaVuSans", "A")


def test_inset_moves_each_side_of_a_square_by_the_distance():
    square = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    np.testing.assert_allclose(inset(square, 2), [[2, 2], [8, 2], [8, 8], [2, 8]])
    np.testing.assert_allclose(inset(square, -1), [[-1, -1], [11, -1], [11, 11], [-1, 11]])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_border_stays_within_the_outline(shape):
    from matplotlib.path import Path

    outer = unit_shape(shape, 0.5) * 40
    inner = within(shape, outer, 5.0)
    assert Path(outer).contains_points(inner).all()
    around, along = densified(outer, 100), densified(inner, 20)
    apart = np.sqrt(((along[:, None] - around[None]) ** 2).sum(-1)).min(1)
    assert abs(np.median(apart) - 5.0) < 0.3 and apart.min() > 4.0  # much more in the corners


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_renderers_show_the_same_scene(variant):
    for index in range(6):
        shown = scene("test", index, 21)
        picture = render(shown, variant)
        assert picture.dtype == np.uint8 and max(picture.shape) == 480
        ours = draw(replace(shown, finish=replace(shown.finish, noise=0, blur=0.0, jpeg=0)))[1]
        ink = np.abs(picture.astype(int) - shown.background).sum(-1) > 120
        found, size = drawn_extent(ink), np.array([picture.shape[1], picture.shape[0]] * 2)
        known = drawn_extent(ours > 0) / np.array([shown.width, shown.height] * 2)
        assert np.abs(found / size - known).max() < (0.03 if shown.text is None else 0.2)


def test_an_unknown_renderer_is_an_error():
    with pytest.raises(InputError, match="unknown renderer 'crayon': expected one of matplotlib, jpeg, outline"):
        render(SCENES[0], "crayon")


@pytest.mark.parametrize("make", [crowded_page, scene_page])
def test_a_pages_table_describes_its_map(make):
    rng = np.random.default_rng(4)
    for _ in range(15):
        picture, ids, table = make(rng, 96)
        assert picture.shape == (96, 96, 3) and ids.shape == (96, 96) and ids.max() < len(table.shape)
        assert [column[0] for column in (table.shape, table.colour, table.char)] == [0, 0, 0]
        assert ((table.shape[1:] > 0) != (table.char[1:] > 0)).all()
        assert table.colour[1:].min() >= 1 and table.colour.max() <= len(COLOURS)
        for k in np.unique(ids[ids > 0]):
            x1, y1, x2, y2 = drawn_extent(ids == k)
            assert (table.box[k] - (x1, y1, x2, y2) < 2.5)[:2].all() and ((x2, y2) - table.box[k][2:] < 2.5).all()


def test_a_page_is_repeatable():
    for seed in range(4):
        first, second = page(np.random.default_rng(seed)), page(np.random.default_rng(seed))
        assert (first[0] == second[0]).all() and (first[1] == second[1]).all()


def test_patch_labels_of_a_worked_example():
    """Object 1 fills the left half of an 8 x 8 tile in patches of 4, object 2 one pixel of the last patch."""
    ids = np.zeros((8, 8), np.uint8)
    ids[:, :4] = 1
    ids[7, 7] = 2
    boxes = np.array([[0, 0, 0, 0], [0, 0, 4, 8], [7, 7, 8, 8]], np.float32)
    labels = patch_labels(ids, Table(np.array([0, 3, 0]), np.array([0, 1, 7]), np.array([0, 0, 9]), boxes), 4)
    assert labels["shape"].tolist() == [3, 0, 3, 0] and labels["colour"].tolist() == [1, 0, 1, 0]
    assert labels["char"].tolist() == [0, 0, 0, 0] and labels["valid"].tolist() == [True, False, True, False]
    np.testing.assert_allclose(labels["box"][0], [0.25, 0.25, 0.25, 0.75])  # from the centre (2, 2)
    np.testing.assert_allclose(labels["box"][2], [0.25, 0.75, 0.25, 0.25])
