"""The whole model: gradients equal transformers', pictures come in reading order and upright."""

import dataclasses

import pytest
import tiny
import torch

import minivlm
from minivlm.checkpoint import rename
from minivlm.merge import merge
from minivlm.processor import Inputs

KINDS = list(tiny.MODELS)
BACKENDS = ("reference", "sdpa")


def row_of(vlm: minivlm.Pipeline, *sizes: tuple[int, int]) -> Inputs:
    text = "".join("<image> is " for _ in sizes) + "red or blue"
    return vlm.processor(text, [tiny.picture(*size, seed=i) for i, size in enumerate(sizes)])


def loss_of(logits: torch.Tensor, ids: tuple[int, ...], image_id: int) -> torch.Tensor:
    """Next-token cross-entropy on the words."""
    labels = torch.tensor([-100 if token == image_id else token for token in ids[1:]])
    return torch.nn.functional.cross_entropy(logits[:-1], labels)


def assert_near(gradient: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """To 1e-4 of the largest; and 1e-6, as a key's bias has no gradient but rounding: a softmax ignores it."""
    assert float((gradient - expected).abs().max()) <= 1e-4 * float(expected.abs().max()) + 1e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_transformers(tiny_of, kind, backend):
    """They reach every parameter that runs, newline and class token included, and no other."""
    pair = tiny_of(kind)
    model = minivlm.load(pair.folder, device="cpu", dtype="float32", backend=backend).model
    image_id = model.config.image_token_id
    row = row_of(pair.vlm, (23, 31), (9, 40))
    loss_of(model([row]), row.ids, image_id).backward()

    batch = pair.processor(
        text="<image> is <image> is red or blue",
        images=[tiny.picture(23, 31, seed=0), tiny.picture(9, 40, seed=1)],
        return_tensors="pt",
    )
    pair.oracle.zero_grad()
    loss_of(pair.oracle(**batch).logits[0], row.ids, image_id).backward()
    theirs = {rename(name): parameter.grad for name, parameter in pair.oracle.named_parameters()}
    pair.oracle.zero_grad()

    not_run = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.")  # feature layer -2 of 3
    for name, parameter in model.named_parameters():
        if name.startswith(not_run):
            assert parameter.grad is None, name
            continue
        assert theirs[name].abs().max() > 0, name
        assert_near(parameter.grad, theirs[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_packed_batch_are_those_of_its_rows(tiny_of, kind):
    pair = tiny_of(kind)
    model = minivlm.load(pair.folder, device="cpu", dtype="float32", backend="reference").model
    rows = [row_of(pair.vlm), row_of(pair.vlm, (30, 8), (5, 50)), row_of(pair.vlm, (12, 12))]
    # Several rows in one loss, then the sum of the losses of each alone.
    gradients = []
    for parts in ([rows], [[row] for row in rows]):
        for part in parts:
            logits = model(part).split([len(row.ids) for row in part])
            sum(piece.square().mean() for piece in logits).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_near(gradient, gradients[1][name], name)


def test_no_gradients_of_a_row_without_pictures_reach_the_encoder(tiny_of):
    """A batch of text alone trains on: the encoder takes no part, and says so with None, not zero."""
    model = minivlm.load(tiny_of("next-mistral").folder, device="cpu", dtype="float32", backend="sdpa").model
    model([row_of(tiny_of("next-mistral").vlm)]).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("language_model."), name


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_consumed_in_reading_order(tiny_of, kind):
    """checklist 14: rows with two, none and one picture; each picture's tokens are those it has alone."""
    vlm = tiny_of(kind).vlm
    rows = [row_of(vlm, (23, 31), (40, 9)), row_of(vlm), row_of(vlm, (7, 7))]
    alone = []
    for size, seed in (((23, 31), 0), ((40, 9), 1), ((7, 7), 0)):
        one = vlm.processor("<image>", [tiny.picture(*size, seed=seed)])
        alone += vlm.model.encode_images(one.tiles, one.image_sizes, one.tile_counts)
    ids = torch.tensor([token for row in rows for token in row.ids])
    words = vlm.model.language_model.embed_tokens(ids)
    expected = merge(words, ids, torch.cat(alone), vlm.model.config.image_token_id)
    torch.testing.assert_close(vlm.model.embed(rows), expected, rtol=1e-5, atol=1e-5)
    exchanged = dataclasses.replace(
        rows[0],
        tiles=rows[0].tiles.flip(0),
        image_sizes=rows[0].image_sizes[::-1],
        tile_counts=rows[0].tile_counts[::-1],
    )
    assert not torch.isclose(vlm.model.embed([exchanged]), expected[: len(rows[0].ids)]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_can_be_encoded_beforehand_and_tile_by_tile(tiny_of, kind):
    vlm = tiny_of(kind).vlm
    row = row_of(vlm, (23, 31), (40, 9))
    with torch.no_grad():
        features = torch.cat([vlm.model.encode_tiles(tile[None]) for tile in row.tiles])
        tokens = vlm.model.pack_images(features, row.image_sizes, row.tile_counts)
        torch.testing.assert_close(vlm.model.embed_ids(row.ids, tokens), vlm.model.embed([row]), rtol=1e-5, atol=1e-5)
        behind = row.ids.index(vlm.model.config.image_token_id) + 5  # in the middle of the first picture
        part = vlm.model.embed_ids(row.ids[behind:], [tokens[0][5:], tokens[1]])
        torch.testing.assert_close(part, vlm.model.embed([row])[behind:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(10, 30), (30, 10)])
def test_pictures_stay_upright(tiny_of, size):
    """checklist 1: a corner of a flat or a tall picture changes the grid's tokens in that corner and no other.

    The last layer sees a whole tile, so the corner's tile as a whole may change.
    """
    vlm = tiny_of("next-mistral").vlm
    height, width = size
    assert vlm.model.config.image_grid_pinpoints[-2:] == ((36, 12), (12, 36))
    pixels = tiny.picture(height, width)
    changed = pixels.copy()
    changed.paste((255, 0, 0), (width - 4, height - 4, width, height))  # left, top, right, bottom
    one, two = (vlm.processor("<image>", [picture]) for picture in (pixels, changed))
    before, after = (vlm.model.encode_images(i.tiles, i.image_sizes, i.tile_counts)[0] for i in (one, two))
    base = (tiny.TILE // tiny.PATCH) ** 2
    moved = (before != after).any(-1)[base:]  # the grid's rows, each with its newline
    rows, columns = (3, 9) if width > height else (9, 3)
    assert len(moved) == rows * (columns + 1)
    moved = moved.view(rows, columns + 1)
    assert moved[-3:, -4:-1].all() and not moved[:, -1].any()
    moved[-3:, -4:-1] = False
    assert not moved.any()


def test_every_picture_says_its_size_and_tiles():
    """checklist 15"""
    names = {field.name: field.default for field in dataclasses.fields(Inputs)}
    assert set(names.values()) == {dataclasses.MISSING} and {"image_sizes", "tile_counts"} < set(names)


def test_inputs_that_do_not_fit_together_are_refused(tiny_of):
    """checklist 15: a size for which there should be other tiles, and a placeholder too many."""
    vlm = tiny_of("next-mistral").vlm
    row, image_id = row_of(vlm, (23, 31)), vlm.model.config.image_token_id
    with pytest.raises(minivlm.InputError, match=r"features \(5, .*expected 4 tiles"):
        vlm.model.embed([dataclasses.replace(row, image_sizes=((5, 31),))])
    count = row.ids.count(image_id)
    with pytest.raises(minivlm.InputError, match=f"{count + 1} image placeholders .* {count} image tokens"):
        vlm.model.embed([dataclasses.replace(row, ids=(*row.ids, image_id))])


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_any_float_type_are_taken(tiny_of, kind):
    """Pixels are float32; the model rounds them to its own type, once."""
    low = minivlm.load(tiny_of(kind).folder, device="cpu", dtype="bfloat16", backend="reference")
    row = row_of(low, (23, 31))
    rounded = dataclasses.replace(row, tiles=row.tiles.bfloat16())
    with torch.no_grad():
        assert torch.equal(low.model([row]), low.model([rounded]))
