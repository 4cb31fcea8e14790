"""The cache keeps what was written where it was written."""

import pytest
import torch

from minivlm.ops.kv_cache import KVCache


def filled(capacity: int) -> tuple[KVCache, torch.Tensor]:
    """A cache of 2 layers and 3 slots with 4 positions written in two steps, and the keys; values are -keys."""
    cache = KVCache(2, 3, 2, capacity, 5, torch.float32, "cpu")
    keys = torch.randn(2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        for slot in range(3):
            for part in (slice(0, 3), slice(3, 4)):
                k = keys[layer, slot, :, part]
                cache.write(layer, slot, part.start, k, -k)
    return cache, keys


def test_a_write_returns_everything_up_to_it():
    cache, keys = filled(6)
    new = torch.ones(2, 2, 5)
    k, v = cache.write(1, 2, 4, new, -new)
    assert torch.equal(k, torch.cat([keys[1, 2], new], dim=1)) and torch.equal(v, -k)
    k, _ = cache.write(0, 1, 1, new, new)  # what lay behind is no longer part of the row
    assert torch.equal(k, torch.cat([keys[0, 1, :, :1], new], dim=1))


def test_slots_and_layers_are_separate():
    cache, keys = filled(4)
    cache.write(0, 1, 0, torch.zeros(2, 4, 5), torch.zeros(2, 4, 5))
    keys[0, 1] = 0
    assert torch.equal(cache.keys, keys) and torch.equal(cache.values, -keys)


def test_growing_keeps_what_is_stored():
    cache, keys = filled(4)
    cache.grow(3)
    assert cache.capacity == 4
    cache.grow(5)  # at least doubled, so that growing one by one copies each key only a few times
    assert cache.capacity == 8 and torch.equal(cache.keys[:, :, :, :4], keys)
    cache.grow(100)
    assert cache.capacity == 100 and torch.equal(cache.values[:, :, :, :4], -keys)
    assert cache.nbytes == 2 * 4 * 2 * 3 * 2 * 100 * 5


def test_a_position_beyond_the_end_is_refused():
    cache, _ = filled(4)
    with pytest.raises(ValueError, match="position 4 does not fit in a cache of 4"):
        cache.write(0, 0, 3, torch.zeros(2, 2, 5), torch.zeros(2, 2, 5))


def test_a_copied_prefix_is_that_of_the_other_slot():
    cache, keys = filled(6)
    cache.copy(0, 2, 3)
    expected = torch.cat([keys[:, 0, :, :3], keys[:, 2, :, 3:]], dim=2)
    assert torch.equal(cache.keys[:, 2, :, :4], expected) and torch.equal(cache.values[:, 2, :, :4], -expected)
    assert torch.equal(cache.keys[:, :2, :, :4], keys[:, :2])
