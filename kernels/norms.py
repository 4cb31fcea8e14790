"""Normalisation over the last axis, alone or with the residual addition before it: RMSNorm (Zhang and Sennrich 2019,
eq. 4) with Llama's rounding order, and LayerNorm (Ba et al. 2016, eq. 4) with PyTorch's.

Shapes:     x and residual [..., D], weight and bias [D] -> the sum and the normalised, each [..., D]. Any strides;
            x is copied first where its leading axes cannot be joined without it.
Dtypes:     float32, float16, bfloat16, the same for all; mean and variance are in float32.
Limits:     D from 1 to 16384: one program holds one row in its registers.
Bytes:      (2 or, with a residual, 4) elements read or written per element of x: every row passes memory once.
Operations: about 5 per element for RMSNorm, 8 for LayerNorm: memory is all that takes time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from minivlm.kernels.checks import DTYPES, require, require_device

WIDEST = 16384


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x), where x / rms(x) is rounded to x's dtype before it is multiplied. x [..., D] -> [..., D]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x, rounded, and its RMSNorm: two tensors [..., D]."""
    total = residual + x
    return total, plain_rms_norm(total, weight, eps)


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, rounded once. x [..., D] -> [..., D]."""
    return nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def plain_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual + x, rounded, and its LayerNorm: two tensors [..., D]."""
    total = residual + x
    return total, plain_layer_norm(total, weight, bias, eps)


@triton.jit
def _norm(
    X, RESIDUAL, WEIGHT, BIAS, TOTAL, OUT,
    stride_xs, stride_xd, stride_rs, stride_rd, stride_w, stride_b,
    eps,
    D: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """One row. ADD: RESIDUAL and TOTAL are there. LAYER: LayerNorm, and BIAS is there; otherwise RMSNorm."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED)
    there = channel < D
    x = tl.load(X + row * stride_xs + channel * stride_xd, there, 0.0).to(tl.float32)
    if ADD:
        residual = tl.load(RESIDUAL + row * stride_rs + channel * stride_rd, there, 0.0).to(tl.float32)
        total = (residual + x).to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + row * D + channel, total, there)
        x = total.to(tl.float32)  # what the next layer sees is what is normalised
    weight = tl.load(WEIGHT + channel * stride_w, there, 0.0).to(tl.float32)
    if LAYER:
        bias = tl.load(BIAS + channel * stride_b, there, 0.0).to(tl.float32)
        centred = tl.where(there, x - tl.sum(x, 0) / D, 0.0)
        variance = tl.sum(centred * centred, 0) / D
        out = centred * tl.rsqrt(variance + eps) * weight + bias
    else:
        unit = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        out = unit.to(OUT.dtype.element_ty).to(tl.float32) * weight
    tl.store(OUT + row * D + channel, out.to(OUT.dtype.element_ty), there)


@torch.library.custom_op("minivlm::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The kernel behind `plain_rms_norm`: the same arguments, the same [..., D], contiguous."""
    return _launch(x, None, weight, None, eps)[1]


@torch.library.custom_op("minivlm::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The kernel behind `plain_add_rms_norm`: the same arguments, the same two [..., D], contiguous."""
    return _launch(x, residual, weight, None, eps)


@torch.library.custom_op("minivlm::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The kernel behind `plain_layer_norm`: the same arguments, the same [..., D], contiguous."""
    return _launch(x, None, weight, bias, eps)[1]


@torch.library.custom_op("minivlm::add_layer_norm", mutates_args=())
def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The kernel behind `plain_add_layer_norm`: the same arguments, the same two [..., D], contiguous."""
    return _launch(x, residual, weight, bias, eps)


@rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape)


@add_rms_norm.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@layer_norm.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


@add_layer_norm.register_fake
def _(x, residual, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def warps_of(width: int) -> int:
    """16 elements of a row per thread, up to 16 warps: 4096 columns are 8 warps, 1024 are 2."""
    return min(max(triton.next_power_of_2(width) // 512, 1), 16)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float):
    """The sum (x itself where there is no residual) and the normalised."""
    _check(x, residual, weight, bias)
    width = weight.shape[0]
    flat = x.reshape(-1, width)  # [S, D]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    addend = flat if residual is None else residual.reshape(-1, width)
    shift = weight if bias is None else bias
    if x.numel():
        _norm[(flat.shape[0],)](
            flat, addend, weight, shift, total, out,
            *flat.stride(), *addend.stride(), *weight.stride(), *shift.stride(), eps,
            D=width, PADDED=triton.next_power_of_2(width), ADD=residual is not None, LAYER=bias is not None,
            num_warps=warps_of(width),
        )  # fmt: skip
    return total, out


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    require_device(x)
    require(
        x.dim() > 0 and weight.shape == x.shape[-1:] and 0 < x.shape[-1] <= WIDEST,
        f"norm: x {list(x.shape)}, weight {list(weight.shape)}, expected [..., D] and [D], D from 1 to {WIDEST}",
    )
    require(
        (residual is None or residual.shape == x.shape) and (bias is None or bias.shape == weight.shape),
        "norm: residual and bias, expected the shapes of x and weight",
    )
    for tensor in (residual, weight, bias):
        require(
            tensor is None or (tensor.dtype == x.dtype and x.dtype in DTYPES and tensor.device == x.device),
            f"norm: x is {x.dtype} on {x.device}, expected float32, float16 or bfloat16, and the others like it",
        )
