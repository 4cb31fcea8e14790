"""Activations: the twins against their formulas and the encoder's, the kernels against the twins."""

import math

import pytest
import torch
from problems import check_kernel, poisoned_memory, values

from minivlm.kernels import activations
from minivlm.ops.activations import quick_gelu as reference_quick_gelu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, interpreting: exp(100) is inf

GELUS = ("quick_gelu", "gelu", "gelu_tanh")
SHAPES = ((1, 1), (3, 7), (2, 1023), (1, 1024), (2, 1025), (2, 3, 100))


def test_the_twins_are_the_formulas():
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    other = torch.linspace(2, -1, 1001, dtype=torch.float64)
    expected = {
        "quick_gelu": lambda y: y / (1 + math.exp(-1.702 * y)),
        "gelu": lambda y: y * math.erfc(-y / math.sqrt(2)) / 2,
        "gelu_tanh": lambda y: y * (1 + math.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2,
    }
    for name, formula in expected.items():
        twin = vars(activations)[f"plain_{name}"]
        for bias in (None, other):
            shifted = x if bias is None else x + bias
            wanted = torch.tensor([formula(y) for y in shifted.tolist()], dtype=torch.float64)
            torch.testing.assert_close(twin(x, bias), wanted, rtol=1e-12, atol=1e-14)
    wanted = torch.tensor([g / (1 + math.exp(-g)) * u for g, u in zip(x.tolist(), other.tolist(), strict=True)])
    torch.testing.assert_close(activations.plain_swiglu(x, other).float(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_quick_gelu_is_the_encoders(dtype):
    x = values(1000, seed=1, spread=4).to(dtype)
    assert torch.equal(activations.plain_quick_gelu(x, None), reference_quick_gelu(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_errs_at_most_twice_as_much_as_its_twin(dtype, device):
    for shape in SHAPES:
        check_kernel(
            activations.swiglu,
            activations.plain_swiglu,
            lambda on, to, shape=shape: (
                values(*shape, seed=1, spread=4).to(on, to),
                values(*shape, seed=2).to(on, to),
            ),
            device,
            dtype,
        )


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GELUS)
def test_gelus_err_at_most_twice_as_much_as_their_twins(name, dtype, biased, device):
    for shape in SHAPES:
        check_kernel(
            vars(activations)[name],
            vars(activations)[f"plain_{name}"],
            lambda on, to, shape=shape: (
                values(*shape, seed=1, spread=3).to(on, to),
                values(shape[-1], seed=2).to(on, to) if biased else None,
            ),
            device,
            dtype,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roundings_are_where_the_model_has_them(dtype, device):
    """Where exp and sigmoid agree to the last bits of float32, nearly every result of 16 bits is the same.

    Below -2 that is not so for 1 + erf(y) and 1 + tanh(y), which lose their first digits there.
    """
    x, y = (values(40, 500, seed=seed, spread=3).to(device, dtype) for seed in (1, 2))
    bias = values(500, seed=3).to(device, dtype)
    found, plain = activations.swiglu(x, y), activations.plain_swiglu(x, y)
    assert (found != plain).double().mean() < 0.002
    for name in GELUS:
        other, expected = (vars(activations)[n](x, bias) for n in (name, f"plain_{name}"))
        assert (other != expected)[x + bias > -2].double().mean() < 0.002
    wide = (x.float() * torch.sigmoid(x.float()) * y.float()).to(dtype)  # silu not rounded
    assert (found != wide).double().mean() > 0.1


def test_the_halves_of_a_fused_product_are_read_where_they_lie(device):
    product = values(2, 3, 2 * 300, seed=1, spread=3).to(device, torch.bfloat16)
    gate, up = product.chunk(2, dim=-1)
    assert not gate.is_contiguous() and gate.reshape(-1, 300).data_ptr() == product.data_ptr()
    with poisoned_memory():
        found = activations.swiglu(gate, up)
    assert found.shape == (2, 3, 300)
    assert torch.equal(found, activations.swiglu(gate.contiguous(), up.contiguous()))


def test_strides_of_any_kind(device):
    x = values(70, 9, seed=1, spread=3).to(device, torch.float16).T
    bias = values(140, seed=2).to(device, torch.float16)[::2]
    for name in GELUS:
        kernel = vars(activations)[name]
        assert torch.equal(kernel(x, bias), kernel(x.contiguous(), bias.contiguous()))
    assert torch.equal(activations.swiglu(x, x.flip(0)), activations.swiglu(x.contiguous(), x.flip(0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_zero(dtype, device):
    """Nothing becomes NaN that is not; below -100 nothing is left, above 100 everything."""
    x = torch.tensor([-1e4, -200.0, -100.0, 100.0, 200.0, 1e4, torch.nan], device=device).to(dtype)
    found = {name: vars(activations)[name](x, None) for name in GELUS}
    found["swiglu"] = activations.swiglu(x, torch.ones_like(x))
    for y in found.values():
        torch.testing.assert_close(y[:3], torch.zeros_like(y[:3]), rtol=0, atol=1e-30)
        torch.testing.assert_close(y[3:], x[3:], rtol=1e-7, atol=0, equal_nan=True)


def test_nothing_to_do(device):
    nothing = torch.empty(0, 5, device=device)
    assert activations.swiglu(nothing, nothing).shape == (0, 5)
    assert activations.gelu(torch.empty(3, 0, device=device), None).shape == (3, 0)


def test_torch_knows_the_kernels(device):
    x, bias = values(3, 20, seed=1).to(device), values(20, seed=2).to(device)
    torch.library.opcheck(activations.swiglu, (x, x + 1))
    for name in GELUS:
        torch.library.opcheck(vars(activations)[name], (x, bias))
    torch.library.opcheck(activations.gelu, (x, None))


def test_wrong_arguments_are_refused(device):
    x = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match="one shape"):
        activations.swiglu(x, x[:1])
    with pytest.raises(ValueError, match="float16"):
        activations.swiglu(x, x.half())
    with pytest.raises(ValueError, match=r"bias \[4\]"):
        activations.gelu(x, torch.ones(4, device=device))
    with pytest.raises(ValueError, match="float64"):
        activations.quick_gelu(x.double(), None)
