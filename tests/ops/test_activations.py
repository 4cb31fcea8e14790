"""The activations against their formulas in float64."""

import math

import pytest
import torch

from minivlm.ops.activations import ACTIVATIONS

FORMULAS = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_its_formula(name):
    x = torch.linspace(-9, 9, 181)
    expected = [FORMULAS[name](value) for value in x.tolist()]
    assert ACTIVATIONS[name](x).tolist() == pytest.approx(expected, abs=2e-6)


def test_quick_gelu_is_not_gelu():
    """A checkpoint that means one and runs the other is off by 0.02 in every layer."""
    x = torch.linspace(-9, 9, 1801)
    assert float((ACTIVATIONS["gelu"](x) - ACTIVATIONS["quick_gelu"](x)).abs().max()) == pytest.approx(0.02, abs=1e-3)
