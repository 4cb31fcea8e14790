"""RMSNorm against float64, and its order of rounding."""

import numpy as np
import torch
from numpy.testing import assert_allclose

from minivlm.ops.norms import RMSNorm


def norm_of(width: int, eps: float, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, eps).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(width))
    return norm


def test_equals_float64():
    for scale, eps in ((1.0, 1e-5), (1e-4, 1e-5), (1e3, 1e-6)):  # of the second, eps is the larger part
        norm = norm_of(48, eps, torch.float32)
        x = scale * torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
        wide = x.double().numpy()
        expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * norm.weight.detach().numpy()
        assert_allclose(norm(x).detach(), expected, rtol=1e-6, atol=1e-6)


def test_the_normalised_value_is_rounded_before_the_weight():
    """Multiplying first gives other results in a quarter of the cases."""
    norm = norm_of(512, 1e-5, torch.bfloat16)
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight)
    other = (wide * norm.weight.float()).bfloat16()
    assert 0.15 < (norm(x) != other).float().mean() < 0.35


def test_large_values_do_not_overflow_in_float16():
    x = torch.full((1, 8), 3e4, dtype=torch.float16)  # the square of which float16 does not have
    assert torch.equal(RMSNorm(8, 1e-5).half()(x), torch.ones(1, 8, dtype=torch.float16))
