"""Packed weights against what they stand for; products of few rows: the twin against float64, the kernel against it.

Also the compilation of these and of the other small kernels (norms, rotation, activations), in one process per chip.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from problems import check_kernel, poisoned_memory, values

from minivlm.kernels import activations, norms, quantise, rope, skinny
from minivlm.kernels.quantise import dequantise_int4, dequantise_int8, error_of, quantise_int4, quantise_int8

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, interpreting: exp(100) is inf

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANTISE = {"float": None, "int8": quantise_int8, "int4": quantise_int4}
EPS = 1e-5
# What a decoder asks for: q, k, v and the head; gate and up; o and down.
OPTIONS = ("normed", "normed swiglu", "residual")
# Outputs and inputs: one of each, none a multiple of a block, and inner dimensions that are cut into 2 and 3 parts.
SIZES = {"float": ((2, 1), (34, 70), (70, 700), (10, 1100)), "int4": ((2, 128), (34, 384), (10, 1664))}
SIZES["int8"] = SIZES["float"]


def arguments(rows: int, outputs: int, inputs: int, kind: str, option: str, strided: bool = False):
    """A function of device and dtype: the arguments of `skinny_linear`. Quantised weights are the same in all."""
    weight, scale = values(outputs, inputs, seed=1, spread=0.2), None
    if QUANTISE[kind] is not None:
        weight, scale = QUANTISE[kind](weight.bfloat16())

    def make(device, dtype):
        def there(x):
            if not strided:
                return x.to(device, dtype)
            wider = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=dtype, device=device)
            wider[:, 3:-2] = x
            return wider[:, 3:-2]

        x, norm = values(rows, inputs, seed=2, spread=2), values(inputs, seed=3).to(device, dtype)
        residual = there(values(rows, outputs, seed=4))
        w, s = there(weight) if kind == "float" else weight.to(device), scale
        if kind == "int8":
            s = scale.to(device)
        elif kind == "int4":
            s = scale.to(device, dtype)
        normed, added = "normed" in option, "residual" in option
        return there(x), w, s, norm if normed else None, EPS, residual if added else None, "swiglu" in option

    return make


def test_eight_bits_are_the_nearest_steps():
    weight = values(7, 33, seed=1)
    weight[2] = 0
    quantised, scale = quantise_int8(weight)
    assert quantised.dtype == torch.int8 and scale.dtype == torch.float32
    assert (quantised.abs().amax(1) == torch.where(scale > 0, 127, 0)).all()
    found = dequantise_int8(quantised, scale)
    assert ((found - weight).abs() <= scale[:, None] * 0.5001).all() and (found[2] == 0).all()
    assert quantise_int8(torch.tensor([[0.5, -1.27, 0.0]]))[0].tolist() == [[50, -127, 0]]


def test_four_bits_lie_where_the_format_says():
    steps = torch.arange(2 * 3 * 128).reshape(2, 3, 128) * 7 % 16 - 8
    scale = torch.tensor([[0.5, 1.0, -2.0], [0.25, 4.0, 0.125]])
    weight = (steps * scale[:, :, None]).flatten(1)
    packed, found = quantise_int4(weight)
    assert packed.shape == (2, 192) and packed.dtype == torch.uint8 and torch.equal(found, scale)
    assert torch.equal(dequantise_int4(packed, found), weight)
    for row, group, i in ((0, 0, 0), (1, 1, 63), (1, 2, 17)):
        byte = packed[row, group * 64 + i].item()
        assert (byte % 16 - 8, byte // 16 - 8) == (steps[row, group, i], steps[row, group, i + 64])
    example = torch.zeros(1, 128)
    example[0, :2], example[0, 64] = torch.tensor([0.5, 4.0]), -3.5  # -8 steps of -0.5 make 4.0
    packed, scale = quantise_int4(example)
    assert scale.tolist() == [[-0.5]] and packed[0, 0] == (-1 + 8) + 16 * (7 + 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits_are_the_nearest_steps_that_there_are(dtype):
    weight = values(9, 5 * 128, seed=1).to(dtype)
    weight[3, 128:256] = 0
    packed, scale = quantise_int4(weight)
    assert scale.dtype == dtype and scale[3, 1] == 0
    step = scale.float().abs().repeat_interleave(128, 1)
    difference = (dequantise_int4(packed, scale) - weight.float()).abs()
    # Half a step, but for what lies beyond 7.5 steps on the side where the grid ends at 7.
    assert (difference <= step * 1.0001).all() and (difference <= step * 0.5001).double().mean() > 0.98
    assert (difference[3, 128:256] == 0).all()


def test_the_report_says_what_rounding_cost():
    weight = values(64, 1024, seed=1).bfloat16()
    for quantiser, dequantise, bits, worst in (
        (quantise_int8, dequantise_int8, 8 + 32 / 1024, 0.009),
        (quantise_int4, dequantise_int4, 4 + 16 / 128, 0.11),
    ):
        report = error_of(weight, *quantiser(weight))
        found = dequantise(*quantiser(weight))
        assert report.bits == bits and report.largest == (found - weight).abs().max().item()
        assert worst / 2 < report.relative < worst
        x = torch.randn(50, 1024, generator=torch.Generator().manual_seed(2))
        cost = (x @ (found - weight.float()).T).norm() / (x @ weight.float().T).norm()
        assert abs(cost - report.relative) < 0.05 * report.relative  # "also what to expect of the product"
    assert error_of(torch.zeros(2, 128), *quantise_int4(torch.zeros(2, 128))).relative == 0


def test_what_cannot_be_quantised_is_refused():
    for quantiser in (quantise_int8, quantise_int4):
        with pytest.raises(ValueError, match="NaN"):
            quantiser(torch.full((2, 128), torch.nan))
        with pytest.raises(ValueError, match=r"\[128\]"):
            quantiser(torch.ones(128))
        with pytest.raises(ValueError, match="int64"):
            quantiser(torch.ones(2, 128).long())
    with pytest.raises(ValueError, match="multiple of 128"):
        quantise_int4(torch.ones(2, 130))


@pytest.mark.parametrize("kind", QUANTISE)
def test_the_twin_is_the_equation(kind):
    x, weight, scale, norm, eps, residual, _ = arguments(3, 34, 256, kind, "normed residual")(
        torch.device("cpu"), torch.float64
    )
    wide = {"float": lambda: weight, "int8": lambda: dequantise_int8(weight, scale)}
    wide["int4"] = lambda: dequantise_int4(weight, scale)
    w = wide[kind]().double()
    expected = residual + torch.nn.functional.rms_norm(x, (256,), norm, eps) @ w.T
    torch.testing.assert_close(skinny.plain_skinny_linear(x, weight, scale, norm, eps, residual, False), expected)
    gate, up = (x @ w[:17].T), (x @ w[17:].T)
    found = skinny.plain_skinny_linear(x, weight, scale, None, eps, None, True)
    torch.testing.assert_close(found, gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("kind", QUANTISE)
def test_the_kernel_errs_at_most_twice_as_much_as_its_twin(kind, rows, dtype, device):
    for outputs, inputs in SIZES[kind]:
        for option in OPTIONS:
            make = arguments(rows, outputs, inputs, kind, option)
            check_kernel(skinny.skinny_linear, skinny.plain_skinny_linear, make, device, dtype)


def test_parts_cover_the_inner_dimension():
    cut = set()
    for inputs in (1, 255, 511, 1024, 1100, 4096, 14336):
        for outputs in (1, 1024, 4096, 28672, 32064):
            for kind in (torch.bfloat16, torch.int8, torch.uint8):
                shape = skinny.shape_of(torch.bfloat16, kind, 1)
                parts, length = skinny.parts_of(outputs, inputs, shape)
                assert length % shape.BLOCK_K == 0 and (parts - 1) * length < inputs <= parts * length
                assert parts == 1 or length >= skinny.SHORTEST
                cut.add(parts)
    assert {1, 2, 4} <= cut and skinny.parts_of(1024, 4096, skinny.Shape(16, 256, 4, 3)) == (4, 1024)


@pytest.mark.parametrize("kind", QUANTISE)
def test_a_row_does_not_depend_on_its_neighbours(kind, device):
    x, *others = arguments(8, 70, 1280, kind, "normed")(device, torch.bfloat16)
    all_rows = skinny.skinny_linear(x, *others)
    some = skinny.skinny_linear(x[[6, 1]], *others)
    assert torch.equal(some, all_rows[[6, 1]])
    alone = skinny.skinny_linear(x[6:7], *others)  # summed in another order
    torch.testing.assert_close(alone, all_rows[6:7], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_any_stride(rows, device):
    for option in OPTIONS:
        found = []
        for strided in (False, True):
            make = arguments(rows, 34, 600, "float", option, strided)
            with poisoned_memory():
                found.append(skinny.skinny_linear(*make(device, torch.float16)))
        assert torch.equal(*found) and found[1].is_contiguous()


@pytest.mark.parametrize("kind", QUANTISE)
def test_torch_knows_the_kernel(kind, device):
    torch.library.opcheck(skinny.skinny_linear, arguments(2, 6, 128, kind, "normed swiglu")(device, torch.float32))


def test_wrong_arguments_are_refused(device):
    x, weight = torch.ones(2, 256, device=device), torch.ones(6, 256, device=device)
    packed, scale = quantise_int4(weight)
    for bad, message in (
        ((x.repeat(5, 1), weight, None, None, EPS, None, False), "from 1 to 8"),
        ((x, weight.half(), None, None, EPS, None, False), "float16"),
        ((x, weight[:, :8], None, None, EPS, None, False), "expected 256 inner columns"),
        ((x, packed, None, None, EPS, None, False), r"scale \(6, 2\)"),
        ((x, packed, scale[:, :1], None, EPS, None, False), r"scale \(6, 2\)"),
        ((x, weight, scale, None, EPS, None, False), "scale None"),
        ((x, weight[:5], None, None, EPS, None, True), "even number"),
        ((x, weight, None, torch.ones(8, device=device), EPS, None, False), "norm of another shape"),
        ((x, weight, None, None, EPS, torch.ones(2, 6, device=device), True), "residual of another shape"),
        ((x, weight.T.contiguous().T, None, None, EPS, None, False), "stride 1"),
    ):
        with pytest.raises(ValueError, match=message):
            skinny.skinny_linear(*bad)
    assert quantise.GROUP == 128


# ---- compiled for chips that are not here, at the sizes of SigLIP (1152) and of 7B decoders (4096)

# Registers of a thread. 255 is all that there are; an elementwise kernel with 64 can fill a multiprocessor half.
MOST_REGISTERS = {"_norm": 128, "_swiglu": 64, "_gelu": 64, "_rotate_and_cache": 64, "_skinny": 255, "_add_parts": 64}
MOST_SHARED = 80 * 1024  # bytes: two programs fit in a multiprocessor of either chip


def there(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def normalise(name: str, width: int, dtype: torch.dtype) -> None:
    rows, weights = (there(*shape, dtype=dtype) for shape in ((5, width), (width,)))
    added = (rows,) if name.startswith("add") else ()
    vars(norms)[name]._init_fn(rows, *added, weights, *((weights,) if "layer" in name else ()), EPS)


def activate(name: str, biased: bool, dtype: torch.dtype) -> None:
    rows = there(5, 4096, dtype=dtype)
    second = rows if name == "swiglu" else there(4096, dtype=dtype) if biased else None
    vars(activations)[name]._init_fn(rows, second)


def turn(heads: int, kv_heads: int, channels: int, dtype: torch.dtype) -> None:
    q, k = there(5, heads, channels, dtype=dtype), there(5, kv_heads, channels, dtype=dtype)
    angles, index = there(5, 1, channels, dtype=dtype), there(5, dtype=torch.int32)
    cache = there(2, kv_heads, 4096, channels, dtype=dtype)
    rope.rotate_and_cache._init_fn(q, k, k, angles, angles, index, index, cache, cache)


def multiply(kind: str, rows: int, option: str, dtype: torch.dtype) -> None:
    """The head, gate and up, or the attention's output (in parts) of a 7B decoder."""
    outputs = {"normed": 32064, "normed swiglu": 28672, "residual": 4096}[option]
    weight, scale = {
        "float": lambda: (there(outputs, 4096, dtype=dtype), None),
        "int8": lambda: (there(outputs, 4096, dtype=torch.int8), there(outputs, dtype=torch.float32)),
        "int4": lambda: (there(outputs, 2048, dtype=torch.uint8), there(outputs, 32, dtype=dtype)),
    }[kind]()
    norm = there(4096, dtype=dtype) if "normed" in option else None
    residual = there(rows, outputs, dtype=dtype) if option == "residual" else None
    x = there(rows, 4096, dtype=dtype)
    skinny.skinny_linear._init_fn(x, weight, scale, norm, EPS, residual, "swiglu" in option)


