"""Products with plain weights at every number of rows where another form begins, against float64."""

import pytest
import torch
from torch.nn.functional import linear, silu

from minivlm.ops import cpu_products
from minivlm.ops.cpu_products import MLP_ACROSS, mlp_across, of_rows, product

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 31, 48, 49, 63, 64, 65, 130)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    eps = torch.finfo(found.dtype).eps
    if found.shape != expected.shape or not len(found):
        return found.shape == expected.shape
    return float((found.double() - expected).abs().max()) <= 4 * eps * float(expected.abs().max())


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("columns", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows(dtype, columns, biased):
    weight, bias = numbers(40, 24, dtype=dtype), numbers(40, dtype=dtype) if biased else None
    if columns:
        weight = weight.t().contiguous().t()
    for rows in ROWS:
        x = numbers(rows, 24, dtype=dtype)
        expected = linear(x.double(), weight.double(), None if bias is None else bias.double())
        found = product(x, weight, bias)
        assert found.is_contiguous() and near(found, expected), rows
        assert near(product(x.view(1, rows, 24), weight, bias)[0], expected), rows
        assert near(of_rows(weight, bias)(x), expected), rows
        if not rows:
            continue
        strided = torch.cat((x, x), dim=1).t().contiguous().t()[:, :24]
        assert near(of_rows(weight, bias)(strided), expected), rows
        assert torch.equal(x, numbers(rows, 24, dtype=dtype))


@pytest.mark.parametrize("dtype", MLP_ACROSS)
def test_the_mlp_of_rows_is_that_of_plain_products(dtype):
    gate, up, down = numbers(40, 24, dtype=dtype), numbers(40, 24, dtype=dtype) + 1, numbers(24, 40, dtype=dtype)
    wide = [weight.double() for weight in (gate, up, down)]
    for rows in sorted({2, 3, 8, 9, 65, MLP_ACROSS[dtype][0], MLP_ACROSS[dtype][-1]}):
        x = numbers(rows, 24, dtype=dtype)
        exact = linear(silu(linear(x.double(), wide[0])) * linear(x.double(), wide[1]), wide[2])
        plain = linear(silu(linear(x, gate)) * linear(x, up), down)
        found = mlp_across(x, gate, up, down)
        assert found.shape == (rows, 24)
        error, theirs = ((y.double() - exact).abs().max() for y in (found, plain))
        assert error <= 1.5 * theirs + torch.finfo(dtype).eps, rows


def test_few_rows_do_not_copy_the_weight(monkeypatch):
    """It is the left factor: the right one is what a library copies."""
    weight, x, seen = numbers(40, 24, dtype=torch.bfloat16), numbers(5, 24, dtype=torch.bfloat16), []
    multiply = torch.mm
    monkeypatch.setattr(cpu_products.torch, "mm", lambda a, b: seen.append((a is weight, b.shape)) or multiply(a, b))
    product(x, weight, None)
    assert seen == [(True, (24, 8))]  # five rows as eight
