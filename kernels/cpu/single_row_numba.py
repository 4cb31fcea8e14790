"""What single_row.py calls, compiled by Numba for this processor.

A kernel runs in all of PyTorch's threads at once, see openmp.py; they share the outputs or the key heads. Loops are
vectorised, those of a sum only where its order may change, see `SUMS`.
"""

import math
from functools import cache

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import overload

from minivlm.kernels.cpu.cache_rows import add_sixteen, largest, sixteen_dots, widen_numbers
from minivlm.kernels.cpu.compiling import (
    FLOATS,
    address_of,
    float_of_bits,
    lines,
    narrow,
    pointer,
    rounded,
    share,
    wide,
)
from minivlm.kernels.cpu.single_row import LEAST_STEP

BLOCK = 32  # keys that are widened to float32 at a time
SUMS = {"reassoc", "contract"}  # what the compiler may change: the order of a sum, and a product that is added
LOG2_E = np.float32(math.log2(math.e))
LN2_HIGH = np.float32(0.693359375)  # ln 2 to 9 bits: a multiple of it by a small integer is exact
LN2_LOW = np.float32(math.log(2) - 0.693359375)
LOWEST, HIGHEST = np.float32(-87), np.float32(88)  # of what has a normal number in float32
TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(8))


@njit
def exp(x):
    """e^x in float32, relative error below 2e-7, in operations that the compiler does for many x at once.

    x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its series, and 2^n is a float32 whose exponent is n.
    """
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    n = np.rint(x * LOG2_E)
    r = x - n * LN2_HIGH - n * LN2_LOW
    c0, c1, c2, c3, c4, c5, c6, c7 = TAYLOR
    series = c0 + r * (c1 + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))))
    return series * float_of_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


# ---- products


def add_product(total, weight, number):
    """A sum plus the product of a weight and a number: of float32, or of two int8 to an int32."""
    raise NotImplementedError


@overload(add_product, jit_options={"fastmath": SUMS})
def _add_product(total, weight, number):
    if weight == types.int8:  # without int32 around all of it Numba computes in 64 bits
        return lambda total, weight, number: np.int32(total + np.int32(np.int32(weight) * np.int32(number)))
    return lambda total, weight, number: total + wide(weight) * number


@njit(fastmath=SUMS)
def dot_rows(weight, x, out):
    """out [n] = weight [n, K] by x [K]. Eight distant rows side by side, a to h: eight streams of addresses come sooner
    than one. GB/s by 1 / 2 / 4 / 8 / 16 of bfloat16 5632x1024: 8.4 / 10.6 / 11.6 / 13.0 / 12.8."""
    n, inputs = weight.shape
    eighth = n // 8
    for i in range(eighth):
        a = b = c = d = e = f = g = h = out.dtype.type(0)
        for j in range(inputs):
            number = x[j]
            a = add_product(a, weight[i, j], number)
            b = add_product(b, weight[i + eighth, j], number)
            c = add_product(c, weight[i + 2 * eighth, j], number)
            d = add_product(d, weight[i + 3 * eighth, j], number)
            e = add_product(e, weight[i + 4 * eighth, j], number)
            f = add_product(f, weight[i + 5 * eighth, j], number)
            g = add_product(g, weight[i + 6 * eighth, j], number)
            h = add_product(h, weight[i + 7 * eighth, j], number)
        out[i], out[i + eighth], out[i + 2 * eighth], out[i + 3 * eighth] = a, b, c, d
        out[i + 4 * eighth], out[i + 5 * eighth], out[i + 6 * eighth], out[i + 7 * eighth] = e, f, g, h
    for i in range(8 * eighth, n):
        a = out.dtype.type(0)
        for j in range(inputs):
            a = add_product(a, weight[i, j], x[j])
        out[i] = a


@njit(fastmath=SUMS)
def step_of(x):
    """The step of 127 that reach from 0 to the largest value of x; NaN if one is NaN or infinite."""
    largest = nothing = np.float32(0)
    for j in range(len(x)):
        largest = max(largest, abs(x[j]))  # which forgets NaN
        nothing += x[j] - x[j]
    return max(largest / np.float32(127), np.float32(LEAST_STEP)) + nothing


