"""The prefill kernel against its twin: what queries see, shapes, strides, lengths at the edges of blocks, dtypes."""

import random

import pytest
import torch
import triton
import triton.language as tl
from problems import (
    Problem,
    causal,
    check_kernel,
    drawn,
    everything,
    open_prefix,
    poisoned_memory,
    problem,
    scattered,
    segments,
    values,
)

from minivlm.kernels.attention_prefill import BLOCKS, _plan, attention_prefill, plain_attention_prefill

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (16, 64, 72, 80, 96, 104, 112, 128, 256)


def run(given: Problem, device: torch.device, dtype: torch.dtype) -> None:
    check_kernel(attention_prefill, plain_attention_prefill, given.arguments, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows",
    [
        [causal(150), causal(1), causal(70, start=131)],
        [causal(200, window=70), causal(1, start=300, window=128), causal(130, start=65, window=1)],
        [everything(145), open_prefix(150, 75)],
        [segments(130, 20, 1, 67), segments(0, 30, 3), segments(64, 64)],
        [drawn(140, 200, 0), drawn(1, 5, 1), [(3, 3, 0)] * 5],
    ],
    ids=["causal", "window", "bidirectional", "segments", "drawn"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["cache", "packed"])
def test_what_queries_see(rows, packed, dtype, device):
    run(problem(rows, 2, 1, 64, packed), device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", WIDTHS)
def test_widths(channels, dtype, device):
    run(problem([causal(40, start=37), drawn(7, 50, 2)], 2, 1, channels), device, dtype)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 3), (8, 1), (14, 2), (16, 1)])
def test_grouped_heads(heads, kv_heads, device):
    run(problem([causal(33), causal(2, start=9)], heads, kv_heads, 64), device, torch.float16)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 128, 129, 257])
@pytest.mark.parametrize("form", [causal, everything], ids=["causal", "bidirectional"])
def test_lengths_at_the_edges_of_blocks(form, n, device):
    run(problem([form(n)], 1, 1, 64), device, torch.float16)


@pytest.mark.parametrize("start", [1, 62, 63, 64, 65, 128, 190])
def test_chunks_at_the_edges_of_blocks(start, device):
    """A prompt's later chunk begins anywhere in a block of keys."""
    run(problem([causal(66, start)], 1, 1, 64), device, torch.float16)


@pytest.mark.parametrize("seed", range(12))
def test_any_intervals(seed, device):
    """Small blocks, as float32 has them, so that drawn intervals meet every case of masked and open blocks."""
    rows = [drawn(70, 150, 100 + seed), segments(3 * seed, 40, seed), [(lo, lo + 90, 5 * seed) for lo in range(64)]]
    run(problem(rows, 1, 1, 16, packed=seed % 2 == 1), device, torch.float32)


@triton.jit
def _planned(LO, HI, PREFIXES, OUT, n, LANES: tl.constexpr, BLOCK_N: tl.constexpr):
    i = tl.arange(0, LANES)
    sights = tl.load(LO + i, i < n, 0), tl.load(HI + i, i < n, 0), tl.load(PREFIXES + i, i < n, 0)
    plan = _plan(sights[0], sights[1], sights[2], i < n, BLOCK_N, True)
    for k in tl.static_range(7):
        tl.store(OUT + k, plan[k])


@pytest.mark.parametrize("seed", range(40))
def test_only_blocks_that_some_query_does_not_see_wholly_are_masked(seed, device):
    """And every visible key is in one block, with or without a mask."""
    draw = random.Random(seed)
    forms = (
        causal(30, seed),
        causal(30, seed, window=24),
        segments(seed, 9, 20),
        everything(seed + 1),
        drawn(9, 60, seed),
    )
    sights = draw.choice(forms)[-draw.randint(1, 32) :]
    columns = torch.tensor(sights, dtype=torch.int32, device=device).T.contiguous()
    found = torch.zeros(7, dtype=torch.int32, device=device)
    _planned[(1,)](*columns, found, len(sights), LANES=32, BLOCK_N=8)
    first, end, blocks, opens, closes, prefix_blocks, prefix_open = found.tolist()
    visits = [(8 * i, i >= prefix_open) for i in range(prefix_blocks)]
    visits += [(first + 8 * i, not opens <= i < closes) for i in range(blocks)]
    sees = [{j for j in range(200) if lo <= j < hi or j < prefix} for lo, hi, prefix in sights]
    keys = [j for start, _ in visits for j in range(start, start + 8)]
    assert len(keys) == len(set(keys)) and set.union(*sees) <= {j for j in keys if j < end}
    for start, masked in visits:
        block = set(range(start, start + 8))
        if start < 8 * prefix_blocks:  # an interval that begins inside a prefix may complete a block; it stays masked
            assert masked != all(max(block) < prefix for _, _, prefix in sights)
        else:
            assert masked != all(block <= seen for seen in sees)


