"""The decode kernels against their twin: splits, lengths, windows, grouped heads, several queries, dtypes."""

import random

import pytest
import torch
from problems import (
    Sight,
    causal,
    check_kernel,
    drawn,
    poisoned_memory,
    problem,
    scattered,
)

from minivlm.kernels.attention_decode import BLOCKS, JOINED, attention_decode, plain_attention_decode, splits_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (16, 64, 72, 80, 96, 104, 112, 128, 256)


def arguments_of(rows: list[list[Sight]], heads: int, kv_heads: int, channels: int, splits: int, spread: float = 1.0):
    """The arguments of `attention_decode` as a function of device and dtype; prefixes are left out."""
    rows = [[(lo, hi, 0) for lo, hi, _ in row] for row in rows]
    given = problem(rows, heads, kv_heads, channels, spread=spread)

    def arguments(device: torch.device, dtype: torch.dtype) -> tuple:
        there = given.to(device, dtype)
        return there.q, there.k, there.v, there.lo, there.hi, there.slots, splits

    return arguments


def run(arguments, device: torch.device, dtype: torch.dtype) -> None:
    check_kernel(attention_decode, plain_attention_decode, arguments, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2, 5, 18])
def test_splits(splits, dtype, device):
    """Rows of very different lengths share the number of splits; where there are more than blocks, some are empty."""
    rows = [causal(1, start) for start in (0, 300, 64)]
    run(arguments_of(rows, 2, 1, 64, splits), device, dtype)


def test_more_splits_than_are_joined_at_once(device):
    """None of them empty; of 16 heads some have their peak in the last ones."""
    splits, block = JOINED + 5, BLOCKS[4, 128].n
    run(arguments_of([causal(1, splits * block - 1)], 16, 1, 128, splits, spread=2.0), device, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", WIDTHS)
def test_widths(channels, dtype, device):
    run(arguments_of([causal(1, 140), causal(1, 33)], 2, 1, channels, 3), device, dtype)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 3), (8, 1), (14, 2), (32, 1), (64, 1)])
@pytest.mark.parametrize("splits", [1, 3])
def test_grouped_heads(heads, kv_heads, splits, device):
    run(arguments_of([causal(1, 200)], heads, kv_heads, 64, splits), device, torch.bfloat16)


@pytest.mark.parametrize("n, heads, kv_heads", [(2, 8, 2), (5, 6, 2), (8, 8, 1), (3, 1, 1)])
@pytest.mark.parametrize("window", [None, 100])
def test_several_queries(n, heads, kv_heads, window, device):
    rows = [causal(n, start, window) for start in (0, 126, 250)]
    run(arguments_of(rows, heads, kv_heads, 64, 3), device, torch.float16)


@pytest.mark.parametrize("keys", [1, 2, 63, 64, 65, 127, 128, 129, 256, 257])
@pytest.mark.parametrize("splits", [1, 2])
def test_lengths_at_the_edges_of_blocks(keys, splits, device):
    run(arguments_of([causal(1, keys - 1)], 2, 1, 128, splits), device, torch.float16)


@pytest.mark.parametrize("seed", range(6))
def test_any_intervals(seed, device):
    draw = random.Random(seed)
    n = draw.randint(1, 8)
    rows = [drawn(n, 200, 50 * seed + row) for row in range(3)]
    run(arguments_of(rows, 4, 2, 16, draw.randint(1, 6)), device, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_great_scores(dtype, device):
    """The greatest score of one split is far from another's."""
    run(arguments_of([causal(1, 300)], 2, 1, 64, 4, spread=30.0), device, dtype)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_query_that_sees_nothing_gives_zeros(splits, device):
    """checklist 21"""
    arguments = arguments_of([[(0, 3, 0), (2, 2, 0)], [(3, 1, 0), (0, 0, 0)]], 2, 1, 64, splits)
    with poisoned_memory():
        found = attention_decode(*arguments(device, torch.bfloat16))
    assert not found[1:].any() and found[0].any(dim=-1).all()


def test_any_strides(device):
    arguments = arguments_of([causal(2, 90)] * 2, 4, 2, 24, 2)

    def moved(device, dtype):
        q, k, *others = arguments(device, dtype)
        return scattered(q), scattered(k), *others

    run(moved, device, torch.float32)


@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_reaches_the_result(where, device):
    """Of one key in one split of three, to the row that sees it, and to no other."""
    q, k, v, *others = arguments_of([causal(1, 200), causal(1, 200)], 2, 1, 64, 3)(device, torch.float16)
    {"k": k, "v": v}[where][others[2][0], 0, 150, 3 if where == "k" else slice(None)] = torch.nan
    found = attention_decode(q, k, v, *others)
    assert found[0].isnan().all() and found[1].isfinite().all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_serves_every_length():
    device, dtype = torch.device("cuda"), torch.bfloat16
    q, k, v, lo, hi, slots, splits = arguments_of([causal(1, 2999)], 32, 8, 128, 16)(device, dtype)
    attention_decode(q, k, v, lo, hi, slots, splits)  # compiles outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_decode(q, k, v, lo, hi, slots, splits)
    for keys in (3000, 1, 700, 64):
        hi.fill_(keys)
        graph.replay()
        assert torch.equal(captured, attention_decode(q, k, v, lo, hi, slots, splits))


def test_registration(device):
    """torch.compile and fake tensors know the operator's shapes, and that it changes none of its arguments."""
    arguments = arguments_of([causal(2, 40)] * 2, 2, 1, 16, 2)(device, torch.float32)
    torch.library.opcheck(attention_decode, arguments)
    compiled = torch.compile(lambda *x: attention_decode(*x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), attention_decode(*arguments) + 1)


def test_no_rows(device):
    q, k, v, lo, hi, slots, splits = arguments_of([causal(1)], 2, 1, 16, 2)(device, torch.float32)
    assert attention_decode(q[:0], k, v, lo[:0], hi[:0], slots[:0], splits).shape == (0, 2, 16)


@pytest.mark.parametrize(
    "rows, heads, splits, says",
    [
        ([causal(1)], 2, 0, "0 splits"),
        ([causal(2), causal(1)], 2, 1, "3 queries in 2 rows"),
        ([causal(9)], 8, 1, "9 queries of 8 heads"),
    ],
)
def test_wrong_arguments_are_errors(rows, heads, splits, says, device):
    with pytest.raises(ValueError, match=says):
        attention_decode(*arguments_of(rows, heads, 1, 16, splits)(device, torch.float32))


def test_every_dtype_and_width_has_its_blocks():
    assert set(BLOCKS) == {(dtype.itemsize, width) for dtype in DTYPES for width in (64, 128, 256)}


def test_splits_fill_the_chip_and_no_more():
    assert splits_for(rows=1, kv_heads=8, keys=3000, processors=132) == 16
    assert splits_for(rows=1, kv_heads=8, keys=300, processors=132) == 4  # no run is under 64 keys
    assert splits_for(rows=32, kv_heads=8, keys=3000, processors=132) == 1
    assert splits_for(rows=1, kv_heads=32, keys=10, processors=132) == 1