def multiply(weight, scale, x, out, like):
    """out [n] = weight [n, K] by x [K], x and out in float32 but rounded to the type of `like`; scale [n] of int8."""
    raise NotImplementedError


@overload(multiply, jit_options={"error_model": "numpy"})
def _multiply(weight, scale, x, out, like):
    def floats(weight, scale, x, out, like):
        dot_rows(weight, x, out)
        for i in range(len(out)):
            out[i] = rounded(out[i], like)

    def integers(weight, scale, x, out, like):
        step = step_of(x)
        steps, sums = np.empty(len(x), np.int8), np.empty(len(out), np.int32)
        for j in range(len(x)):
            steps[j] = np.int8(np.rint(x[j] / step))
        dot_rows(weight, steps, sums)
        for i in range(len(out)):
            out[i] = rounded(np.float32(sums[i]) * scale[i] * step, like)

    return integers if weight.dtype == types.int8 else floats


@njit(fastmath=SUMS, error_model="numpy")
def normalised(x, norm, eps):
    """x in float32, normalised if there is a norm."""
    out = np.empty(len(x), np.float32)
    squares = np.float32(0)
    for j in range(len(x)):
        out[j] = wide(x[j])
        squares += out[j] * out[j]
    if len(norm):
        inverse = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + eps)
        for j in range(len(x)):
            out[j] = rounded(rounded(out[j] * inverse, norm) * wide(norm[j]), norm)
    return out


@njit(error_model="numpy")
def silu(x):
    """x / (1 + e^-x); 0 where that is too small for a normal number."""
    return np.float32(0) if x < LOWEST else x / (np.float32(1) + exp(-x))


@cache
def linear_kernel(dtype: torch.dtype, quantised: bool) -> int:
    """The address of the kernel behind `RowLinear`, for x of a type and weights of the same or in 8 bits.

    Its arguments: outputs, inputs, 1 with swiglu, the addresses of x, norm, weight, scale, residual and the result, 0
    for what is not there, and the bits of eps.
    """
    stored = FLOATS[dtype]
    stored_weight = np.int8 if quantised else stored

    def kernel(arguments):
        outputs, inputs, swiglu = arguments[0], arguments[1], arguments[2]
        x = carray(pointer(arguments[3]), (inputs,), stored)
        norm = carray(pointer(arguments[4]), (inputs if arguments[4] else 0,), stored)
        weight = carray(pointer(arguments[5]), (outputs * (1 + swiglu), inputs), stored_weight)
        scale = carray(pointer(arguments[6]), (outputs * (1 + swiglu) if arguments[6] else 0,), np.float32)
        residual = carray(pointer(arguments[7]), (outputs if arguments[7] else 0,), stored)
        out = carray(pointer(arguments[8]), (outputs,), stored)
        first, end = share(outputs)
        row = normalised(x, norm, float_of_bits(np.uint32(arguments[9])))
        found = np.empty(end - first, np.float32)
        multiply(weight[first:end], scale[first:end], row, found, out)
        if swiglu:
            up = np.empty(end - first, np.float32)
            multiply(weight[outputs + first : outputs + end], scale[outputs + first : outputs + end], row, up, out)
            for i in range(end - first):
                found[i] = rounded(silu(found[i]), out) * up[i]
        if len(residual):
            for i in range(end - first):
                found[i] = wide(residual[first + i]) + rounded(found[i], out)
        for i in range(end - first):
            out[first + i] = narrow(found[i], out)

    return address_of(kernel, f"linear_{dtype}_{quantised}")


# ---- attention


@njit
def turn(x, cos, sin, out):
    """x [C] by a position's angles, into out in float32; sin has the sign of its channel."""
    half = len(x) // 2
    for c in range(half):
        low, high = wide(x[c]), wide(x[c + half])
        out[c] = rounded(rounded(low * wide(cos[c]), x) + rounded(high * wide(sin[c]), x), x)
        d = c + half
        out[d] = rounded(rounded(high * wide(cos[d]), x) + rounded(low * wide(sin[d]), x), x)


@njit(fastmath=SUMS)
def softmax(scores, most):
    """e^(s - most), in place, and their sum."""
    total = np.float32(0)
    for j in range(len(scores)):
        scores[j] = exp(scores[j] - most)
        total += scores[j]
    return total


