"""Rotary positions against complex rotation in float64."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from minivlm.ops.rope import rope_table, rotate


def turned(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """The paper's eq. 34: channels c and c + C/2 are one complex number, multiplied by exp(i m theta_c)."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize("theta", (1e4, 1e6))
@pytest.mark.parametrize("head_dim", (2, 6, 128))
def test_rotation_is_that_of_complex_numbers(head_dim, theta):
    generator = np.random.default_rng(head_dim)
    x, positions = generator.standard_normal((9, 3, head_dim)), np.array([0, 1, 2, 3, 7, 50, 51, 200, 999])
    table = rope_table(torch.from_numpy(positions), head_dim, theta, torch.float32)
    found = rotate(torch.from_numpy(x).float(), *table)
    assert_allclose(found, turned(x, positions, theta), atol=1e-3)  # an angle of 999 is known to 6e-5
    assert_allclose(found[:4], turned(x, positions, theta)[:4], atol=2e-6)


def test_products_depend_on_the_distance_of_positions_only():
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    products = []
    for position in (0, 5, 40):
        rotated = [
            rotate(x, *rope_table(torch.tensor([at]), 16, 1e4, torch.float32))
            for x, at in ((q, position + 3), (k, position))
        ]
        products.append(float((rotated[0] * rotated[1]).sum()))
    assert products == pytest.approx([products[0]] * 3, abs=1e-5)
    assert products[0] != pytest.approx(float((q * k).sum()), abs=1e-2)


def test_angles_are_float32_whatever_the_models_type():
    """In bfloat16 the positions 1000 and 1001 would be one, and 2999 would be 2992."""
    positions = torch.tensor([1000, 1001, 2999])
    wide, narrow = (rope_table(positions, 64, 1e6, dtype) for dtype in (torch.float32, torch.bfloat16))
    for exact, rounded in zip(wide, narrow, strict=True):
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())
    assert not torch.equal(narrow[0][0], narrow[0][1])
