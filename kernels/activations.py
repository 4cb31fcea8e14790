"""The activations between a block's two matrix products: SwiGLU (Shazeer 2020, eq. 6), and GELU in three forms
(Hendrycks and Gimpel 2016) behind the bias of the product before it.

Shapes:     swiglu: gate and up [..., F] -> [..., F]; of a fused product [gate | up] [..., 2 F] they are its halves,
            `product.chunk(2, -1)`. The GELUs: x [..., F], bias [F] or None -> [..., F]. Any strides; an argument is
            copied first where its leading axes cannot be joined without it.
Dtypes:     float32, float16, bfloat16, the same for all. Rounded where plain PyTorch rounds.
Limits:     fewer than 65536 * 1024 columns.
Bytes:      3 elements read or written per result for SwiGLU, 2 for a GELU.
Operations: about 10 per result, one of them an exponential; erf takes about 20.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from minivlm.kernels.checks import DTYPES, require, require_device

COLUMNS = 1024  # per program: 8 a thread, one 16-byte load of 16-bit numbers


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(gate) is rounded before it is multiplied. Both [..., F] -> [..., F]."""
    return nn.functional.silu(gate) * up


def plain_quick_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """y * sigmoid(1.702 y) of y = x + bias: OpenAI CLIP's approximation. x [..., F], bias [F] -> [..., F]."""
    y = x if bias is None else x + bias
    return y * torch.sigmoid(1.702 * y)


def plain_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """y * (1 + erf(y / sqrt(2))) / 2 of y = x + bias: the exact form. x [..., F], bias [F] -> [..., F]."""
    return nn.functional.gelu(x if bias is None else x + bias)


def plain_gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    """y * (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))) / 2 of y = x + bias. x [..., F], bias [F] -> [..., F]."""
    return nn.functional.gelu(x if bias is None else x + bias, approximate="tanh")


@triton.jit
def silu(x):
    """x * sigmoid(x) of a float32 x, as a quotient: one rounding less."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _swiglu(
    GATE, UP, OUT, stride_gs, stride_gf, stride_us, stride_uf, F, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < F
    dtype = OUT.dtype.element_ty
    gate = tl.load(GATE + row * stride_gs + column * stride_gf, there, 0.0).to(tl.float32)
    up = tl.load(UP + row * stride_us + column * stride_uf, there, 0.0).to(tl.float32)
    out = silu(gate).to(dtype).to(tl.float32) * up
    tl.store(OUT + row * F + column, out.to(dtype), there)


@triton.jit
def _gelu(
    X, BIAS, OUT, stride_xs, stride_xf, stride_b, F,
    FORM: tl.constexpr, BIASED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < F
    dtype = OUT.dtype.element_ty
    x = tl.load(X + row * stride_xs + column * stride_xf, there, 0.0).to(tl.float32)
    if BIASED:
        bias = tl.load(BIAS + column * stride_b, there, 0.0).to(tl.float32)
        x = (x + bias).to(dtype).to(tl.float32)
    if FORM == "quick":
        gate = 1.0 / (1.0 + tl.exp(-(1.702 * x).to(dtype).to(tl.float32)))
        out = x * gate.to(dtype).to(tl.float32)
    elif FORM == "erf":
        out = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # (1 + tanh(u)) / 2 = sigmoid(2 u), which also keeps the digits that 1 + tanh(u) loses for u < 0
        out = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    tl.store(OUT + row * F + column, out.to(dtype), there)


@torch.library.custom_op("minivlm::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The kernel behind `plain_swiglu`: the same arguments, the same [..., F], contiguous."""
    _check(gate, up)
    require(gate.shape == up.shape, f"swiglu: gate {list(gate.shape)}, up {list(up.shape)}, expected one shape")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        width = gate.shape[-1]
        gate, up = gate.reshape(-1, width), up.reshape(-1, width)  # [S, F]
        grid = (gate.shape[0], triton.cdiv(width, COLUMNS))
        _swiglu[grid](gate, up, out, *gate.stride(), *up.stride(), width, COLUMNS=COLUMNS, num_warps=4)
    return out


@torch.library.custom_op("minivlm::quick_gelu", mutates_args=())
def quick_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel behind `plain_quick_gelu`: the same arguments, the same [..., F], contiguous."""
    return _launch_gelu(x, bias, "quick")


@torch.library.custom_op("minivlm::gelu", mutates_args=())
def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel behind `plain_gelu`: the same arguments, the same [..., F], contiguous."""
    return _launch_gelu(x, bias, "erf")


@torch.library.custom_op("minivlm::gelu_tanh", mutates_args=())
def gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel behind `plain_gelu_tanh`: the same arguments, the same [..., F], contiguous."""
    return _launch_gelu(x, bias, "tanh")


@swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@quick_gelu.register_fake
@gelu.register_fake
@gelu_tanh.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


def _launch_gelu(x: Tensor, bias: Tensor | None, form: str) -> Tensor:
    shift = x if bias is None else bias
    _check(x, shift)
    require(
        bias is None or bias.shape == x.shape[-1:],
        f"gelu: x {list(x.shape)}, bias {list(shift.shape)}, expected [..., F] and [F]",
    )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        width = x.shape[-1]
        flat = x.reshape(-1, width)  # [S, F]
        grid = (flat.shape[0], triton.cdiv(width, COLUMNS))
        _gelu[grid](
            flat, shift, out, *flat.stride(), shift.stride(-1), width,
            FORM=form, BIASED=bias is not None, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


def _check(x: Tensor, other: Tensor) -> None:
    require_device(x)
    require(x.dim() > 0, "activations: a tensor without axes, expected [..., F]")
    require(
        x.dtype in DTYPES and other.dtype == x.dtype and other.device == x.device,
        f"activations: {x.dtype} on {x.device} and {other.dtype} on {other.device}, expected one of float32, float16 "
        "and bfloat16 on one device",
    )