def widen(kind, rows, first, count, out):
    """count rows of a cache [T, C] from the first on, into out [BLOCK, W]; the next are on their way meanwhile. kind is
    that of `widen_numbers`."""
    raise NotImplementedError


@overload(widen, prefer_literal=True)
def _widen(kind, rows, first, count, out):
    def whole(kind, rows, first, count, out):
        channels = rows.shape[1]
        if channels == out.shape[1]:
            at, ahead = np.int64(rows.ctypes.data) + first * rows.strides[0], BLOCK * rows.strides[0]
            widen_numbers(kind, at, count * channels, ahead, np.int64(out.ctypes.data))
        else:
            for j in range(count):
                for c in range(channels):
                    out[j, c] = wide(rows[first + j, c])

    return whole


@cache
def attention_kernel(dtype: torch.dtype, channels: int) -> int:
    """The address of the kernel behind `RowAttention`.

    Its arguments: key heads, query heads of each, the cache's capacity, and the addresses of slot, position and first
    visible position; of q, k and v, of cos and sin of all positions, of a layer's keys and values, and of the result.
    """
    stored, scale, kind = FLOATS[dtype], np.float32(channels**-0.5), list(FLOATS).index(dtype)

    def kernel(arguments):
        kv_heads, group, capacity = arguments[0], arguments[1], arguments[2]
        place = carray(pointer(arguments[3]), (3,), np.int64)
        slot, position, lo = place[0], place[1], place[2]
        heads, visible = kv_heads * group, position + 1 - lo
        qkv = carray(pointer(arguments[4]), (heads + 2 * kv_heads, channels), stored)
        cos = carray(pointer(arguments[5]), (capacity, channels), stored)[position]
        sin = carray(pointer(arguments[6]), (capacity, channels), stored)[position]
        keys = carray(pointer(arguments[7]), (slot + 1, kv_heads, capacity, channels), stored)[slot]
        values = carray(pointer(arguments[8]), (slot + 1, kv_heads, capacity, channels), stored)[slot]
        out = carray(pointer(arguments[9]), (heads, channels), stored)
        width = -(-channels // 16) * 16
        # The last block may be filled in part. What it held before stays behind the visible keys, and counts for 0.
        q, found, block = lines(group, width), lines(group, width), lines(BLOCK, width)
        weights = lines(group, (visible // BLOCK + 1) * BLOCK + 16)
        sums, row = np.empty(group, np.float32), 4 * width
        q_at, block_at = np.int64(q.ctypes.data), np.int64(block.ctypes.data)
        weights_at, found_at = np.int64(weights.ctypes.data), np.int64(found.ctypes.data)
        first, end = share(kv_heads)
        for head in range(first, end):
            turn(qkv[heads + head], cos, sin, block[0])
            for c in range(channels):
                keys[head, position, c] = narrow(block[0, c], keys)
                values[head, position, c] = qkv[heads + kv_heads + head, c]
            for g in range(group):
                turn(qkv[head * group + g], cos, sin, q[g])
                q[g] *= scale
            for at in range(0, visible, BLOCK):
                widen(kind, keys[head], lo + at, min(BLOCK, visible - at), block)
                for g in range(group):
                    for j in range(0, BLOCK, 16):
                        to = weights_at + g * weights.strides[0] + 4 * (at + j)
                        sixteen_dots(q_at + g * row, block_at + j * row, width, to)
            for g in range(group):
                weights[g, visible:] = weights[g, 0]
                sums[g] = softmax(weights[g, :visible], largest(weights_at + g * weights.strides[0], weights.shape[1]))
            weights[:, visible:] = 0
            found[:] = 0
            for at in range(0, visible, BLOCK):
                widen(kind, values[head], lo + at, min(BLOCK, visible - at), block)
                for g in range(group):
                    for j in range(0, BLOCK, 16):
                        of = weights_at + g * weights.strides[0] + 4 * (at + j)
                        add_sixteen(of, block_at + j * row, width, found_at + g * row)
            for g in range(group):
                for c in range(channels):
                    out[head * group + g, c] = narrow(found[g, c] / sums[g], out)

    return address_of(kernel, f"attention_{dtype}_{channels}")