@pytest.mark.parametrize("dtype", DTYPES)
def test_great_scores(dtype, device):
    """Scores in the hundreds, where a softmax without its maximum subtracted overflows."""
    run(problem([causal(80, start=20)], 2, 2, 64, spread=30.0), device, dtype)


def test_a_query_that_sees_nothing_gives_zeros(device):
    """checklist 21"""
    given = problem([[(0, 3, 0), (2, 2, 0), (3, 1, 0), (0, 1, 0)], [(4, 4, 0)] * 3], 2, 1, 64)
    for dtype in DTYPES:
        with poisoned_memory():
            found = attention_prefill(*given.arguments(device, dtype))
        assert not found[[1, 2, 4, 5, 6]].any()
        assert found[[0, 3]].any(dim=-1).all()


def test_any_strides(device):
    """Axes in reverse order of memory, nothing adjacent, and keys laid out unlike values."""
    given = problem([causal(50, start=10)], 2, 1, 24)

    def arguments(device, dtype):
        q, k, *others = given.arguments(device, dtype)
        return scattered(q), scattered(k), *others

    check_kernel(attention_prefill, plain_attention_prefill, arguments, device, torch.float32)


def test_an_encoders_patches(device):
    """[N, H, P, C], as the ViT has them, are N packed rows of P; every one of the 577 patches sees all."""
    tiles, heads, patches, channels = 1, 2, 577, 64
    q, k, v = (values(tiles, patches, heads, channels, seed=i).half().to(device).transpose(1, 2) for i in range(3))
    ends = torch.full((tiles * patches,), patches, dtype=torch.int32, device=device)
    offsets = torch.arange(tiles + 1, dtype=torch.int32, device=device) * patches
    slots = torch.arange(tiles, dtype=torch.int32, device=device)
    tables = (torch.zeros_like(ends), ends, None, offsets, slots, torch.zeros_like(slots), patches)
    with poisoned_memory():
        found = attention_prefill(q.transpose(1, 2).flatten(0, 1), k, v, *tables)
    found = found.unflatten(0, (tiles, patches)).transpose(1, 2).double()
    q, k, v = (x.double() for x in (q, k, v))
    exact = torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v
    assert (found - exact).abs().max() < 2**-11 * exact.abs().max()


def test_nan_in_a_query_reaches_its_own_result_only(device):
    given = problem([causal(70)], 1, 1, 64)
    given.q[11] = torch.nan
    found = attention_prefill(*given.arguments(device, torch.float16))
    assert found[11].isnan().all() and found.isnan().any(dim=-1).sum() == 1


def test_no_queries(device):
    given = problem([causal(3)], 2, 1, 16).to(device, torch.float32)
    nothing = given.lo[:0]
    tables = (nothing, nothing, None, given.offsets * 0, given.slots, given.origins, 0)
    assert attention_prefill(given.q[:0], given.k, given.v, *tables).shape == (0, 2, 16)


def test_registration(device):
    """torch.compile and fake tensors know the operator's shapes, and that it changes none of its arguments."""
    given = problem([causal(5), segments(2, 3, 1)], 2, 1, 16).to(device, torch.float32)
    torch.library.opcheck(attention_prefill, tuple(vars(given).values()))
    compiled = torch.compile(lambda *x: attention_prefill(*x) + 1, fullgraph=True, backend="aot_eager")
    arguments = tuple(vars(given).values())
    assert torch.equal(compiled(*arguments), attention_prefill(*arguments) + 1)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"q": lambda x: x.double()}, "float64"),
        ({"k": lambda x: x.half()}, "float16"),
        ({"k": lambda x: x[..., :8]}, "[slots, K, T, C]"),
        ({"lo": lambda x: x.long()}, "int64"),
        ({"hi": lambda x: x[:3]}, "3 queries"),
        ({"offsets": lambda x: x[:1]}, "1 offsets"),
        ({name: lambda x: x.new_zeros(*x.shape[:-1], 272) for name in "qkv"}, "272 channels"),
    ],
)
def test_wrong_arguments_are_errors(change, says, device):
    given = vars(problem([causal(5)], 2, 1, 16).to(device, torch.float32)).copy()
    for name, spoil in change.items():
        given[name] = spoil(given[name])
    with pytest.raises(ValueError, match=says.replace("[", r"\[")) as caught:
        attention_prefill(*given.values())
    assert "\n" not in str(caught.value)


def test_every_dtype_and_width_has_its_blocks():
    assert set(BLOCKS) == {(dtype.itemsize, width) for dtype in DTYPES for width in (64, 128, 256)}
