"""What the kernels for rows as tiles have in common, compiled by Numba around AMX: rows x to right tiles, normalised
and of int8 quantised, and what follows the sums of their products.

Of a block of 32 outputs' weights each step of inputs is two left tiles, in each of its parts; sums are
transposed to rows of results.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from numba import carray

from minivlm.kernels.cpu.compiling import FLOATS, KINDS, address, bits_of_float, narrow, pointer, rounded, variant, wide
from minivlm.kernels.cpu.llvm_vectors import LANES
from minivlm.kernels.cpu.results import gate_numbers, scale_numbers, store_numbers
from minivlm.kernels.cpu.single_row_numba import normalise, step_of
from minivlm.kernels.cpu.tiles import STEP, need_registers, tile_columns
from minivlm.kernels.cpu.weight_rows import COMPACT, WHOLE
from minivlm.kernels.cpu.weight_rows import INT8 as INTEGERS

OUTPUTS = 32  # of a block: two tiles of rows of the weight
UPPER, HALF = np.uint32(0xFFFF0000), np.uint32(16)  # a bfloat16 is the upper half of a float32


@cache
def row_tiles(dtype: torch.dtype, form: int) -> SimpleNamespace:
    """What the kernels for some and for many rows are made of, for a type of x and a form of weights.

    right: how many parts x has. size: numbers of a step.
    """
    need_registers()
    kind, integers, compact = FLOATS[dtype], form == INTEGERS, form in (COMPACT, WHOLE)
    right, size = 1 if integers or dtype == torch.bfloat16 else 3, 2 * STEP if integers else STEP

    @variant(dtype, form)
    def opened(arguments):
        """The arguments as arrays: x, norm, starts, columns, values, scale, residual, out, sizes."""
        rows, outputs, inputs, swiglu, kept = arguments[0], arguments[1], arguments[2], arguments[3], arguments[4]
        total = outputs * (1 + swiglu)
        return (
            carray(pointer(arguments[5]), (rows, inputs), kind),
            carray(pointer(arguments[6]), (inputs if arguments[6] else 0,), kind),
            carray(pointer(arguments[11]), (total + 1 if compact else 0,), np.int32),
            carray(pointer(arguments[12]), (kept,), np.int32),
            carray(pointer(arguments[13]), (kept,), np.float32),
            carray(pointer(arguments[14]), (total if integers else 0,), np.float32),
            carray(pointer(arguments[15]), (rows if arguments[15] else 0, outputs), kind),
            carray(pointer(arguments[16]), (rows, outputs), kind),
            carray(pointer(arguments[19]), (rows,), np.float32),
        )

    @variant(dtype, form)
    def pack(x, norm, eps, unit, sizes, packed, side):
        """Up to 16 rows x as the columns of right tiles at an address, one of so many side by side; sizes: of int8 the
        size of a step of each. unit: [16, P] for what is in between."""
        inputs = x.shape[1]
        for i in range(len(x)):
            normalise(x[i], norm, eps, unit[i])
            if integers:
                sizes[i] = step_of(unit[i])
                for j in range(inputs):
                    unit[i, j] = np.rint(unit[i, j] / sizes[i])
        tile_columns(integers, right, address(unit), unit.shape[1], side, packed)

    return SimpleNamespace(right=right, size=size, opened=opened, pack=pack)


@cache
def finishing(dtype: torch.dtype, form: int) -> SimpleNamespace:
    """What follows the sums of both, and is made for a type and a form, too."""
    number, integers = KINDS[dtype], form == INTEGERS

    @variant(dtype, form)
    def finish(sums, at, scale, sizes, residual, out):
        """Sums [P, B, N] of B rows, and of the outputs from number `at` on, to results out [B, V], as many as are
        there; P is 2 of gates, else 1. sizes: [B]; residual: [B, V], or [0, V] for nothing."""
        outputs, gate, up = out.shape[1], address(sums), address(sums) + (len(sums) - 1) * sums.strides[0]
        count = min(sums.shape[2], outputs - at)
        whole, added, to = count // LANES * LANES, address(residual[:, at:]), address(out[:, at:])
        for i in range(len(out)):
            if integers:
                for part in range(len(sums)):
                    here, some = sums[part, i], scale[part * outputs + at :]
                    if whole:
                        scale_numbers(address(here), address(some), sizes[i], whole)
                    for n in range(whole, count):
                        here[n] = np.float32(np.int32(bits_of_float(here[n]))) * some[n] * sizes[i]
            if len(sums) == 2:
                gate_numbers(number, gate, up, count)
            if whole and len(residual):
                store_numbers(number, 1, gate, added, to, whole)
            elif whole:
                store_numbers(number, 0, gate, 0, to, whole)
            for n in range(whole, count):
                value = sums[0, i, n]
                if len(residual):
                    value = rounded(value, out) + wide(residual[i, at + n])
                out[i, at + n] = narrow(value, out)
            gate, up = gate + sums.strides[1], up + sums.strides[1]
            added, to = added + out.strides[0], to + out.strides[0]

    return SimpleNamespace(finish=finish)
