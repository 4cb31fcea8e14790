"""The CPU's kernels of a single row, compiled by Numba, against float64 and against their plain forms."""

import copy
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from minivlm.kernels.cpu import compiling, single_row
from minivlm.kernels.cpu.single_row import DTYPES, RowAttention, RowLinear
from minivlm.kernels.quantise import quantise_int8
from minivlm.ops.rope import rope_table

SIZES = [(1, 2), (2, 1), (14, 31), (16, 100), (18, 64), (666, 257)]  # outputs, inputs
EPS = 1e-5


@pytest.fixture(params=[1, 3])
def threads(request):
    """Three are more than some of the sizes have outputs, or key heads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def test_they_can_run_here():
    assert single_row.missing() is None


# ---- products


def linear_of(outputs: int, inputs: int, dtype: torch.dtype, form: str, normed: bool, swiglu: bool) -> RowLinear:
    weight, scale = numbers(outputs, inputs, dtype=dtype), None
    if form == "int8":
        weight, scale = quantise_int8(weight)
    norm = (1 + 0.3 * numbers(inputs)).to(dtype) if normed else None
    return RowLinear(weight, scale, norm, EPS, swiglu, dtype)


def exact(linear: RowLinear, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """In float64, but for the steps of x, which are part of what int8 means: those of the plain form."""
    weight, inputs = linear.weight.double(), x.double()
    if linear.norm is not None:
        inputs = inputs * torch.rsqrt(inputs.square().mean() + EPS) * linear.norm.double()
    if linear.scale is not None:
        if linear.norm is not None:
            wide = x.float() * torch.rsqrt(x.float().square().mean() + EPS)
            inputs = (wide.to(x.dtype) * linear.norm).double()
        step = inputs.float().abs().max() / 127
        inputs = (inputs.float() / step).round().double() * step.double()
        weight = weight * linear.scale.double()[:, None]
    product = weight @ inputs
    if linear.swiglu:
        gate, up = product.chunk(2)
        product = silu(gate) * up
    return product if residual is None else residual.double() + product


@pytest.mark.parametrize("form", ["stored", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_product_with_all_that_surrounds_it(sizes, dtype, form, threads):
    """At most twice as wrong as the plain form in the same type, and nothing beside the result is written."""
    for normed, swiglu, added in ((0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)):
        if swiglu and sizes[0] % 2:
            continue
        linear = linear_of(*sizes, dtype, form, bool(normed), bool(swiglu))
        x, residual = numbers(sizes[1], dtype=dtype), numbers(linear.outputs, dtype=dtype) if added else None
        expected = exact(linear, x, residual)
        found, plain = linear(x, residual), linear.plain(x, residual)
        assert found.dtype == dtype and found.shape == expected.shape
        error, theirs = ((y.double() - expected).norm() for y in (found, plain))
        # The steps of int8 are those of the plain form exactly, so its own rounding of their size is not seen.
        least = torch.finfo(dtype).eps * expected.norm() * (4 if form == "int8" else 1)
        assert error <= 2 * theirs + least, (normed, swiglu, added)
        assert torch.equal(x, numbers(sizes[1], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_sums_are_exact(dtype):
    """So what comes out is the plain form's, which sums in float64, but for the last bit of three factors' product."""
    weight = torch.randint(-127, 128, (40, 9000), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    linear = RowLinear(weight, torch.full((40,), 2.0**-9), None, 0, False, dtype)
    x = numbers(9000, dtype=dtype)
    x[17] = 127 / 16  # a step of 2^-4, and every number as many of them as it says
    x = (x * 16).round() / 16
    steps = (x.double() * 16).long()
    expected = (weight.long() @ steps).double() * 2.0**-13
    assert torch.equal(linear(x), expected.to(dtype))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("form", ["stored", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_what_is_not_a_number(dtype, form, normed):
    """A broken row must not come out whole: who samples would not notice."""
    for swiglu in (False, True):
        linear = linear_of(18, 64, dtype, form, normed, swiglu)
        assert not linear(torch.zeros(64, dtype=dtype)).any()
        for broken in (torch.nan, torch.inf, -torch.inf):
            x = numbers(64, dtype=dtype)
            x[5] = broken
            found = linear(x).isfinite()
            assert torch.equal(found, linear.plain(x).isfinite()) or not found.any()
            assert torch.isinf(x).any() or not found.any()
            assert form == "stored" or not found.any()


def test_an_epsilon_too_small_for_float32():
    linear = RowLinear(numbers(18, 64), None, torch.ones(64), 1e-50, False, torch.float32)
    assert linear(torch.zeros(64)).isnan().all()  # 0 / 0, as in the plain form
    assert linear.plain(torch.zeros(64)).isnan().all()


@pytest.mark.parametrize("gate", [-torch.inf, torch.inf, -3e38, -1e30, -100, -87, -20, 100, 1e30])
def test_swiglu_of_large_gates(gate):
    linear = RowLinear(torch.tensor([[gate], [1.0]]), None, None, 0, True, torch.float32)
    torch.testing.assert_close(linear(torch.ones(1)), linear.plain(torch.ones(1)), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_weights_that_move_are_followed():
    """No address outlives what lies there: a copy reads its own weights, and so does a process that gets one."""
    linear, x = linear_of(18, 64, torch.float32, "stored", False, False), numbers(64)
    expected = linear(x)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        linear.weight.zero_()
        assert torch.equal(other(x), expected)
        linear.weight.copy_(other.weight)
    linear.weight.share_memory_()
    assert torch.equal(linear(x), expected)


def test_rows_of_a_strided_or_wrong_kind_are_refused():
    linear = linear_of(18, 64, torch.bfloat16, "stored", True, False)
    x = numbers(64, dtype=torch.bfloat16)
    for wrong in (x.float(), x[:63], x.repeat(2, 1), numbers(128, dtype=torch.bfloat16)[::2], x.to("meta")):
        with pytest.raises(
            ValueError, match=r"row kernels: found .+ expected contiguous torch.bfloat16 \[(1, )?64\] on cpu"
        ):
            linear(wrong)
    with pytest.raises(ValueError, match=r"expected contiguous torch.bfloat16 \[18\] on cpu"):
        linear(x, x)
    weight = numbers(18, 64)
    with pytest.raises(ValueError, match=r"a weight of torch.float32 for torch.bfloat16"):
        RowLinear(weight, None, None, 0, False, torch.bfloat16)
    with pytest.raises(ValueError, match=r"a weight of torch.int8 and a scale of None"):
        RowLinear(weight.to(torch.int8), None, None, 0, False, torch.float32)
    with pytest.raises(ValueError, match=r"strides \(1, 18\), expected contiguous"):
        RowLinear(weight.t().contiguous().t(), None, None, 0, False, torch.float32)
    with pytest.raises(ValueError, match="swiglu of 17 rows"):
        RowLinear(weight[:17], None, None, 0, True, torch.float32)
    with pytest.raises(ValueError, match="int8 of 133145 inputs"):
        RowLinear(torch.zeros(1, 133145, dtype=torch.int8), torch.ones(1), None, 0, False, torch.float32)


def test_calls_from_several_threads_at_once(threads):
    linear = linear_of(666, 257, torch.bfloat16, "stored", True, True)
    rows = [numbers(257, dtype=torch.bfloat16, seed=seed) for seed in range(40)]
    alone = [linear(row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(linear, rows))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# ---- attention

# query heads, key heads, channels
HEADS = [(4, 4, 8), (4, 2, 10), (6, 2, 80), (8, 1, 64), (8, 8, 128)]
CAPACITY = 70


def attention_of(heads: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> RowAttention:
    """Of two layers and three slots whose unwritten and foreign positions are not numbers."""
    keys, values = (torch.full((2, 3, heads[1], CAPACITY, heads[2]), torch.nan, dtype=dtype) for _ in range(2))
    cos, sin = rope_table(torch.arange(CAPACITY + 3), heads[2], 1e4, dtype)
    sin = torch.cat((-sin[..., : heads[2] // 2], sin[..., heads[2] // 2 :]), dim=-1)
    return RowAttention(heads[0], keys, values, cos, sin, window)


def fill(attention: RowAttention, layer: int, slot: int, positions: range) -> None:
    for cache, seed in ((attention.keys, 1), (attention.values, 2)):
        seen = cache[layer, slot, :, positions.start : positions.stop]
        seen.copy_(numbers(*seen.shape, dtype=cache.dtype, seed=seed))


@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_reads_what_is_visible_and_writes_one_position(heads, dtype, window, threads):
    attention = attention_of(heads, dtype, window)
    for position in (0, 1, 30, 31, 32, 63, 64, CAPACITY - 1):
        attention.keys.fill_(torch.nan), attention.values.fill_(torch.nan)
        fill(attention, 1, 2, range(0 if window is None else max(0, position + 1 - window), position))
        kept = attention.keys.clone(), attention.values.clone()
        qkv = numbers((heads[0] + 2 * heads[1]) * heads[2], dtype=dtype, seed=position)
        found = attention(1, qkv, 2, position)
        written = attention.keys.clone(), attention.values.clone()
        attention.keys.copy_(kept[0]), attention.values.copy_(kept[1])
        plain = attention.plain(1, qkv, 2, position)
        for ours, theirs in zip(written, (attention.keys, attention.values), strict=True):
            assert torch.equal(ours.nan_to_num(7e4), theirs.nan_to_num(7e4)), position
        expected = by_hand(attention, qkv, position)
        error, theirs = ((y.double() - expected).norm() for y in (found, plain))
        assert error <= 2 * theirs + torch.finfo(dtype).eps * expected.norm(), position


def by_hand(attention: RowAttention, qkv: torch.Tensor, position: int) -> torch.Tensor:
    """In float64, over what the cache of layer 1 and slot 2 holds, with the queries as the plain form rounds them."""
    kv_heads, channels = attention.keys.shape[2], attention.keys.shape[4]
    q = qkv.view(-1, channels)[: attention.heads]
    q = q * attention.cos[position] + q.roll(channels // 2, -1) * attention.sin[position]
    lo = 0 if attention.window is None else max(0, position + 1 - attention.window)
    keys, values = (cache[1, 2, :, lo : position + 1].double() for cache in (attention.keys, attention.values))
    grouped = q.double().view(kv_heads, -1, channels)  # [K, H / K, C]
    weights = torch.softmax(grouped @ keys.transpose(1, 2) * channels**-0.5, dim=-1)
    return (weights @ values).flatten()


def test_large_scores_are_neither_infinite_nor_lost():
    """The likeliest key takes all, wherever it lies."""
    attention = attention_of((4, 2, 10), torch.float32, None)
    for likeliest in (0, 31, 32, 49):
        fill(attention, 1, 2, range(50))
        attention.keys[1, 2, :, likeliest] *= 1000
        found = attention(1, numbers(80), 2, 50)
        torch.testing.assert_close(found.double(), by_hand(attention, numbers(80), 50), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS[1:4])
def test_rows_attend_as_each_alone(heads, dtype, threads):
    """Bit for bit, each to its own slot and position; one of them is not a number."""
    attention = attention_of(heads, dtype, None)
    places = [(2, 40), (0, 3), (1, 69)]
    for slot, position in places:
        fill(attention, 1, slot, range(position))
    attention.keys[1, 0, 0, 1] = attention.values[1, 0, 0, 2] = torch.nan
    kept = attention.keys.clone(), attention.values.clone()
    qkv = numbers(3, (heads[0] + 2 * heads[1]) * heads[2], dtype=dtype)
    together = attention.at(1, qkv, torch.tensor([attention.place(*place) for place in places]))
    written = attention.keys.clone(), attention.values.clone()
    attention.keys.copy_(kept[0]), attention.values.copy_(kept[1])
    alone = torch.stack([attention(1, row, *place) for row, place in zip(qkv, places, strict=True)])
    assert torch.equal(together.nan_to_num(7e4), alone.nan_to_num(7e4))
    assert together.isnan().any(-1).tolist() == [False, True, False]
    for ours, theirs in zip(written, (attention.keys, attention.values), strict=True):
        assert torch.equal(ours.nan_to_num(7e4), theirs.nan_to_num(7e4))


def test_what_does_not_fit_is_refused():
    attention = attention_of((4, 2, 10), torch.float32, None)
    for slot, position in ((0, CAPACITY), (0, -1), (3, 0), (-1, 0)):
        found = f"slot {slot}, position {position} in a cache of [3, 70] of them"
        with pytest.raises(ValueError, match=re.escape(found)):
            attention(0, numbers(80), slot, position)
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"layer {layer} of 2"):
            attention(layer, numbers(80), 0, 0)
    with pytest.raises(ValueError, match=r"expected contiguous torch.int64 \[2, 3\] on cpu"):
        attention.at(0, numbers(2, 80), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected contiguous torch.float32 \[1, 80\] on cpu"):
        attention(0, numbers(79), 0, 0)
    keys, table = numbers(1, 1, 2, 8, 10), numbers(8, 1, 10)
    with pytest.raises(ValueError, match="3 query heads for 2 key heads"):
        RowAttention(3, keys, keys, table, table, None)
    with pytest.raises(ValueError, match="angles of 7 positions for 8"):
        RowAttention(4, keys, keys, table[:7], table[:7], None)
    with pytest.raises(ValueError, match=r"expected contiguous torch.float32 \[1, 1, 2, 8, 10\]"):
        RowAttention(4, keys, keys.half(), table, table, None)


# ---- what they are made of


def test_the_exponential_and_the_roundings():
    """e^x over all that float32 holds; every float16 and bfloat16 there and back, and random bits to both."""
    import numpy as np
    from numba import njit

    from minivlm.kernels.cpu.compiling import narrow, wide
    from minivlm.kernels.cpu.single_row_numba import exp

    @njit
    def each(x, like, exps, there, back):
        for i in range(len(x)):
            exps[i] = exp(x[i])
            there[i] = narrow(x[i], like)
            back[i] = wide(there[i])

    x = (
        torch.randint(-(2**31), 2**31 - 1, (10**6,), generator=torch.Generator().manual_seed(0))
        .int()
        .view(torch.float32)
    )
    x = torch.cat((x, torch.linspace(-90, 90, 10**6), torch.arange(2**16).short().view(torch.bfloat16).float()))
    x = torch.cat((x, torch.arange(2**16).short().view(torch.float16).float()))
    for dtype, stored in ((torch.float16, np.int16), (torch.bfloat16, np.uint16)):
        there, back, exps = np.empty(len(x), stored), np.empty(len(x), np.float32), np.empty(len(x), np.float32)
        each(x.numpy(), there[:0], exps, there, back)
        found = torch.from_numpy(there.view(np.int16)).view(dtype)
        assert torch.equal(found.nan_to_num(7), x.to(dtype).nan_to_num(7))
        assert torch.equal(torch.from_numpy(back).nan_to_num(7), x.to(dtype).float().nan_to_num(7))
        assert torch.equal(torch.from_numpy(exps).isnan(), x.isnan())
    inside = (x >= -87) & (x <= 88)
    exact = x[inside].double().exp()
    assert ((torch.from_numpy(exps)[inside] - exact) / exact).abs().max() <= 2e-7
    assert (torch.from_numpy(exps)[x < -87] < 1e-37).all()


def test_what_is_compiled_is_kept_on_disk(tmp_path):
    """A second process compiles nothing."""
    code = (
        "import torch; from minivlm.kernels.cpu import single_row_numba as made\n"
        "made.linear_kernel(torch.bfloat16, True); made.attention_kernel(torch.bfloat16, 10)\n"
        "from minivlm.kernels.cpu.compiling import _count_threads\n"
        "print(_count_threads._cache._impl.locator.get_cache_path())"
    )

    def run() -> set[tuple[str, int]]:
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        return {(path.name, path.stat().st_mtime_ns) for path in Path(output.strip()).glob("single_row_numba*")}

    assert run() == run() != set()


TOLD = """
import torch
from minivlm.kernels.cpu import compiling, single_row
print(single_row.missing_linear(torch.float32, False), single_row.missing_attention(torch.float32, 10), sep="|")
"""


def test_what_was_kept_and_is_damaged_is_not_used(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kept")}

    def told() -> list[str]:
        command = [sys.executable, "-c", TOLD]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split("|")

    assert [words.strip() for words in told()] == ["None", "None"]
    linear = next((tmp_path / "kept").rglob("*linear*.nbc"))
    for damaged in (linear.read_bytes()[:-1000], b""):
        linear.write_bytes(damaged)
        found = told()
        assert found[0] != "None" and found[1].strip() == "None"


def test_without_numba_or_without_its_threads_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(single_row, "find_spec", lambda name: None)
    assert single_row.missing.__wrapped__() == "Numba is not installed, expected `pip install 'minivlm[cpu]'`"
    monkeypatch.undo()
    monkeypatch.setattr(compiling, "answering_threads", lambda: 7)
    assert "7 threads answer, expected" in single_row.missing.__wrapped__()

    def refuse() -> int:
        raise RuntimeError("cannot cache function:\n no locator")

    monkeypatch.setattr(compiling, "answering_threads", refuse)
    assert single_row.missing.__wrapped__() == "RuntimeError: cannot cache function: no locator"
