"""Attention against loops in float64: plain and fused, grouped heads, windows, packed rows, chunks, segments."""

import math
import random

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from minivlm.ops.attention import attend_rows, eager, fused, sight
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rows import Rows

FORMS = pytest.mark.parametrize("attend", (eager, fused))
CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_loops(q: Tensor, k: Tensor, v: Tensor, keys_of: list[list[int]]) -> np.ndarray:
    """q [n, H, C], k and v [t, K, C], the keys that each query sees -> [n, H * C] in float64."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    queries, heads, channels = q.shape
    out = np.zeros((queries, heads, channels))
    for i in range(queries):
        for h in range(heads):
            shared = h * k.shape[1] // heads  # consecutive query heads share a key head
            scores = np.array([q[i, h] @ k[j, shared] / math.sqrt(channels) for j in keys_of[i]])
            weights = np.exp(scores - scores.max())
            out[i, h] = (weights / weights.sum()) @ v[keys_of[i], shared]
    return out.reshape(queries, -1)


def causal_keys(start: int, n: int, window: int | None = None) -> list[list[int]]:
    """The keys of queries at positions start .. start + n - 1."""
    return [[j for j in range(p + 1) if window is None or p - j < window] for p in range(start, start + n)]


def whole(attend, q: Tensor, k: Tensor, v: Tensor, rows: Rows, window=None, cache=None, layer=0) -> Tensor:
    return attend_rows(attend, q, k, v, rows, sight(rows, window, CPU), cache, layer)


@FORMS
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (8, 1), (1, 1)])
def test_grouped_heads(attend, heads, kv_heads):
    q, k, v = drawn(7, heads, 6), drawn(7, kv_heads, 6, seed=1), drawn(7, kv_heads, 6, seed=2)
    found = whole(attend, q, k, v, Rows.causal((7,)))
    assert_allclose(found, in_loops(q, k, v, causal_keys(0, 7)), atol=1e-6)


@FORMS
def test_encoder_attention_sees_everything(attend):
    q, k, v = (drawn(2, 3, 5, 4, seed=seed) for seed in range(3))  # [N, H, P, C]
    found = attend(q, k, v, "all")
    for tile in range(2):
        parts = (x[tile].transpose(0, 1) for x in (q, k, v))
        expected = in_loops(*parts, [list(range(5))] * 5)
        assert_allclose(found[tile].transpose(0, 1).flatten(1), expected, atol=1e-6)


@FORMS
@pytest.mark.parametrize("window", (None, 1, 3, 8, 40))
def test_packed_rows_with_any_history_equal_loops(attend, window):
    """Rows prefilled in drawn chunks, in drawn company, slots in drawn order; sliding windows and none."""
    draw = random.Random(window or 0)
    lengths = (11, 1, 7)
    cache = KVCache(2, 5, 2, 12, 6, torch.float32, "cpu")
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)  # what was never written must not be read
    slots = draw.sample(range(5), 3)
    rows = [[drawn(n, h, 6, seed=10 * i + j) for j, h in enumerate((4, 2, 2))] for i, n in enumerate(lengths)]
    found: list[list[Tensor]] = [[], [], []]
    done = [0, 0, 0]
    while done != list(lengths):
        part = [i for i in range(3) if done[i] < lengths[i] and draw.random() < 0.7]
        if part:
            sizes = [draw.randint(1, lengths[i] - done[i]) for i in part]
            packed = (
                torch.cat([rows[i][j][done[i] : done[i] + n] for i, n in zip(part, sizes, strict=True)])
                for j in range(3)
            )
            starts = [done[i] for i in part]
            layout = Rows.causal(sizes, starts, [slots[i] for i in part])
            out = whole(attend, *packed, layout, window, cache, layer=1)
            for i, n, piece in zip(part, sizes, out.split(sizes), strict=True):
                found[i].append(piece)
                done[i] += n
    for pieces, (q, k, v) in zip(found, rows, strict=True):
        expected = in_loops(q, k, v, causal_keys(0, len(q), window))
        assert_allclose(torch.cat(pieces), expected, atol=1e-6)


@FORMS
@pytest.mark.parametrize("segments", [(4, 3, 2, 2), (0, 3, 2), (5, 1), (3, 1, 1, 1), (6,)])
def test_segments_equal_separate_rows(attend, segments):
    """One prefix with several continuations gives what the prefix with each of them alone gives."""
    prefix, *others = segments
    q, k, v = (drawn(sum(segments), h, 6, seed=h) for h in (4, 2, 1))
    v = v.expand(-1, 2, -1)
    shared = whole(attend, q, k, v, Rows.shared_prefix([segments]))
    at = prefix
    for n in others or [0]:
        alone = [*range(prefix), *range(at, at + n)]
        expected = in_loops(q[alone], k[alone], v[alone], causal_keys(0, prefix + n))
        assert_allclose(shared[alone], expected, atol=1e-6)
        at += n


@FORMS
def test_segments_do_not_leak(attend):
    """Changing one continuation changes no bit of its prefix, its siblings or another row."""
    rows = Rows.shared_prefix([(4, 3, 2, 2), (2, 2)])
    q, k, v = (drawn(15, 2, 6, seed=seed) for seed in range(3))
    before = whole(attend, q, k, v, rows)
    changed = slice(4, 7)  # the first continuation of the first row
    for x in (q, k, v):
        x[changed] = 1e4 * drawn(3, 2, 6, seed=9)
    after = whole(attend, q, k, v, rows)
    kept = [i for i in range(15) if not 4 <= i < 7]
    assert torch.equal(before[kept], after[kept])
    assert not torch.isclose(before[changed], after[changed]).any()


@FORMS
def test_rows_do_not_see_each_other(attend):
    q, k, v = (drawn(9, 2, 6, seed=seed) for seed in range(3))
    before = whole(attend, q, k, v, Rows.causal((5, 4)))
    q[5:], k[5:], v[5:] = torch.nan, torch.inf, torch.nan
    after = whole(attend, q, k, v, Rows.causal((5, 4)))
    assert torch.equal(before[:5], after[:5]) and after[5:].isnan().all()


@FORMS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_extreme_scores_are_finite_in_low_precision(attend, dtype):
    """checklist 21: no query is ever without a key, so no softmax is of nothing."""
    q, k = (40 * drawn(6, 2, 8, seed=seed).to(dtype) for seed in range(2))
    v = drawn(6, 1, 8, seed=2).to(dtype)
    for rows, window in ((Rows.causal((1, 5)), None), (Rows.causal((6,)), 1), (Rows.shared_prefix([(0, 3, 3)]), None)):
        out = whole(attend, q, k[:, :1], v, rows, window)
        assert out.dtype == dtype and out.isfinite().all()


def test_a_windowed_decode_step_reads_only_its_window():
    ((look,),) = sight(Rows.causal((1,), (9,)), 4, CPU)
    assert (look.lo, look.hi, look.visible) == (6, 10, "all")
    ((look,),) = sight(Rows.causal((2,), (9,)), 4, CPU)
    assert (look.lo, look.hi, tuple(look.visible.shape)) == (6, 11, (2, 5))
