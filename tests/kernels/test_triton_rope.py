"""Rotary positions and the cache: the twin against complex numbers and the decoder's, the kernel against the twin."""

import pytest
import torch
from problems import check, poisoned_memory, values

from minivlm.kernels import rope
from minivlm.ops.rope import rope_table, rotate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Heads, kv heads, channels: groups of 1 to 12, heads that fill no program, widths that are no power of two.
SIZES = ((1, 1, 2), (4, 4, 24), (9, 3, 80), (12, 1, 96), (7, 7, 64), (16, 2, 128), (10, 5, 256))
SLOTS, CAPACITY = 4, 11
# Three rows in one pack, out of order: 3 tokens at the start of slot 2, one at the end of slot 0, two inside slot 3.
TOKENS = ((2, 0), (2, 1), (2, 2), (0, CAPACITY - 1), (3, 5), (3, 6))


def arguments(sizes, device, dtype, tokens=TOKENS):
    """q, k, v are slices of one projection, the caches those of the middle one of three layers, of NaN."""
    heads, kv_heads, channels = sizes
    fused = values(len(tokens), heads + 2 * kv_heads, channels, seed=1)
    q, k, v = fused.to(device, dtype).split((heads, kv_heads, kv_heads), dim=1)
    slots, positions = (torch.tensor(x, dtype=torch.int32, device=device) for x in zip(*tokens, strict=True))
    cos, sin = rope_table(positions.cpu() + 1000, channels, 10000.0, torch.bfloat16)
    keys, values_ = (torch.full((3, SLOTS, kv_heads, CAPACITY, channels), torch.nan, dtype=dtype) for _ in "kv")
    cos, sin, keys, values_ = (x.to(device, dtype) for x in (cos, sin, keys, values_))
    return q, k, v, cos, sin, positions, slots, keys[1], values_[1]


def test_the_twin_turns_complex_numbers():
    q, k, v, cos, sin, positions, slots, keys, held = arguments((6, 2, 16), torch.device("cpu"), torch.float64)
    found = rope.plain_rotate_and_cache(q, k, v, cos, sin, positions, slots, keys, held)
    turns = torch.complex(cos, sin)[..., :8]
    for x, turned in ((q, found), (k, torch.stack([keys[slot, :, at] for slot, at in TOKENS]))):
        expected = torch.complex(*x.chunk(2, -1)) * turns
        torch.testing.assert_close(torch.complex(*turned.chunk(2, -1)), expected)
    for token, (slot, at) in enumerate(TOKENS):
        assert torch.equal(held[slot, :, at], v[token])
    assert keys.isfinite().sum() == held.isfinite().sum() == k.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_is_the_decoders(dtype):
    x = values(5, 3, 32, seed=1).to(dtype)
    cos, sin = rope_table(torch.arange(5), 32, 10000.0, dtype)
    assert torch.equal(rope.turn(x, cos, sin), rotate(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel_errs_at_most_twice_as_much_as_its_twin(sizes, dtype, device):
    exact = arguments(sizes, torch.device("cpu"), torch.float64)
    plain = arguments(sizes, device, dtype)
    mine = arguments(sizes, device, dtype)
    with poisoned_memory():
        found = rope.rotate_and_cache(*mine)
    check(found, rope.plain_rotate_and_cache(*plain), rope.plain_rotate_and_cache(*exact))
    if dtype != torch.float32:  # in float32 a product may be fused with the sum
        assert torch.equal(found, rope.turn(plain[0], *plain[3:5]))
    keys, held = mine[-2:]
    slots, positions = zip(*TOKENS, strict=True)
    at = (list(slots), slice(None), list(positions))
    check(keys[at], plain[-2][at], exact[-2][at])
    assert torch.equal(held[at], plain[-1][at])
    for cache in (keys, held):  # and nothing else was touched
        assert cache._base.isfinite().sum() == mine[1].numel()


def test_tokens_without_a_place_are_turned_and_stored_nowhere(device):
    """Padding of a graph's batch (a negative slot or position), and indices beyond the cache."""
    places = ((0, -1), (-1, 0), (SLOTS, 0), (0, CAPACITY), (1, 3))
    arguments_ = arguments((4, 2, 16), device, torch.bfloat16, places)
    found = rope.rotate_and_cache(*arguments_)
    assert torch.equal(found, rope.turn(arguments_[0], *arguments_[3:5]))
    for cache in arguments_[-2:]:
        assert cache[1, :, 3].isfinite().all()
        assert cache._base.isfinite().sum() == 2 * 16  # of all layers: slot -1 would be the last of the layer before
    *others, keys, held = arguments((4, 2, 16), device, torch.bfloat16, (*places[:2], places[4]))
    rope.plain_rotate_and_cache(*others, keys, held)
    assert keys.isfinite().sum() == held.isfinite().sum() == 2 * 16


def test_strides_of_any_kind(device):
    q, k, v, cos, sin, *places, keys, held = arguments((6, 3, 40), device, torch.float16)
    expected = rope.rotate_and_cache(q, k, v, cos, sin, *places, keys, held)
    strange = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v, cos, sin)]
    other_keys, other_held = (
        torch.full_like(x, torch.nan).transpose(1, 3).contiguous().transpose(1, 3) for x in (keys, held)
    )
    assert not other_keys.is_contiguous() and not strange[0].is_contiguous()
    with poisoned_memory():
        found = rope.rotate_and_cache(*strange, *places, other_keys, other_held)
    assert torch.equal(found, expected)
    for one, other in ((other_keys, keys), (other_held, held)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_no_tokens(device):
    q, k, v, cos, sin, positions, slots, keys, held = arguments((4, 2, 16), device, torch.float32)
    found = rope.rotate_and_cache(q[:0], k[:0], v[:0], cos[:0], sin[:0], positions[:0], slots[:0], keys, held)
    assert found.shape == (0, 4, 16) and not keys.isfinite().any()


def test_torch_knows_the_kernel(device):
    *others, keys, held = arguments((4, 2, 16), device, torch.float32)
    torch.library.opcheck(rope.rotate_and_cache, (*others, keys.nan_to_num(), held.nan_to_num()))


def test_wrong_arguments_are_refused(device):
    good = arguments((4, 2, 16), device, torch.float32)
    names = ("q", "k", "v", "cos", "sin", "positions", "slots", "keys", "values")
    for name, change, message in (
        ("k", lambda k: k[:, :, :8], r"twice \[S, K, C\]"),
        ("cos", lambda cos: cos[:2], r"expected \[6, 1, 16\]"),
        ("keys", lambda keys: keys[:, :1], r"expected \[slots, 2, T, 16\]"),
        ("positions", lambda positions: positions.long(), "int64"),
        ("slots", lambda slots: slots[:3], r"int32 \[6\]"),
        ("values", lambda held: held.half(), "float16"),
    ):
        bad = [change(x) if which == name else x for which, x in zip(names, good, strict=True)]
        with pytest.raises(ValueError, match=message):
            rope.rotate_and_cache(*bad)
