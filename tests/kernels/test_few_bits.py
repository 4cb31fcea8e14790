"""The CPU's products with weights in few bits, against float64 and against their plain forms; and recordings."""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_compact import normal
from test_single_row import EPS, exact, numbers, threads  # noqa: F401  a fixture
from torch.nn.functional import silu

from minivlm.kernels.cpu import few_bits, single_row
from minivlm.kernels.cpu.compact import Compact
from minivlm.kernels.cpu.few_bits import FewBitsLinear, missing, missing_tiles, widened_int4
from minivlm.kernels.cpu.recording import Recording
from minivlm.kernels.cpu.single_row import DTYPES, RowAttention
from minivlm.kernels.quantise import dequantise_int4, quantise_int4, quantise_int8

pytestmark = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="these kernels need AVX-512")
FORMS = [(dtype, form) for dtype in DTYPES for form in ("compact", "int8", "int4")]
FORMS.remove((torch.float16, "compact"))
SIZES = [(2, 128), (14, 256), (666, 384)]  # outputs, inputs
TILES = pytest.param(True, marks=pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs AMX"))
by_tiles = pytest.mark.parametrize("by_tiles", [False, TILES])


def linear_of(outputs: int, inputs: int, dtype: torch.dtype, form: str, normed: bool, swiglu: bool) -> FewBitsLinear:
    weight, scale = numbers(outputs, inputs, dtype=dtype), None
    weight[outputs // 2, 3] = 2.0**-30  # which a compact one keeps whole
    if form == "compact":
        weight = Compact.of(weight)
    elif form == "int8":
        weight, scale = quantise_int8(weight)
    else:
        weight, scale = quantise_int4(weight)
        scale = scale.float()
    norm = (1 + 0.3 * numbers(inputs)).to(dtype) if normed else None
    return FewBitsLinear(weight, scale, norm, EPS, swiglu, dtype)


def by_hand(linear: FewBitsLinear, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """One row in float64; by int8 with the steps of x that the plain form takes."""
    if linear.form == "int8":
        return exact(linear, x, residual)
    weight = linear.weight.plain() if linear.form == "compact" else dequantise_int4(linear.weight, linear.scale)
    x = x.double()
    if linear.norm is not None:
        x = x * torch.rsqrt(x.square().mean() + EPS) * linear.norm.double()
    product = weight.double() @ x
    if linear.swiglu:
        gate, up = product.chunk(2)
        product = silu(gate) * up
    return product if residual is None else residual.double() + product


def test_they_can_be_had_here():
    assert [missing(dtype, form) for dtype, form in FORMS] == [None] * len(FORMS)
    tiles = [missing_tiles(dtype, form) for dtype, form in FORMS]
    assert (tiles == [None] * len(FORMS)) is torch.cpu._is_amx_tile_supported(), tiles


@by_tiles
@pytest.mark.parametrize(("dtype", "form"), FORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_product_with_all_that_surrounds_it(sizes, dtype, form, by_tiles, threads):  # noqa: F811
    """At most twice as wrong as the plain form in the same type, every number of rows, and x stays as it was."""
    cases = (0, 0, 0, (*range(1, 10), 16)), (1, 0, 0, (1, 3)), (1, 1, 0, (1, 2)), (0, 1, 1, (1, 5, 11))
    if by_tiles:
        cases = (0, 0, 0, (1, 15, 16, 17, 48)), (1, 0, 0, (3, 32)), (1, 1, 0, (2, 33)), (0, 1, 1, (5, 70))
    for normed, swiglu, added, counts in cases:
        linear = linear_of(*sizes, dtype, form, bool(normed), bool(swiglu))
        for rows in counts:
            x = numbers(rows, sizes[1], dtype=dtype)
            residual = numbers(rows, linear.outputs, dtype=dtype) if added else None
            before = x.clone()
            found, plain = linear(x, residual, by_tiles), linear.plain(x, residual)
            rest = [None] * rows if residual is None else residual
            expected = torch.stack([by_hand(linear, row, r) for row, r in zip(x, rest, strict=True)])
            assert found.dtype == dtype and found.shape == expected.shape and torch.equal(x, before)
            error, theirs = ((y.double() - expected).norm() for y in (found, plain))
            # Steps of x and scales are those of the plain form exactly, so what it rounds there is not seen.
            least = torch.finfo(dtype).eps * expected.norm() * (1 if form == "compact" else 4)
            least *= 1 if sizes[0] > 2 or not by_tiles else 2  # of two numbers chance decides
            assert error <= 2 * theirs + least, (normed, swiglu, added, rows)
            alone = linear(x[0], None if residual is None else residual[0])
            assert (alone - found[0]).double().norm() <= 8 * torch.finfo(dtype).eps * expected[0].norm()


@pytest.mark.parametrize(("dtype", "form"), FORMS)
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs AMX")
def test_sums_that_are_finished_beside_later_products(dtype, form, threads):  # noqa: F811
    """Of 32 rows and many inputs; of 31 they are finished alone, to the same bits."""
    for normed, swiglu, added in (0, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1):
        linear = linear_of(1060, 1280, dtype, form, bool(normed), bool(swiglu))
        x = numbers(63, 1280, dtype=dtype)
        residual = numbers(63, linear.outputs, dtype=dtype) if added else None
        found, alone = linear(x, residual), linear(x[:31], None if residual is None else residual[:31])
        assert torch.equal(found[:31], alone)
        expected = torch.stack([by_hand(linear, x[i], None if residual is None else residual[i]) for i in range(63)])
        error, theirs = ((y.double() - expected).norm() for y in (found, linear.plain(x, residual)))
        # By int8 a number between two steps may fall to either.
        assert error <= 2 * theirs + (1e-3 if form == "int8" else torch.finfo(dtype).eps) * expected.norm()


@pytest.mark.parametrize("form", ["compact", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs AMX")
def test_more_inputs_and_rows_than_are_multiplied_together(dtype, form, threads):  # noqa: F811
    linear = linear_of(34, 4224, dtype, form, True, False)
    x, residual = numbers(1100, 4224, dtype=dtype), numbers(1100, 34, dtype=dtype)
    found, plain = linear(x, residual), linear.plain(x, residual)
    some = [0, 31, 32, 1023, 1024, 1099]
    expected = torch.stack([by_hand(linear, x[row], residual[row]) for row in some])
    error, theirs = ((y[some].double() - expected).norm() for y in (found, plain))
    assert error <= 2 * theirs + torch.finfo(dtype).eps * expected.norm()
    # By int8 a number between two steps may fall to either.
    same = 1e-3 if form == "int8" else 2 * theirs / expected.norm()
    assert (found - plain).double().norm() <= same * plain.double().norm()


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs AMX")
def test_a_float32_is_all_of_its_three_parts():
    """Numbers that need all 24 bits, of any size: by bfloat16 alone they would be wrong by 2^-9, by two parts 2^-17."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 1e-3
    scales = torch.logspace(-25, 25, 40)[:, None]
    x = torch.randn(40, 1024, generator=torch.Generator().manual_seed(1)) * scales
    found = FewBitsLinear(Compact.of(weight), None, None, 0.0, False, torch.float32)(x).double()
    expected = x.double() @ weight.double().T
    plain = torch.nn.functional.linear(x, weight).double()
    error, theirs = (((y - expected) / scales).norm() for y in (found, plain))
    assert error <= theirs
    # Of a single product nothing is summed.
    unit = FewBitsLinear(Compact.of(weight[:, :1].contiguous()), None, None, 0.0, False, torch.float32)
    found, expected = unit(x[:, :1].contiguous()).double(), x[:, :1].double() @ weight[:, :1].double().T
    assert ((found - expected) / expected).abs().max() <= 2.0**-21


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_silu_of_one_half_times_the_other(dtype):
    from numba import njit

    from minivlm.kernels.cpu.compiling import KINDS
    from minivlm.kernels.cpu.results import gate_numbers

    kind = KINDS[dtype]

    @njit
    def gated(gate, up):
        gate_numbers(kind, np.int64(gate.ctypes.data), np.int64(up.ctypes.data), len(gate))

    gate = torch.cat((numbers(960) * 10, torch.linspace(-130, 130, 1056), torch.linspace(-1e-3, 1e-3, 16)))
    broken = torch.tensor([torch.nan, torch.inf, -torch.inf, *[0.0] * 13])
    gate, up = torch.cat((gate, broken)), torch.cat((numbers(2032, seed=1), torch.ones(16)))
    found = gate.clone()
    gated(found.numpy(), up.numpy())
    expected = silu(gate.to(dtype).double()).to(dtype).double() * up.to(dtype).double()
    expected[(gate.to(dtype) < -87) & gate.isfinite()] = 0.0  # below, e^x is too small for a normal number
    torch.testing.assert_close(found.double(), expected, rtol=max(4e-7, torch.finfo(dtype).eps), atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [3, 16, 40])
def test_a_float32_that_alone_needs_all_its_bits_keeps_them(rows):
    """Beside weights that have no more than a bfloat16, and too large for the table."""
    weight = (numbers(70, 256) * 0.05).bfloat16().float()
    weight[3, 5] = 1.2345678 * 2.0**20
    linear = FewBitsLinear(Compact.of(weight), None, None, 0.0, False, torch.float32)
    x = numbers(rows, 256)
    expected = x[:, 5].double() * weight[3, 5].double()
    found = (linear(x) if rows <= linear.most_rows else linear.plain(x))[:, 3].double()
    assert ((found - expected) / expected).abs().median() <= 1e-6


POISONED = """
import sys, torch
from minivlm.kernels.cpu.compact import Compact
from minivlm.kernels.cpu.few_bits import FewBitsLinear, missing_tiles
from minivlm.kernels.quantise import quantise_int4, quantise_int8
torch.set_num_threads(1)
x, weight = torch.randn(40, 4096), torch.randn(64, 4096) / 64
for form, kept in (("compact", Compact.of(weight)), ("int8", quantise_int8(weight)), ("int4", quantise_int4(weight))):
    linear = FewBitsLinear(*(kept if form != "compact" else (kept, None)), None, 0.0, False, torch.float32)
    counts = [(1, False), (8, False)] + [(n, True) for n in (8, 40) if missing_tiles(torch.float32, form) is None]
    for rows, by_tiles in counts:
        found, expected = linear(x[:rows], None, by_tiles), linear.plain(x[:rows])
        assert (found - expected).norm() <= 1e-2 * expected.norm(), (form, rows, by_tiles)
"""


def test_what_is_still_read_is_not_freed():
    """glibc fills what is freed, so that whoever still reads there finds nonsense, and does not keep it."""
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", POISONED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@by_tiles
@pytest.mark.parametrize("rows", [*range(1, 10), 16, 17, 40])
@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_a_row_does_not_depend_on_those_beside_it(dtype, form, rows, by_tiles):
    """Bit for bit, beside others that are not numbers."""
    if rows > few_bits.MOST_ROWS and not by_tiles:
        return
    linear = linear_of(14, 256, dtype, form, True, True)
    x = numbers(rows, 256, dtype=dtype)
    whole = linear(x, None, by_tiles)
    for row in range(0, rows, 1 + rows // 8):
        others = torch.full_like(x, torch.nan)
        others[row] = x[row]
        found = linear(others, None, by_tiles)
        assert torch.equal(found[row], whole[row])
        assert found.isnan().all(-1).sum() == rows - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_weights_are_widened_as_the_plain_form_does(dtype, threads):  # noqa: F811
    weight, scale = quantise_int4(numbers(70, 384, dtype=dtype) * torch.logspace(-30, 4, 70)[:, None].to(dtype))
    scale = scale.float()
    expected = dequantise_int4(weight, scale).to(dtype)
    for first, end in ((0, 70), (3, 4), (60, 60)):
        assert torch.equal(widened_int4(weight, scale, first, end, dtype), expected[first:end])
    with pytest.raises(ValueError, match="rows 3 to 71"):
        widened_int4(weight, scale, 3, 71, dtype)


@by_tiles
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_number_that_counts_for_nothing_changes_nothing(dtype, by_tiles):
    """By int4 x is not quantised: the others of its group keep their bits."""
    weight = torch.full((1, 64), 0x99, dtype=torch.uint8)
    weight[0, 0] = 0x98  # 0 for the first input, 1 for the others
    linear = FewBitsLinear(weight, torch.ones(1, 1), None, 0.0, False, dtype)
    x = torch.full((2, 128), 0.7, dtype=dtype)
    x[:, 0] = 60000
    torch.testing.assert_close(linear(x, None, by_tiles), linear.plain(x), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_sums_are_exact(dtype):
    """The largest that there are, to the limit of 32 bits."""
    inputs = 1040 * 128
    weight = torch.full((9, inputs), 127, dtype=torch.int8)
    weight[3], weight[4, ::2] = -127, -127
    linear = FewBitsLinear(weight, torch.full((9,), 2.0**-9), None, 0, False, dtype)
    x = torch.full((2, inputs), 127 / 16, dtype=dtype)
    x[1, 1::2] = -127 / 16
    expected = ((x.double() * 16).long() @ weight.long().T).float() * 2.0**-9 * 2.0**-4
    assert torch.equal(linear(x), expected.to(dtype))


@by_tiles
@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_zeros_and_what_is_not_a_number(dtype, form, by_tiles):
    for normed in (False, True):
        linear = linear_of(14, 256, dtype, form, normed, True)
        assert not linear(torch.zeros(3, 256, dtype=dtype), None, by_tiles).any()
        for broken in (torch.nan, torch.inf, -torch.inf):
            x = numbers(256, dtype=dtype)
            x[5] = broken
            found = linear(x, None, by_tiles).isfinite()
            assert torch.equal(found, linear.plain(x).isfinite()) or not found.any()


def test_weights_that_move_are_followed():
    linear, x = linear_of(14, 256, torch.float32, "compact", False, False), numbers(2, 256)
    expected = linear(x)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        linear.weight.lower.zero_()
        assert torch.equal(other(x), expected)
        linear.weight.lower.copy_(other.weight.lower)


def test_wrong_kinds_are_refused(monkeypatch):
    bfloat16 = torch.bfloat16
    linear = linear_of(14, 256, bfloat16, "compact", True, False)
    x = numbers(3, 256, dtype=bfloat16)
    for wrong in (x.float(), x[:, :255], numbers(3, 512, dtype=bfloat16)[:, ::2], x.to("meta")):
        with pytest.raises(ValueError, match=r"row kernels: found .+ expected contiguous torch.bfloat16"):
            linear(wrong)
    monkeypatch.setattr(few_bits, "missing_tiles", lambda dtype, form: "not in this test")
    assert linear.most_rows == 16
    for rows in (x[:0], numbers(17, 256, dtype=bfloat16), x[None]):
        with pytest.raises(ValueError, match="expected 1 to 16 rows"):
            linear(rows)
    with pytest.raises(ValueError, match=r"expected contiguous torch.bfloat16 \[3, 14\] on cpu"):
        linear(x, x)
    compact, (int8, scale) = linear.weight, quantise_int8(numbers(14, 100))
    for arguments, message in (
        ((compact, None, None, 0, False, torch.float32), "a compact weight of torch.bfloat16 for torch.float32"),
        ((int8, scale, None, 0, False, bfloat16), "int8 of 100 inputs, expected a multiple of 128"),
        ((int8, None, None, 0, False, bfloat16), "int8, scale None"),
        ((Compact.of(normal(7, 128, dtype=bfloat16)), None, None, 0, True, bfloat16), "swiglu of 7 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            FewBitsLinear(*arguments)


def test_what_a_type_or_processor_lacks_is_said():
    assert missing(torch.float16, "compact") == "there is none for torch.float16"
    assert missing(torch.float64, "int8") == "there is none for torch.float64"


@pytest.mark.parametrize(
    ("variable", "others"),
    [("NUMBA_ENABLE_AVX=0", "missing()"), ("NUMBA_CPU_NAME=generic", "missing_attention(f, 16)")],
)
def test_where_numba_does_not_use_the_processors_vectors_there_are_none(variable, others):
    """LLVM would end the process; the other kernels are compiled for what there is."""
    code = (
        "import torch; from minivlm.kernels.cpu import few_bits, single_row; f = torch.float32\n"
        f"print(few_bits.missing(f, 'compact'), single_row.{others}, single_row.missing_tiles(), sep='|')"
    )
    environment = {**os.environ, **dict([variable.split("=")])}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    lacks = "the processor has no {}, or Numba does not use it"
    assert found == f"{lacks.format('AVX-512')}|None|{lacks.format('AMX')}"


def test_a_system_that_keeps_the_registers_of_tiles_is_named(monkeypatch):
    from minivlm.kernels.cpu import compiling, tiles

    monkeypatch.setattr(compiling, "compiles_for", lambda feature: True)
    monkeypatch.setattr(tiles, "allowed", lambda: False)
    assert single_row.missing_tiles.__wrapped__() == "the system does not let this process use AMX"


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs AMX")
def test_what_was_compiled_is_found_again():
    """What kernels are made of is new in every process, and here."""
    from numba.core import event

    from minivlm.kernels.cpu import attention_prefill_numba, many_rows_numba, row_tiles_numba, some_rows_numba
    from minivlm.kernels.cpu.weight_rows import COMPACT

    def addresses() -> list[int]:
        row_tiles_numba.row_tiles.cache_clear()
        row_tiles_numba.finishing.cache_clear()
        attention_prefill_numba._pieces.cache_clear()
        products = some_rows_numba.some_rows_kernel, many_rows_numba.many_rows_kernel
        found = [kernel.__wrapped__(torch.bfloat16, COMPACT) for kernel in products]
        return [*found, attention_prefill_numba.attention_kernel.__wrapped__(torch.bfloat16)]

    addresses()
    with event.install_recorder("numba:compile") as compiled:
        assert all(addresses())
    assert compiled.buffer == []


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs AMX")
def test_what_kernels_are_made_of_has_names_of_its_own():
    """Numba puts a number that begins anew in every process behind a name. Two functions of one name that two processes
    compiled and kept can have the same, and a third process would take one for the other: by the code of others for
    int8, products with int4 were no numbers."""
    from minivlm.kernels.cpu import attention_prefill_numba, many_rows_numba, row_tiles_numba, some_rows_numba
    from minivlm.kernels.cpu.weight_rows import COMPACT, INT4, INT8, WHOLE

    made = [vars(attention_prefill_numba._pieces(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    for dtype in DTYPES:
        for form in (COMPACT, WHOLE, INT8, INT4):
            of_many = many_rows_numba._packing, many_rows_numba._finishing, many_rows_numba._multiplying
            of = row_tiles_numba.row_tiles, row_tiles_numba.finishing, some_rows_numba._of_some_rows, *of_many
            made += [vars(pieces(dtype, form)) for pieces in of]
    names = [f.py_func.__qualname__ for pieces in made for f in pieces.values() if hasattr(f, "py_func")]
    assert len(set(names)) == len(names) == 2 * 4 + 12 * (3 + 1 + 5)


@pytest.mark.parametrize("form", ["compact", "int8", "int4"])
def test_a_wrong_product_is_noticed(form, monkeypatch):
    call = FewBitsLinear.__call__
    monkeypatch.setattr(FewBitsLinear, "__call__", lambda *arguments, **more: call(*arguments, **more) * 1.01)
    for trial in (missing, missing_tiles):
        assert "its result is wrong by" in trial.__wrapped__(torch.float32, form)


# ---- recordings


def test_a_recording_is_what_its_calls_were(threads):  # noqa: F811
    """What lies in tensors may change from run to run, and nothing runs while it is made."""
    dtype = torch.bfloat16
    outer, inner = (linear_of(*sizes, dtype, "compact", False, False) for sizes in ((256, 128), (128, 256)))
    cos = torch.ones(9, 1, 64, dtype=dtype)
    attention, called = (
        RowAttention(2, *torch.zeros(2, 1, 2, 1, 9, 64, dtype=dtype), cos, cos, None) for _ in range(2)
    )
    x, place = torch.zeros(1, 256, dtype=dtype), torch.zeros(1, 3, dtype=torch.int64)

    def through(attention: RowAttention) -> torch.Tensor:
        return outer(inner(outer(attention.at(0, x, place), x)), x)

    recording = Recording(lambda: through(attention))
    assert not attention.keys.any()
    for position in range(9):
        x.copy_(numbers(1, 256, dtype=dtype, seed=position))
        place.copy_(torch.tensor([attention.place(position % 2, position)]))
        assert torch.equal(recording(), through(called))
        assert torch.equal(attention.keys, called.keys) and torch.equal(attention.values, called.values)


def test_a_recording_that_fails_leaves_no_trace():
    linear, x = linear_of(14, 256, torch.float32, "compact", False, False), numbers(256)
    expected = linear(x)

    def broken() -> torch.Tensor:
        linear(x)
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        Recording(broken)
    assert torch.equal(linear(x), expected)
