"""Attention of the backend `cpu`: rows with one query each, together or one by one, alone or beside prompts."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from minivlm.ops import cpu, cpu_attention
from minivlm.ops.backend import CPU, REFERENCE
from minivlm.ops.cpu_attention import SingleQueries, _by_gqa, _by_products, single_attention
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rows import Rows

LAYERS, HEADS, KV_HEADS, CHANNELS, SLOTS, CAPACITY = 2, 6, 2, 8, 9, 40
# (lengths, starts, slots): single queries in front of prompts, alone, one of them, a prompt whose part has length 1
CASES = (
    ((1, 1, 1, 5, 12), (7, 30, 12, 0, 3), (5, 1, 8, 2, 0)),
    ((1, 1, 1), (20, 21, 19), (3, 4, 5)),
    ((1, 9), (11, 0), (6, 7)),
    ((1, 1, 4, 1), (5, 9, 2, 8), (0, 1, 2, 3)),
    ((6, 1), (0, 4), (0, 1)),
)


def filled(value: float = 3.0) -> KVCache:
    """A cache with the same random content at every call; what rows do not see, `value`."""
    draw = torch.Generator().manual_seed(3)
    cache = KVCache(LAYERS, SLOTS, KV_HEADS, CAPACITY, CHANNELS, torch.float32, "cpu")
    cache.keys.normal_(generator=draw), cache.values.normal_(generator=draw)
    cache.keys[:, :, :, 33:], cache.values[:, :, :, 33:] = value, value
    return cache


def attended(backend, rows: Rows, window: int | None, cache: KVCache | None) -> torch.Tensor:
    """Both layers' results; each layer's queries and keys are others."""
    draw, total = torch.Generator().manual_seed(4), sum(rows.lengths)
    rope = backend.rope(rows, CHANNELS, 10_000.0, torch.float32, "cpu")
    seen, found = backend.sight(rows, window, "cpu"), []
    for layer in range(LAYERS):
        q, k, v = (torch.randn(total, n, CHANNELS, generator=draw) for n in (HEADS, KV_HEADS, KV_HEADS))
        found.append(backend.attention(q, k, v, rope, rows, seen, cache, layer))
    return torch.stack(found)


@pytest.mark.parametrize("call", (-1, 2**30), ids=("one by one", "together"))
@pytest.mark.parametrize("window", (None, 4))
@pytest.mark.parametrize("case", CASES)
def test_packed_rows_equal_the_plain_form(case, window, call, monkeypatch):
    """In float32, what is returned and what is written."""
    monkeypatch.setattr(cpu_attention, "CALL", call)
    rows, ours, theirs = Rows.causal(*case), filled(), filled()
    torch.testing.assert_close(
        attended(CPU, rows, window, ours), attended(REFERENCE, rows, window, theirs), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.values, theirs.values)


def test_rows_without_a_cache_see_themselves():
    rows = Rows.causal((1, 1, 3))
    torch.testing.assert_close(attended(CPU, rows, None, None), attended(REFERENCE, rows, None, None))


def test_what_is_masked_may_be_no_number(monkeypatch):
    """A broken row left it behind."""
    monkeypatch.setattr(cpu_attention, "CALL", 2**30)
    rows = Rows.causal((1, 1, 4), (34, 5, 0), (0, 1, 2))
    spoilt, clean = filled(), filled()
    spoilt.keys[:, 1, :, 6:], spoilt.values[:, 1, :, 6:] = torch.nan, torch.nan
    found, expected = (attended(CPU, rows, None, cache) for cache in (spoilt, clean))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_position_beyond_the_cache_is_refused():
    with pytest.raises(ValueError, match="position 40 does not fit in a cache of 40 positions"):
        attended(CPU, Rows.causal((1, 1), (3, CAPACITY)), None, filled())


def test_rows_attend_together_where_they_are_alike():
    """Not beside one that is much longer, nor far from one another."""
    cache = KVCache(1, 64, KV_HEADS, 4, 64, torch.float32, "cpu")
    alike = SingleQueries(cache, HEADS, None).alike
    assert alike((3, 1, 2), (300, 280, 320)) and alike((0, 2), (100, 100))
    assert not alike((0, 1, 2), (300, 9000, 320)) and not alike((0, 63), (3000, 3000))
    assert not alike((3,), (300,))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("single", (scaled_dot_product_attention, _by_gqa, _by_products))
def test_single_queries_equal_float64(single, dtype):
    torch.manual_seed(0)
    for rows, kv_heads, group, keys, channels in ((1, 1, 1, 1, 8), (1, 2, 4, 77, 16), (3, 3, 8, 300, 64)):
        q, (k, v) = torch.randn(rows, kv_heads, group, channels), torch.randn(2, rows, kv_heads, keys, channels)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        mask = torch.zeros(rows, 1, 1, keys, dtype=dtype).masked_fill_(torch.arange(keys) > keys // 2, -torch.inf)
        for added in (None, mask):
            scores = q.double() @ k.double().transpose(2, 3) * channels**-0.5 + (0 if added is None else added)
            expected, found = torch.softmax(scores, dim=-1) @ v.double(), single(q, k, v, added)
            assert found.dtype == dtype
            assert float((found - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(v.abs().max())


@pytest.mark.parametrize(
    ("packs", "dtype", "group", "expected"),
    [
        (True, torch.bfloat16, 2, _by_products),
        (True, torch.float32, 2, scaled_dot_product_attention),
        (False, torch.bfloat16, 3, _by_gqa),
        (False, torch.bfloat16, 4, scaled_dot_product_attention),
        (False, torch.float16, 2, scaled_dot_product_attention),
    ],
)
def test_the_form_is_chosen_by_processor_type_and_group(packs, dtype, group, expected, monkeypatch):
    monkeypatch.setattr(cpu, "packs", lambda: packs)
    assert single_attention(dtype, group) is expected
