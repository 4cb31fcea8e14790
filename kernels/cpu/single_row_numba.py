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
    address,
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
def normalise(x, norm, eps, out):
    """x in float32, normalised if there is a norm, to the beginning of out."""
    for j in range(len(x)):
        out[j] = wide(x[j])
    if len(norm):
        squares = np.float32(0)
        for j in range(len(x)):
            squares += out[j] * out[j]
        inverse = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + eps)
        for j in range(len(x)):
            out[j] = rounded(rounded(out[j] * inverse, norm) * wide(norm[j]), norm)


@njit(error_model="numpy")
def silu(x):
    """x / (1 + e^-x); 0 where that is too small for a normal number, NaN of -infinity, as PyTorch has it."""
    return x * np.float32(0) if x < LOWEST else x / (np.float32(1) + exp(-x))


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
        row, found = np.empty(inputs, np.float32), np.empty(end - first, np.float32)
        normalise(x, norm, float_of_bits(np.uint32(arguments[9])), row)
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


def widen(rows, first, count, out):
    """count rows of a cache [T, C] from the first on, into out [BLOCK, W]; the next are on their way meanwhile."""
    raise NotImplementedError


@overload(widen)
def _widen(rows, first, count, out):
    kind = (types.float32, types.int16, types.uint16).index(rows.dtype)

    def whole(rows, first, count, out):
        channels = rows.shape[1]
        if channels == out.shape[1]:
            at, ahead = address(rows) + first * rows.strides[0], BLOCK * rows.strides[0]
            widen_numbers(kind, at, count * channels, ahead, address(out))
        else:
            for j in range(count):
                for c in range(channels):
                    out[j, c] = wide(rows[first + j, c])

    return whole


@njit(error_model="numpy")
def attend(q, keys, values, lo, end, block, weights, out):
    """out [G, W] = what q [G, W], which is scaled, finds in the keys and values [T, C] from lo to the one before end.

    block [BLOCK, W] and weights [G, end - lo or more] are for what is in between.
    """
    visible, row, line = end - lo, block.strides[0], weights.strides[0]
    q_at, block_at = address(q), address(block)
    weights_at, out_at = address(weights), address(out)
    for at in range(0, visible, BLOCK):
        widen(keys, lo + at, min(BLOCK, visible - at), block)
        for g in range(len(q)):
            for j in range(0, BLOCK, 16):
                sixteen_dots(q_at + g * row, block_at + j * row, q.shape[1], weights_at + g * line + 4 * (at + j))
    for g in range(len(q)):
        weights[g, visible:] = weights[g, 0]  # where the last block was not full
        total = softmax(weights[g, :visible], largest(weights_at + g * line, weights.shape[1]))
        for j in range(visible):
            weights[g, j] /= total
        weights[g, visible:] = 0
    out[:] = 0
    for at in range(0, visible, BLOCK):
        count = min(BLOCK, visible - at)
        widen(values, lo + at, count, block)
        block[count:] = 0  # what was there may be no number, and counts for 0
        for g in range(len(q)):
            for j in range(0, BLOCK, 16):
                add_sixteen(weights_at + g * line + 4 * (at + j), block_at + j * row, q.shape[1], out_at + g * row)


@cache
def attention_kernel(dtype: torch.dtype, channels: int) -> int:
    """The address of the kernel behind `RowAttention`, of which each thread takes some key heads of some rows.

    Its arguments: rows, key heads, query heads of each, the cache's capacity, and the addresses of slot, position and
    first visible position of each row; of q, k and v, of cos and sin of all positions, of a layer's keys and values,
    and of the result.
    """
    stored, scale = FLOATS[dtype], np.float32(channels**-0.5)

    def kernel(arguments):
        rows, kv_heads, group, capacity = arguments[0], arguments[1], arguments[2], arguments[3]
        places = carray(pointer(arguments[4]), (rows, 3), np.int64)
        heads, slots, most = kv_heads * group, 0, 0
        for i in range(rows):
            slots, most = max(slots, places[i, 0] + 1), max(most, places[i, 1] + 1 - places[i, 2])
        qkv = carray(pointer(arguments[5]), (rows, heads + 2 * kv_heads, channels), stored)
        cos = carray(pointer(arguments[6]), (capacity, channels), stored)
        sin = carray(pointer(arguments[7]), (capacity, channels), stored)
        keys = carray(pointer(arguments[8]), (slots, kv_heads, capacity, channels), stored)
        values = carray(pointer(arguments[9]), (slots, kv_heads, capacity, channels), stored)
        out = carray(pointer(arguments[10]), (rows, heads, channels), stored)
        width = -(-channels // 16) * 16
        q, found, block = lines(group, width), lines(group, width), lines(BLOCK, width)
        weights = lines(group, (most // BLOCK + 1) * BLOCK + 16)
        first, end = share(rows * kv_heads)
        for unit in range(first, end):
            i, head = unit // kv_heads, unit % kv_heads
            slot, position, lo = places[i, 0], places[i, 1], places[i, 2]
            turn(qkv[i, heads + head], cos[position], sin[position], block[0])
            for c in range(channels):
                keys[slot, head, position, c] = narrow(block[0, c], keys)
                values[slot, head, position, c] = qkv[i, heads + kv_heads + head, c]
            for g in range(group):
                turn(qkv[i, head * group + g], cos[position], sin[position], q[g])
                q[g] *= scale
            attend(q, keys[slot, head], values[slot, head], lo, position + 1, block, weights, found)
            for g in range(group):
                for c in range(channels):
                    out[i, head * group + g, c] = narrow(found[g, c], out)

    return address_of(kernel, f"attention_{dtype}_{channels}")