def launches() -> Iterator[tuple]:
    """A function and its arguments for every form of a kernel, in every dtype.

    Products in float16 are compiled in their largest form only: but for one conversion they are bfloat16's.
    """
    for dtype in DTYPES:
        for name in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"):
            for width in (1152, 4096, 16384) if name.startswith("add") else (4096,):
                yield normalise, (name, width, dtype)
        yield activate, ("swiglu", False, dtype)
        for name in ("quick_gelu", "gelu", "gelu_tanh"):
            yield activate, (name, True, dtype)
            yield activate, (name, False, dtype)
        for sizes in ((32, 8, 128), (12, 12, 80)):
            yield turn, (*sizes, dtype)
        for kind in QUANTISE:
            for rows in (1, 8):
                for option in OPTIONS if dtype != torch.float16 else ("normed swiglu",):
                    yield multiply, (kind, rows, option, dtype)


def test_compiles_without_spills_for_chips_that_are_not_here():
    """Both at once, each in a process of its own: this one may hold the kernels as the interpreter wants them."""
    folder = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import compiled, test_skinny; compiled.calls = test_skinny.launches; compiled.main()"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, chip],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for chip in ("80", "90")
    ]
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        print(out)
        found = [json.loads(line) for line in out.splitlines()]
        assert {one["kernel"] for one in found} == set(MOST_REGISTERS)
        for one in found:
            assert one["stack"] == 0 and one["shared"] <= MOST_SHARED, one
            assert one["registers"] <= MOST_REGISTERS[one["kernel"]], one
            if one["kernel"] == "_skinny":  # weights are under way while others are multiplied
                assert "cp.async" in one["instructions"], one
                on_tensor_cores = " 8 " in one["call"] and "float32" not in one["call"]
                assert ("mma.sync" in one["instructions"]) == on_tensor_cores, one
