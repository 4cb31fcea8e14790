"""The product of a few rows with a large weight matrix, as every step of decoding needs it: each weight is read once
and used 1 to 8 times, so memory is all that takes time. What surrounds the product can come along in the same launch.

Shapes:     x [B, D], weight [V, D] -> [B, V]; with swiglu the weight is [gate | up], and the result [B, V / 2].
Dtypes:     x, norm and residual float32, float16 or bfloat16. The weight of the same dtype, or int8 with scale [V],
            or int4 as uint8 [V, D / 2] with scale [V, D / 128] (`quantise.py`). Sums are in float32.
Limits:     B from 1 to 8. Neighbouring inputs of x, norm and weight lie side by side; rows may have any stride.
Bytes:      V D weights of 4, 2, 1 or about 0.52 bytes; x, the norm's weight and the result beside them are small.
Operations: 2 B V D.

One program computes BLOCK_N outputs over one part of the inner dimension. One row is multiplied elementwise and
summed at the end; more rows, padded to the 16 that tensor cores take, are a matrix product. Where V is too small to
keep a chip busy the inner dimension is cut into parts, whose sums a second kernel adds in order: the result depends
neither on the chip nor on the run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from minivlm.kernels.activations import plain_swiglu, silu
from minivlm.kernels.checks import DTYPES, require, require_device
from minivlm.kernels.norms import plain_rms_norm
from minivlm.kernels.quantise import GROUP, dequantise_int4, dequantise_int8

MOST_ROWS = 8
PROGRAMS = 264  # to aim for: two for each multiprocessor of the largest Hopper chips, whatever chip it is
SHORTEST = 512  # inner dimension of a part
FINISH_N = 256  # outputs per program of the second kernel


@dataclass(frozen=True)
class Shape:
    """A launch: BLOCK_N outputs by BLOCK_K inputs at a time, by `warps` warps with `stages` blocks under way."""

    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int


def shape_of(x: torch.dtype, weight: torch.dtype, rows: int) -> Shape:
    """The launch for these dtypes and number of rows; a group of int4 is one block of the inner dimension."""
    if weight == torch.uint8:
        return Shape(32, GROUP, 4, 6)
    if rows == 1:
        return Shape(16, 512 if weight == torch.int8 else 256, 4, 3)
    return Shape(16, 64, 4, 4) if x == torch.float32 else Shape(32, 128, 4, 4)


def parts_of(outputs: int, inputs: int, shape: Shape) -> tuple[int, int]:
    """Into how many parts the inner dimension is cut, and the length of one, a multiple of BLOCK_K.

    Example: 1024 outputs in blocks of 16 are 64 programs; 4096 inputs cut in 5 make them 320, of 1024 inputs each:
    so 4 parts suffice.
    """
    blocks = triton.cdiv(outputs, shape.BLOCK_N)
    wanted = max(min(triton.cdiv(PROGRAMS, blocks), inputs // SHORTEST), 1)
    length = triton.cdiv(triton.cdiv(inputs, wanted), shape.BLOCK_K) * shape.BLOCK_K
    return triton.cdiv(inputs, length), length


def plain_skinny_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    """x W^T of a few rows, perhaps of the RMSNorm of x, perhaps through SwiGLU, perhaps added to a residual.

    Args:
        x: [B, D].
        weight: [V, D] of x's dtype, int8 [V, D], or uint8 [V, D / 2].
        scale: of a quantised weight, None otherwise.
        norm: the weight [D] of an RMSNorm of x, or None; eps is its epsilon.
        residual: what the result is added to, or None.
        swiglu: the product is [gate | up], and the result silu(gate) * up.

    Returns [B, V], or [B, V / 2] with swiglu.
    """
    if norm is not None:
        x = plain_rms_norm(x, norm, eps)
    if weight.dtype == x.dtype:
        product = nn.functional.linear(x, weight)
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        dequantise = dequantise_int8 if weight.dtype == torch.int8 else dequantise_int4
        product = nn.functional.linear(x.to(wide), dequantise(weight, scale).to(wide)).to(x.dtype)
    if swiglu:
        product = plain_swiglu(*product.chunk(2, dim=-1))
    return product if residual is None else residual + product


@triton.jit
def _inverse_rms(X, stride_x, row, B, eps, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / rms of each row of x: [ROWS, 1]."""
    squares = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
    for k in range(0, D, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(X + row * stride_x + inner, (row < B) & (inner < D), 0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 1)[:, None] / D + eps)


@triton.jit
def _inputs(X, NORM, stride_x, row, inner, B, inverse, D: tl.constexpr, NORMED: tl.constexpr):
    """x [ROWS, len(inner)], normalised where it must be; zeros outside."""
    x = tl.load(X + row * stride_x + inner, (row < B) & (inner < D), 0.0)
    if NORMED:
        weight = tl.load(NORM + inner, inner < D, 0.0).to(tl.float32)
        x = ((x.to(tl.float32) * inverse).to(x.dtype).to(tl.float32) * weight).to(x.dtype)
    return x


