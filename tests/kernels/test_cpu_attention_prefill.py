"""The CPU's attention of many queries, by AMX, against float64 and against its plain form."""

import pytest
import torch
from test_single_row import numbers, threads  # noqa: F401  a fixture

from minivlm.kernels.cpu import attention_prefill
from minivlm.kernels.cpu.attention_prefill import DTYPES, attention, missing, plain_attention

pytestmark = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this kernel needs AMX")
# queries, keys, query heads, key heads, channels, window
CASES = {
    "one query": (1, 1, 1, 1, 16, None),
    "less than a block": (5, 5, 2, 1, 64, None),
    "one more than a block": (33, 33, 4, 2, 64, None),
    "behind cached keys": (33, 70, 4, 2, 64, None),
    "a window": (100, 100, 4, 4, 80, 20),
    "a window of one": (40, 40, 2, 2, 48, 1),
    "a window behind cached keys": (64, 300, 8, 2, 128, 100),
    "wide heads": (34, 34, 8, 1, 256, None),
    "more blocks than threads": (200, 200, 3, 3, 32, None),
}


def problem(queries: int, keys: int, heads: int, kv_heads: int, channels: int, window: int | None, dtype: torch.dtype):
    """q, k, v, lo, hi of the last queries of a row."""
    sizes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
    q, k, v = (numbers(*size, channels, dtype=dtype, seed=i) for i, size in enumerate(sizes))
    hi = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32)
    return q, k, v, torch.zeros_like(hi) if window is None else (hi - window).clamp(min=0), hi


def errors(arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the kernel and of the plain form."""
    expected = plain_attention(*(x.double() for x in arguments[:3]), *arguments[3:])
    return tuple((form(*arguments).double() - expected).norm() for form in (attention, plain_attention))


def test_it_can_run_here():
    assert [missing(dtype, 64) for dtype in DTYPES] == [None, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_as_near_the_truth_as_the_plain_form(case, dtype, threads):  # noqa: F811
    arguments = problem(*CASES[case], dtype)
    error, theirs = errors(arguments)
    assert error <= 2 * theirs + 4e-7 * arguments[0].numel() ** 0.5
    assert attention(*arguments).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_intervals_of_any_kind(dtype, threads):  # noqa: F811
    """As an encoder's, and such as none of our models has: each query's are drawn."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, _, _ = problem(70, 150, 4, 2, 64, None, dtype)
    lo = torch.randint(0, 150, (70,), generator=generator, dtype=torch.int32)
    hi = lo + 1 + (torch.rand(70, generator=generator) * (150 - lo)).int().clamp(max=149 - lo)
    for bounds in ((torch.zeros_like(lo), torch.full_like(hi, 150)), (lo, hi)):
        error, theirs = errors((q, k, v, *bounds))
        assert error <= 2 * theirs + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_larger_tensors(dtype):
    """As a cache's slots and joined projections are."""
    q, k, v, lo, hi = problem(40, 60, 4, 2, 32, None, dtype)
    joined = torch.randn(40, 9, 32).to(dtype)
    joined[:, 2:6] = q
    cache = torch.full((2, 3, 2, 80, 32), 7.0, dtype=dtype)
    cache[0, 1, :, :60], cache[1, 1, :, :60] = k.transpose(0, 1), v.transpose(0, 1)
    kept = (part[1].transpose(0, 1)[:60] for part in cache)
    assert torch.equal(attention(joined[:, 2:6], *kept, lo, hi), attention(q, k, v, lo, hi))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size(dtype):
    """Large ones leave one key, far smaller ones weigh nothing, and equal ones weigh the same."""
    q, k, v, lo, hi = problem(40, 40, 2, 1, 64, None, dtype)
    for factor in (0.0, 1e-3, 30.0, 1e4, 1e12, 1e25, 1e34):
        arguments = (q * factor).to(dtype), k, v, lo, hi
        error, theirs = errors(arguments)
        assert error <= 2 * theirs + 4e-7 * q.numel() ** 0.5 * v.abs().max()
    assert torch.equal(attention(q * 0, k, torch.ones_like(v), lo, hi), torch.ones_like(q))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_query_stays_broken_and_alone(dtype, broken):
    for channels in (48, 64):  # of 48 a tile is half full
        q, k, v, lo, hi = problem(70, 70, 2, 1, channels, None, dtype)
        expected = attention(q, k, v, lo, hi)
        q[40, 1, 3] = broken
        found = attention(q, k, v, lo, hi)
        assert not found[40, 1].isfinite().any()
        found[40, 1] = expected[40, 1]
        assert torch.equal(found, expected)


def test_what_a_key_does_not_see_it_does_not_feel():
    """Keys behind the last one seen, whatever they are."""
    q, k, v, lo, hi = problem(40, 100, 2, 1, 64, None, torch.float32)
    hi = hi - 60
    expected = attention(q, k, v, lo, hi)
    k[64:], v[64:] = torch.nan, torch.nan  # of blocks that are not visited
    k[40:64], v[40:64] = 1e4, -1e30
    assert torch.equal(attention(q, k, v, lo, hi), expected)


def test_wrong_kinds_are_refused():
    q, k, v, lo, hi = problem(40, 40, 2, 1, 64, None, torch.float32)
    for wrong in (
        (q.half(), k.half(), v.half(), lo, hi),
        (q, k, v[:39], lo, hi),
        (q, k[:, :, :48], v[:, :, :48], lo, hi),
        (q, k.double(), v, lo, hi),
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, lo, hi),
        (q, k, v, lo.long(), hi),
        (q, k, v, lo, hi[:39]),
        (q, k, v, hi, hi),
        (q, k, v, lo - 1, hi),
        (q, k, v, lo, hi + 1),
        (*problem(4, 4, 3, 2, 16, None, torch.float32),),
    ):
        with pytest.raises(ValueError, match="row kernels: found"):
            attention(*wrong)
    assert "there is none for torch.float16 and 64 channels" in missing(torch.float16, 64)
    assert "there is none for torch.float32 and 72 channels" in missing(torch.float32, 72)


def test_a_wrong_result_is_noticed(monkeypatch):
    monkeypatch.setattr(attention_prefill, "attention", lambda *arguments: attention(*arguments) * 1.01)
    assert "its result is wrong by" in missing.__wrapped__(torch.float32, 64)
