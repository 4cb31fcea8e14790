"""Encoded pictures: equal to what the model computes, encoded once, and never more bytes than allowed."""

import dataclasses
import threading
import time

import pytest
import tiny
import torch

from minivlm.processor import Inputs
from minivlm.serve.pictures import Pictures, picture_keys

SIZES = [(20, 30), (40, 9), (7, 5), (12, 12), (3, 90)]


@pytest.fixture
def inputs(tiny_of) -> Inputs:
    pictures = [tiny.picture(*size, seed=i) for i, size in enumerate(SIZES)]
    return tiny_of("next-mistral").vlm.inputs("<image>" * len(SIZES), pictures, raw=True)


def want(pictures: Pictures, inputs: Inputs, user: str) -> dict[bytes, torch.Tensor | None]:
    tiles = inputs.tiles.split(list(inputs.tile_counts))
    each = zip(picture_keys(inputs), tiles, inputs.image_sizes, strict=True)
    return {key: pictures.want(key, part, size, user) for key, part, size in each}


def test_keys_tell_content_and_size_apart(inputs):
    keys = picture_keys(inputs)
    assert len(set(keys)) == len(keys) and picture_keys(inputs) == keys
    other = inputs.tiles.clone()
    other[0, 0, 0, 0] += 1e-6
    assert picture_keys(dataclasses.replace(inputs, tiles=other))[0] != keys[0]
    assert picture_keys(dataclasses.replace(inputs, tiles=other))[1:] == keys[1:]
    assert picture_keys(dataclasses.replace(inputs, image_sizes=((30, 20), *SIZES[1:])))[0] != keys[0]


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_tiles_at_a_time_give_the_models_image_tokens(tiny_of, inputs, most):
    model = tiny_of("next-mistral").vlm.model
    pictures, found, calls = Pictures(model, 10**9), {}, []
    keys = want(pictures, inputs, "a")
    want(pictures, inputs, "b")
    hook = model.vision_tower.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    try:
        while pictures.busy:
            for encoded in pictures.encode(most):
                assert encoded.users == {"a", "b"}
                found[encoded.key] = encoded.tokens
    finally:
        hook.remove()
    assert max(calls) <= most and sum(calls) == len(inputs.tiles)  # each tile once, for both users
    expected = model.encode_images(inputs.tiles, inputs.image_sizes, inputs.tile_counts)
    kept = want(pictures, inputs, "c")
    for key, tokens in zip(keys, expected, strict=True):
        torch.testing.assert_close(found[key], tokens, rtol=1e-5, atol=1e-5)
        assert torch.equal(kept[key], found[key])
    assert not pictures.busy and pictures.hits == pictures.encoded == len(SIZES)


def test_memory_is_bounded_and_what_was_used_last_stays(tiny_of, inputs):
    model = tiny_of("next-mistral").vlm.model
    whole = [tokens.nbytes for tokens in model.encode_images(inputs.tiles, inputs.image_sizes, inputs.tile_counts)]
    pictures = Pictures(model, sum(whole[:3]))
    keys = list(want(pictures, inputs, "a"))
    first = (keys[0], inputs.tiles[: inputs.tile_counts[0]], inputs.image_sizes[0], "b")
    while pictures.busy:
        pictures.encode(1)
        pictures.want(*first)
        kept = [key for key in keys if key in pictures._kept]
        memory = sum(
            pictures._kept[key].untyped_storage().nbytes() for key in kept
        )  # not the views of something larger
        assert memory == pictures.nbytes <= sum(whole[:3]) and len(pictures) == len(kept)
    assert keys[0] in kept and len(kept) < len(keys)
    none = Pictures(model, 0)
    want(none, inputs, "a")
    while none.busy:
        none.encode(5)
    assert len(none) == none.nbytes == 0


def test_who_has_gone_is_not_waited_for(tiny_of, inputs):
    pictures = Pictures(tiny_of("next-mistral").vlm.model, 10**9)
    want(pictures, inputs, "a")
    want(pictures, dataclasses.replace(inputs), "b")
    pictures.drop("a")
    assert pictures.busy
    assert {user for encoded in pictures.encode(1000) for user in encoded.users} == {"b"}
    want(pictures, dataclasses.replace(inputs, tiles=inputs.tiles + 1), "b")
    pictures.drop("b")
    assert not pictures.busy and pictures.encode(1000) == []


def test_a_picture_that_fails_fails_alone(tiny_of, inputs):
    """The others are encoded, whether they stand before it in line or behind it."""
    pictures = Pictures(tiny_of("next-mistral").vlm.model, 10**9)
    tiles = inputs.tiles.split(list(inputs.tile_counts))
    for i, (part, size) in enumerate(zip(tiles, inputs.image_sizes, strict=True)):
        pictures.want(bytes([i]), part[:, :, 1:] if i == 2 else part, size, "a")
    found = {}
    while pictures.busy:
        found |= {encoded.key[0]: encoded.tokens for encoded in pictures.encode(1000)}
    assert isinstance(found.pop(2), Exception)
    assert sorted(found) == [0, 1, 3, 4] and all(isinstance(tokens, torch.Tensor) for tokens in found.values())
    assert pictures.encoded == 4


def test_one_thread_encodes_what_another_wants(tiny_of, inputs):
    """A user that leaves while its picture is encoded is not told; `close` ends the wait."""
    model = tiny_of("next-mistral").vlm.model
    pictures, found = Pictures(model, 0), []

    def leaves(*_) -> None:
        pictures.drop("gone")

    def encode() -> None:
        while pictures.wait():
            found.extend(pictures.encode(2))

    thread = threading.Thread(target=encode)
    thread.start()
    hook = model.vision_tower.register_forward_pre_hook(leaves)
    try:
        pictures.want(b"", inputs.tiles[: inputs.tile_counts[0]], inputs.image_sizes[0], "gone")
        while pictures.busy:
            time.sleep(0.001)
        want(pictures, inputs, "stays")
        while len(found) < len(SIZES):
            time.sleep(0.001)
    finally:
        hook.remove()
        pictures.close()
        thread.join()
    assert {frozenset(encoded.users) for encoded in found} == {frozenset({"stays"})}