@triton.jit
def _multiply_add(x, w, acc, ROWS: tl.constexpr):
    """acc + x w^T for x [ROWS, k], w [n, k]; of a single row the sum over k, which comes last: acc is [n, k]."""
    if ROWS == 1:
        acc += x.to(tl.float32) * w.to(tl.float32)
    else:
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
    return acc


@triton.jit
def _finish(
    acc, SCALE, RESIDUAL, OUT, stride_r, row, n, B, V,
    FORMAT: tl.constexpr, SWIGLU: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """From the sums acc [ROWS, len(n)] of the outputs n to the result. With SWIGLU, n goes gate 0, up 0, gate 1, .."""
    dtype = OUT.dtype.element_ty
    if FORMAT == "int8":
        scale_at = n // 2 + n % 2 * (V // 2) if SWIGLU else n
        acc *= tl.load(SCALE + scale_at, n < V, 0.0)[None, :]
    out = acc.to(dtype).to(tl.float32)
    width = V
    column = n
    if SWIGLU:
        gate, up = tl.split(tl.reshape(out, [acc.shape[0], acc.shape[1] // 2, 2]))  # [ROWS, len(n) / 2]
        out = (silu(gate).to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
        width = V // 2
        column = tl.min(n, 0) // 2 + tl.arange(0, acc.shape[1] // 2)
    there = (row < B) & (column < width)[None, :]
    if ADD:
        out += tl.load(RESIDUAL + row * stride_r + column[None, :], there, 0.0).to(tl.float32)
    tl.store(OUT + row * width + column[None, :], out.to(dtype), there)


@triton.jit
def _skinny(
    X, W, SCALE, NORM, RESIDUAL, SUMS, OUT, stride_x, stride_w, stride_r, B, V, eps, length,
    D: tl.constexpr, FORMAT: tl.constexpr, NORMED: tl.constexpr, SWIGLU: tl.constexpr, ADD: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)[:, None]
    # With SWIGLU a program owns the gates and the ups of the same outputs: n counts gate 0, up 0, gate 1, up 1, ..
    w_row = n // 2 + n % 2 * (V // 2) if SWIGLU else n
    w_row = tl.where(n < V, w_row, 0).to(tl.int64)[:, None]  # a row that is there; its result is not stored
    inverse = 0.0
    if NORMED:
        inverse = _inverse_rms(X, stride_x, row, B, eps, D, BLOCK_K)
    # ROWS == 1 keeps what it multiplies by itself and sums at the end.
    LANES: tl.constexpr = BLOCK_K // 2 if FORMAT == "int4" else BLOCK_K
    acc = tl.zeros([BLOCK_N if ROWS == 1 else ROWS, LANES if ROWS == 1 else BLOCK_N], tl.float32)
    lane = tl.arange(0, LANES)[None, :]
    for k in tl.range(part * length, tl.minimum(part * length + length, D), BLOCK_K, num_stages=STAGES):
        x = _inputs(X, NORM, stride_x, row, k + lane, B, inverse, D, NORMED)
        if FORMAT == "int4":  # one group: 64 bytes, whose halves meet the inputs k .. k + 63 and k + 64 .. k + 127
            both = tl.load(W + w_row * stride_w + k // 2 + lane)
            scale = tl.load(SCALE + w_row * (D // BLOCK_K) + k // BLOCK_K).to(tl.float32)  # [BLOCK_N, 1]
            products = _multiply_add(x, (both & 15).to(tl.int8) - 8, tl.zeros_like(acc), ROWS)
            x = _inputs(X, NORM, stride_x, row, k + LANES + lane, B, inverse, D, NORMED)
            products = _multiply_add(x, (both >> 4).to(tl.int8) - 8, products, ROWS)
            acc += products * (scale if ROWS == 1 else tl.trans(scale))
        else:
            w = tl.load(W + w_row * stride_w + k + lane, k + lane < D, 0)
            acc = _multiply_add(x, w, acc, ROWS)
    if ROWS == 1:
        acc = tl.sum(acc, 1)[None, :]  # [ROWS, BLOCK_N]
    if PARTS == 1:
        _finish(acc, SCALE, RESIDUAL, OUT, stride_r, row, n, B, V, FORMAT, SWIGLU, ADD)
    else:
        tl.store(SUMS + (part * B + row) * V + n[None, :], acc, (row < B) & (n < V)[None, :])


@triton.jit
def _add_parts(
    SUMS, SCALE, RESIDUAL, OUT, stride_r, B, V,
    FORMAT: tl.constexpr, SWIGLU: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """SUMS [PARTS, B, V] -> OUT, one row per program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) + tl.arange(0, 1)[:, None]
    acc = tl.zeros([1, BLOCK_N], tl.float32)
    for part in range(PARTS):
        acc += tl.load(SUMS + (part * B + row) * V + n[None, :], (n < V)[None, :], 0.0)
    _finish(acc, SCALE, RESIDUAL, OUT, stride_r, row, n, B, V, FORMAT, SWIGLU, ADD)


@torch.library.custom_op("minivlm::skinny_linear", mutates_args=())
def skinny_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    """The kernel behind `plain_skinny_linear`: the same arguments, the same result, contiguous."""
    _check(x, weight, scale, norm, residual, swiglu)
    (rows, inputs), outputs = x.shape, weight.shape[0]
    out = torch.empty(rows, outputs // 2 if swiglu else outputs, dtype=x.dtype, device=x.device)
    shape = shape_of(x.dtype, weight.dtype, rows)
    parts, length = parts_of(outputs, inputs, shape)
    sums = torch.empty(parts if parts > 1 else 0, rows, outputs, dtype=torch.float32, device=x.device)
    added = out if residual is None else residual
    ends = {
        "FORMAT": {torch.int8: "int8", torch.uint8: "int4"}.get(weight.dtype, "float"),
        "SWIGLU": swiglu,
        "ADD": residual is not None,
        "PARTS": parts,
    }
    scales = weight if scale is None else scale
    _skinny[(triton.cdiv(outputs, shape.BLOCK_N), parts)](
        x, weight, scales, x if norm is None else norm, added, sums, out,
        x.stride(0), weight.stride(0), added.stride(0), rows, outputs, eps, length,
        D=inputs, NORMED=norm is not None, ROWS=1 if rows == 1 else 16,
        BLOCK_N=shape.BLOCK_N, BLOCK_K=shape.BLOCK_K, STAGES=shape.stages, num_warps=shape.warps, **ends,
    )  # fmt: skip
    if parts > 1:
        grid = (triton.cdiv(outputs, FINISH_N), rows)
        _add_parts[grid](
            sums, scales, added, out, added.stride(0), rows, outputs, BLOCK_N=FINISH_N, num_warps=4, **ends
        )
    return out


@skinny_linear.register_fake
def _(x, weight, scale, norm, eps, residual, swiglu):
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if swiglu else weight.shape[0])


def _check(x, weight, scale, norm, residual, swiglu) -> None:
    require_device(x)
    require(
        x.dim() == 2 and weight.dim() == 2 and 1 <= x.shape[0] <= MOST_ROWS and x.shape[1] > 0 and weight.shape[0] > 0,
        f"skinny: x {list(x.shape)}, weight {list(weight.shape)}, expected [B, D] and [V, D], B from 1 to {MOST_ROWS}",
    )
    (rows, inputs), outputs = x.shape, weight.shape[0]
    # What belongs to each kind of weight: its own inner length, and the shape of its scale.
    kinds = {x.dtype: (inputs, None), torch.int8: (inputs, (outputs,))}
    kinds[torch.uint8] = (inputs // 2, (outputs, inputs // GROUP))
    require(
        x.dtype in DTYPES and weight.dtype in kinds,
        f"skinny: x {x.dtype}, weight {weight.dtype}, expected float32, float16 or bfloat16, and that, int8 or uint8",
    )
    inner, scale_shape = kinds[weight.dtype]
    found = None if scale is None else tuple(scale.shape)
    require(
        weight.shape[1] == inner and found == scale_shape and (weight.dtype != torch.uint8 or inputs % GROUP == 0),
        f"skinny: x {list(x.shape)}, {weight.dtype} weight {list(weight.shape)}, scale {found}, expected {inner} inner "
        f"columns and scale {scale_shape}" + (f", D a multiple of {GROUP}" if weight.dtype == torch.uint8 else ""),
    )
    require(scale is None or scale.is_contiguous(), "skinny: scale is strided, expected contiguous")
    require(not swiglu or outputs % 2 == 0, f"skinny: {outputs} outputs, expected an even number for [gate | up]")
    result = (rows, outputs // 2 if swiglu else outputs)
    for name, tensor, expected in (("norm", norm, (inputs,)), ("residual", residual, result)):
        require(
            tensor is None or (tensor.shape == expected and tensor.dtype == x.dtype),
            f"skinny: {name} of another shape or dtype, expected {x.dtype} {list(expected)}",
        )
    for tensor in (x, weight, norm, residual):
        require(tensor is None or tensor.stride(-1) == 1, "skinny: an inner axis is strided, expected stride 1")
    for tensor in (weight, scale, norm, residual):
        require(tensor is None or tensor.device == x.device, f"skinny: a tensor is not on {x.device}, where x is")
