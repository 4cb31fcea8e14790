"""What few_bits.py calls, compiled by Numba for this processor, which must have AVX-512.

The loops over a row are in weight_rows.py; what surrounds them is that of single_row_numba.py, for several rows.
"""

import struct
from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from minivlm.kernels.cpu.compact import BLOCK, Compact
from minivlm.kernels.cpu.compact_numba import parts
from minivlm.kernels.cpu.compiling import (
    FLOATS,
    address,
    address_of,
    float_of_bits,
    keep,
    lines,
    narrow,
    pointer,
    rounded,
    share,
    wide,
)
from minivlm.kernels.cpu.few_bits import AT_ONCE, INT4, INT8, FewBitsLinear
from minivlm.kernels.cpu.openmp import run
from minivlm.kernels.cpu.single_row_numba import SUMS, normalise, silu, step_of
from minivlm.kernels.cpu.weight_rows import COMPACT, SIDE_BY_SIDE, WHOLE, dots
from minivlm.kernels.cpu.weight_rows import INT4 as HALF_BYTES
from minivlm.kernels.cpu.weight_rows import INT8 as INTEGERS


@njit(fastmath=SUMS)
def add_kept(starts, columns, values, x, found):
    """To found [B, N], of rows of which `starts` [N + 1] is a part, x [B, K] by the weights that are kept whole."""
    for i in range(found.shape[1]):
        for at in range(starts[i], starts[i + 1]):
            for b in range(len(found)):
                found[b, i] += values[at] * x[b, columns[at]]


@njit(error_model="numpy")
def to_steps(x, steps, sizes):
    """Rows x [B, P] to steps, uint8 [B, P] with 128 for 0, of a size for each row."""
    for b in range(len(x)):
        sizes[b] = step_of(x[b])
        for j in range(x.shape[1]):
            steps[b, j] = np.uint8(np.int32(np.rint(x[b, j] / sizes[b])) + np.int32(128))


@cache
def linear_kernel(dtype: torch.dtype, form: int, batch: int) -> int:
    """The address of the kernel behind `FewBitsLinear`, for x of a type, a form of weights, and up to so many rows.

    Its arguments: rows, outputs, inputs, 1 with swiglu, how many weights are kept whole, the addresses of x, norm, the
    weight's four parts, see `dots`, a compact one's starts, columns and values, an int8 one's scale, the residual and
    the result, 0 for what is not there, and the bits of eps.
    """
    stored, side, integers, compact = FLOATS[dtype], SIDE_BY_SIDE[batch], form == INTEGERS, form in (COMPACT, WHOLE)

    def kernel(arguments):
        rows, outputs, inputs, swiglu = arguments[0], arguments[1], arguments[2], arguments[3]
        total, padded = outputs * (1 + swiglu), -(-inputs // BLOCK) * BLOCK
        x = carray(pointer(arguments[5]), (rows, inputs), stored)
        norm = carray(pointer(arguments[6]), (inputs if arguments[6] else 0,), stored)
        a, b, c, d = arguments[7], arguments[8], arguments[9], arguments[10]
        starts = carray(pointer(arguments[11]), (total + 1 if compact else 0,), np.int32)
        columns = carray(pointer(arguments[12]), (arguments[4],), np.int32)
        values = carray(pointer(arguments[13]), (arguments[4],), np.float32)
        scale = carray(pointer(arguments[14]), (total if integers else 0,), np.float32)
        residual = carray(pointer(arguments[15]), (rows if arguments[15] else 0, outputs), stored)
        out = carray(pointer(arguments[16]), (rows, outputs), stored)
        begin, end = share(outputs)
        count = end - begin
        unit, found = lines(rows, padded), np.empty((1 + swiglu, batch, count), np.float32)
        for i in range(rows):
            normalise(x[i], norm, float_of_bits(np.uint32(arguments[17])), unit[i])
        steps, sizes = lines(rows, padded // 4).view(np.uint8), np.empty(rows, np.float32)
        source = address(unit)
        if integers:
            to_steps(unit, steps, sizes)
            source = address(steps)
        stride = count // side
        for part in range(1 + swiglu):
            first = begin + part * outputs
            to = address(found[part]) - 4 * first
            for i in range(first, first + stride):
                dots(form, side, batch, a, b, c, d, padded, i, stride, source, rows, to, count)
            for i in range(first + side * stride, first + count):
                dots(form, 1, batch, a, b, c, d, padded, i, 0, source, rows, to, count)
            if compact:
                add_kept(starts[first : first + count + 1], columns, values, unit, found[part, :rows])
            if integers:
                for i in range(rows):
                    for j in range(count):
                        found[part, i, j] = found[part, i, j] * scale[first + j] * sizes[i]
        for i in range(rows):
            for j in range(count):
                value = rounded(found[0, i, j], out)
                if swiglu:
                    value = rounded(rounded(silu(value), out) * rounded(found[1, i, j], out), out)
                if len(residual):
                    value += wide(residual[i, begin + j])
                out[i, begin + j] = narrow(value, out)
        keep(unit)
        keep(steps)

    return address_of(kernel, f"few_rows_{dtype}_{form}_{batch}")


def told(product: FewBitsLinear) -> tuple[int, tuple, tuple, int]:
    """What kernels are told of a product: its weight's form, its sizes, the weight in parts with an int8 one's scale,
    and the bits of eps."""
    weight = product.weight
    if isinstance(weight, Compact):
        form, kept, scale = COMPACT if weight.rest is None else WHOLE, len(weight.values), None
        read = parts(weight)
    else:
        form, kept, scale = {INT8: (INTEGERS, 0, product.scale), INT4: (HALF_BYTES, 0, None)}[product.form]
        read = weight, product.scale, *[None] * 5
    (eps,) = struct.unpack("i", struct.pack("f", product.eps))
    return form, (product.outputs, product.inputs, int(product.swiglu), kept), (*read, scale), eps


def multiply(product: FewBitsLinear, x: Tensor, rows: int, residual: Tensor | None, out: Tensor) -> Tensor:
    """`FewBitsLinear` of so many rows x, into `out`."""
    form, sizes, read, eps = told(product)
    for first in range(0, rows, AT_ONCE):
        count, some = min(AT_ONCE, rows - first), slice(first, first + AT_ONCE)
        kernel = linear_kernel(product.dtype, form, next(n for n in SIDE_BY_SIDE if n >= count))
        x_, residual_, out_ = (t if t is None or rows == 1 else t[some] for t in (x, residual, out))
        run(kernel, count, *sizes, x_, product.norm, *read, residual_, out_, eps)
    return out
