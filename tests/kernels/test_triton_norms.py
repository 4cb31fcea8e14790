"""Normalisation: the twins against PyTorch's own and the decoder's modules, the kernels against the twins."""

import pytest
import torch
from problems import check, poisoned_memory, values
from torch import nn

from minivlm.kernels import norms
from minivlm.ops.norms import RMSNorm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
EPS = 1e-5
# Widths at and beside powers of two, of CLIP and SigLIP (1024, 1152), of a 7B decoder.
SHAPES = ((1, 1), (3, 2), (5, 100), (2, 127), (2, 128), (2, 129), (4, 577), (2, 3, 1024), (7, 1152), (1, 4096))


def arguments(name: str, shape: tuple[int, ...], layout: str = "contiguous"):
    """A function of device and dtype: the arguments of that norm, with a few inputs far from the rest."""

    def make(device, dtype):
        x, residual = values(*shape, seed=1, spread=3), values(*shape, seed=2) + 0.5
        x.flatten()[:: max(x.numel() // 3, 1)] *= 16
        weight, bias = values(shape[-1], seed=3), values(shape[-1], seed=4)
        x, residual, weight, bias = (laid_out(y.to(device, dtype), layout) for y in (x, residual, weight, bias))
        added = (residual,) if name.startswith("add") else ()
        return (x, *added, weight, *((bias,) if "layer" in name else ()), EPS)

    return make


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers with other strides, among NaN."""
    if layout == "contiguous":
        return x
    if layout == "columns":  # neighbouring rows lie side by side
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    wider = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    view = wider[..., 1 : 2 * x.shape[-1] : 2] if layout == "every second" else wider[..., 3 : 3 + x.shape[-1]]
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_rms_norm_is_the_decoders(dtype):
    module = RMSNorm(96, EPS).to(dtype)
    module.weight = nn.Parameter(values(96, seed=1).to(dtype))
    x = values(50, 96, seed=2, spread=4).to(dtype)
    assert torch.equal(norms.plain_rms_norm(x, module.weight, EPS), module(x))


def test_the_twins_are_the_equations():
    x, residual, weight, bias, eps = arguments("add_layer_norm", (6, 33))(torch.device("cpu"), torch.float64)
    total, found = norms.plain_add_layer_norm(x, residual, weight, bias, eps)
    scale = ((total - total.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True) + eps
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(found, (total - total.mean(1, keepdim=True)) / scale.sqrt() * weight + bias)
    total, found = norms.plain_add_rms_norm(x, residual, weight, eps)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(found, nn.functional.rms_norm(x + residual, (33,), weight, eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_err_at_most_twice_as_much_as_their_twins(name, dtype, device):
    kernel, twin = vars(norms)[name], vars(norms)[f"plain_{name}"]
    for shape in SHAPES:
        make = arguments(name, shape)
        exact, plain = twin(*make(torch.device("cpu"), torch.float64)), twin(*make(device, dtype))
        with poisoned_memory():
            found = kernel(*make(device, dtype))
        results = ((found, plain, exact),) if torch.is_tensor(found) else zip(found, plain, exact, strict=True)
        for result in results:
            check(*result)


@pytest.mark.parametrize("layout", ["columns", "sliced", "every second"])
@pytest.mark.parametrize("name", NAMES)
def test_strides_change_nothing(name, layout, device):
    kernel = vars(norms)[name]
    for shape in ((4, 100), (2, 3, 64)):
        expected = kernel(*arguments(name, shape)(device, torch.bfloat16))
        with poisoned_memory():
            found = kernel(*arguments(name, shape, layout)(device, torch.bfloat16))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other) and one.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roundings_are_where_the_decoder_has_them(dtype, device):
    """The sum exactly, the norm but for the last bits of the mean; the other order would change a quarter of all."""
    x, residual, weight, eps = arguments("add_rms_norm", (20, 500))(device, dtype)
    total, found = norms.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(total, residual + x)
    assert (found != norms.plain_rms_norm(total, weight, eps)).double().mean() < 0.002
    otherwise = nn.functional.rms_norm(total.float(), (500,), weight.float(), eps).to(dtype)
    assert (found != otherwise).double().mean() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_very_small_ones(name, device):
    kernel, twin = vars(norms)[name], vars(norms)[f"plain_{name}"]
    results = kernel(*arguments(name, (0, 64))(device, torch.float32))
    shapes = [y.shape for y in results] if name.startswith("add") else [results.shape]
    assert set(shapes) == {(0, 64)}
    x, *others = arguments(name, (2, 64))(device, torch.float32)
    zeros = [torch.zeros_like(y) if isinstance(y, torch.Tensor) and y.shape == x.shape else y for y in others]
    found, expected = kernel(x * 0, *zeros), twin(x * 0, *zeros)  # eps alone is under the root
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_torch_knows_the_kernels(name, device):
    torch.library.opcheck(vars(norms)[name], arguments(name, (3, 40))(device, torch.float32))


def test_wrong_arguments_are_refused(device):
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    for bad, message in (
        ((x, weight[:4], EPS), r"\[2, 8\], weight \[4\]"),
        ((x.double(), weight.double(), EPS), "float64"),
        ((x, weight.half(), EPS), "float32"),
        ((torch.ones(1, 16385, device=device), torch.ones(16385, device=device), EPS), "from 1 to 16384"),
    ):
        with pytest.raises(ValueError, match=message):
            norms.rms_norm(*bad)
    with pytest.raises(ValueError, match="shapes of x and weight"):
        norms.add_rms_norm(x, x[:1], weight, EPS)
