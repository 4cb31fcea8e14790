"""The interpreter's bfloat16 as `bf16.py` repairs it, against PyTorch's; and the poison that tests rely on."""

import pytest
import torch
import triton
import triton.language as tl
from problems import poisoned_memory

SPECIAL = (0.0, -0.0, 1.0, 1.00390625, 1.01171875, -3.3e38, 3.4e38, 1e-40, -1e-40, torch.inf, -torch.inf, torch.nan)


@triton.jit
def _convert(X, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(OUT + i, tl.load(X + i).to(tl.float32).to(OUT.dtype.element_ty))


@triton.jit
def _multiply(A, B, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(OUT + at, tl.dot(tl.load(A + at), tl.load(B + at)))


@triton.jit
def _add(X, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(OUT + i, tl.load(X + i) + tl.load(X + i))


@triton.jit
def _sum(X, OUT, N: tl.constexpr):
    tl.store(OUT, tl.sum(tl.load(X + tl.arange(0, N)), 0))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # float16 ends at 65504
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_conversions_round_to_the_nearest_even(source, target, device):
    """Halves between two bfloat16, subnormal numbers, infinities, NaN, and a thousand others."""
    draw = torch.Generator().manual_seed(0)
    x = torch.cat((torch.tensor(SPECIAL), torch.randn(1012, generator=draw))).to(device, source)
    found = torch.empty(len(x), dtype=target, device=device)
    _convert[(1,)](x, found, N=len(x))
    assert torch.equal(found.nan_to_num(7.0), x.to(target).nan_to_num(7.0))
    assert torch.equal(found.isnan(), x.isnan()) and torch.equal(found.signbit()[:11], x.signbit()[:11])


def test_products_are_of_the_values(device):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=draw).to(device, torch.bfloat16) for _ in "ab")
    found = torch.empty(16, 16, device=device)
    _multiply[(1,)](a, b, found, N=16)
    assert (found - a.float() @ b.float()).abs().max() < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in bfloat16")
@pytest.mark.parametrize("kernel", [_add, _sum])
def test_other_arithmetic_is_refused(kernel):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="convert to float32"):
        kernel[(1,)](x, torch.empty_like(x), N=16)


def test_memory_is_poisoned(device):
    with poisoned_memory():
        assert torch.empty(9, device=device).isnan().all()
