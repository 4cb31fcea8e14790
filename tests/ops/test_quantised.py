"""Quantised linear layers: the plain form, and the backend cpu's products with packed weights, against float64."""

import pytest
import torch
from torch import nn

from minivlm.errors import InputError
from minivlm.kernels.quantise import dequantise_int4, dequantise_int8
from minivlm.ops import cpu, cpu_groups, cpu_quantised
from minivlm.ops.backend import choose
from minivlm.ops.cpu_quantised import ACROSS, FEW, missing_quantised, quantised_group
from minivlm.ops.quantised import FORMATS, PIECE, QuantisedLinear, quantise, widened

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AT_ONCE = cpu_quantised.PIECE
CPU = torch.device("cpu")
# Numbers of rows, and whether the libraries multiply them all.
ROWS_4 = [(1, False), (5, False), (17, False), (1, True), (FEW, True), (FEW + 1, True)]
ROWS_8 = [
    (1, False),
    (3, False),
    (9, False),
    (17, False),
    *((n, True) for n in (1, 2, ACROSS, ACROSS + 1, AT_ONCE + 3)),
]


def layer_of(outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    layer.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator).to(dtype))
    return layer


def group_of(layers: list[QuantisedLinear], small: bool) -> cpu_groups.Group:
    """By the libraries, as small models are computed, or by this project's kernels."""
    group = quantised_group(layers, small)
    group.small = small
    assert small or group.kernel(torch.float32, 1) is not None
    return group


def rows_of(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)


def exact(layer: QuantisedLinear) -> torch.Tensor:
    """The weight that a quantised layer stands for, float64 [V, D]."""
    dequantise = dequantise_int8 if layer.weight.dtype == torch.int8 else dequantise_int4
    return dequantise(layer.weight, layer.scale).double()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_form_multiplies_by_what_it_stores(form, dtype):
    layer = quantise(layer_of(96, 256, dtype), form)
    x = rows_of(5, 256, dtype)
    found, expected = layer(x).double(), x.double() @ exact(layer).T
    assert (layer.out_features, layer.in_features, layer.bias, found.shape) == (96, 256, None, (5, 96))
    assert (found - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize(("form", "most"), [("int8", 0.008), ("int4", 0.11)])
def test_a_layer_is_near_what_it_was(form, most):
    plain = layer_of(64, 512, torch.float32)
    difference = (exact(quantise(plain, form)) - plain.weight.double()).norm() / plain.weight.double().norm()
    assert most / 4 < difference < most


@pytest.mark.parametrize("form", FORMATS)
def test_large_layers_are_quantised_and_widened_in_pieces_without_a_seam(form, monkeypatch):
    layer = layer_of(70, 128, torch.bfloat16)
    whole = quantise(layer, form)
    monkeypatch.setattr("minivlm.ops.quantised.PIECE", 9 * 128)
    assert PIECE > 9 * 128
    cut = quantise(layer, form)
    assert torch.equal(cut.weight, whole.weight) and torch.equal(cut.scale, whole.scale)
    assert torch.equal(widened(cut.weight, cut.scale, torch.float32).double(), exact(whole))


def test_layers_that_cannot_be_quantised():
    with pytest.raises(InputError, match="with a bias, expected one without"):
        quantise(nn.Linear(128, 8), "int8")
    with pytest.raises(InputError, match="a layer has 100 inputs, expected a multiple of 128"):
        quantise(nn.Linear(100, 8, bias=False), "int4")
    with pytest.raises(ValueError, match="infinite values or NaN"):
        quantise(layer_of(8, 128, torch.float32).apply(lambda layer: layer.weight.data.fill_(torch.nan)), "int8")


def by_8_bits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [S, D] in float64, each row rounded to 127 steps of its largest value, by a weight [V, D]."""
    step = x.float().abs().amax(-1, keepdim=True) / 127
    steps = torch.where(step == 0, 0.0, x.float() / step).round().double()
    return (steps * step.double()) @ weight.T


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if missing_quantised("int8", dtype) is None])
@pytest.mark.parametrize("sizes", [(64,), (48, 16, 16), (7, 9), (300, 20)])
@pytest.mark.parametrize(("rows", "small"), ROWS_8)
def test_int8_on_a_cpu_quantises_every_row_by_itself(dtype, sizes, rows, small):
    layers = [quantise(layer_of(size, 128, dtype, seed), "int8") for seed, size in enumerate(sizes)]
    group, x = group_of(layers, small), rows_of(rows, 128, dtype)
    x[-1] *= 100  # a loud row leaves its neighbours alone
    found = torch.cat(group.parts(x), dim=-1).double()
    expected = by_8_bits(x, torch.cat([exact(layer) for layer in layers]))
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A value that falls between two steps may be rounded to the other one.
    assert error.max() <= 0.002 + torch.finfo(dtype).eps
    assert torch.allclose(group(x[:1]).double(), found[:1], rtol=2 * torch.finfo(dtype).eps, atol=0.002)
    assert torch.equal(group(torch.zeros_like(x)), torch.zeros_like(found, dtype=dtype))


@pytest.mark.parametrize(("rows", "small"), [*ROWS_8, (AT_ONCE, True)])
def test_int8_sums_are_exact(rows, small):
    """The largest that there are, which a product of fewer bits would cut off, and numbers of one sign."""
    draw = torch.Generator().manual_seed(rows)
    weight = torch.randint(-127, 128, (40, 128), generator=draw, dtype=torch.int8)
    weight[:8] = 127
    steps = torch.randint(-127, 128, (rows, 128), generator=draw)
    steps[:, 0], steps[0] = 127, 127  # so that a step is 2^-4
    group = group_of([QuantisedLinear(weight, torch.full((40,), 2.0**-9))], small)
    expected = (steps @ weight.long().T).double() * 2.0**-13
    assert torch.equal(group(steps.float() / 16).double(), expected)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if missing_quantised("int4", dtype) is None])
@pytest.mark.parametrize("sizes", [(64,), (128, 32, 32), (7, 90)])
@pytest.mark.parametrize(
    ("rows", "small"), [(1, False), (5, False), (9, False), (1, True), (FEW, True), (FEW + 1, True)]
)
def test_int4_on_a_cpu_equals_the_weights_widened(dtype, sizes, rows, small):
    layers = [quantise(layer_of(size, 256, dtype, seed), "int4") for seed, size in enumerate(sizes)]
    group, x = group_of(layers, small), rows_of(rows, 256, dtype)
    found = [part.double() for part in group.parts(x)]
    expected = [x.double() @ exact(layer).T for layer in layers]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 8 * torch.finfo(dtype).eps * theirs.norm()
    assert torch.allclose(group(x.view(rows, 1, 256)).flatten(), group(x).flatten())


def test_a_processor_without_the_products_is_told_and_auto_takes_another_backend(monkeypatch):
    monkeypatch.setattr(cpu, "missing_quantised", lambda form, dtype: f"no {form} here")
    assert choose("auto", CPU, torch.bfloat16, "int8").name == "sdpa"
    assert choose("auto", CPU, torch.bfloat16).name == "cpu"
    with pytest.raises(InputError, match=r"backend cpu: .*bfloat16 with int8 weights \(no int8 here\)"):
        choose("cpu", CPU, torch.bfloat16, "int8")


def test_a_wrong_product_is_noticed(monkeypatch):
    """As with another order of packed nibbles than the one that `_widened` undoes."""
    monkeypatch.setattr(cpu_quantised, "LANES", 32)
    missing_quantised.cache_clear()
    reason = missing_quantised("int4", torch.float32)
    missing_quantised.cache_clear()
    assert reason is not None
