"""What single_row.py calls, compiled by Numba for this processor.

A kernel runs in all of PyTorch's threads at once, see openmp.py; they share the outputs or the key heads.

A number of 16 bits lies in memory as an integer, and is float32 as soon as it is read; `wide` and `narrow` are the ways
there and back. Such a function, that only raises, is a name: Numba compiles what stands below it, under `overload`, for
the types it is called with. Loops are vectorised, those of a sum only where its order may change, see `SUMS`.

Numba keeps what it compiled on the disk, in `__pycache__` or else in the user's cache: it takes two to four seconds a
kernel and type.
"""

import math
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from minivlm.kernels.openmp import KERNEL, run, thread_count, thread_number
from minivlm.kernels.single_row import LEAST_STEP

BLOCK = 32  # keys that are widened to float32 at a time
SUMS = {"reassoc", "contract"}  # what the compiler may change: the order of a sum, and a product that is added
# What stands for each type; of 16 bits one is signed and one is not, only to tell them apart in `wide` and `narrow`.
FLOATS = {torch.float32: np.float32, torch.float16: np.int16, torch.bfloat16: np.uint16}


@cache
def _sources() -> str:
    """A name for the state of the files that compiled code is made of."""
    files = (path for path in Path(__file__).parent.iterdir() if path.suffix == ".py")
    return sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


def address_of(kernel: Callable, name: str) -> int:
    """Compile a kernel, or find it on the disk, by a name of its own: by one name two processes could mix up two, and
    Numba looks for changes only in the file where the kernel is."""
    kernel.__qualname__ = f"{name}_{_sources()}"
    return cfunc(KERNEL, cache=True, error_model="numpy")(kernel).address


# ---- what the language lacks


def _instruction(result: types.Type, argument: types.Type, emit: Callable) -> Callable:
    """A function of one number that is one instruction of LLVM."""

    @intrinsic
    def instruction(context, value):
        return result(argument), lambda context, builder, signature, arguments: emit(builder, *arguments)

    return instruction


BYTE, NUMBER, FLOAT, HALF = ir.IntType(8).as_pointer(), ir.IntType(32), ir.FloatType(), ir.HalfType()
pointer = _instruction(types.voidptr, types.int64, lambda builder, address: builder.inttoptr(address, BYTE))
float_of_bits = _instruction(types.float32, types.uint32, lambda builder, bits: builder.bitcast(bits, FLOAT))
bits_of_float = _instruction(types.uint32, types.float32, lambda builder, value: builder.bitcast(value, NUMBER))
float_of_half = _instruction(
    types.float32, types.int16, lambda builder, bits: builder.fpext(builder.bitcast(bits, HALF), FLOAT)
)
half_of_float = _instruction(
    types.int16, types.float32, lambda builder, value: builder.bitcast(builder.fptrunc(value, HALF), ir.IntType(16))
)


@cfunc(KERNEL, cache=True)
def _count_threads(arguments):
    carray(pointer(arguments[1]), (arguments[0],), np.int64)[thread_number()] += 1


def answering_threads() -> int:
    """How many threads run a kernel."""
    answers = torch.zeros(torch.get_num_threads(), dtype=torch.int64, device="cpu")
    run(_count_threads.address, len(answers), answers.data_ptr())
    return int(answers.sum())


@intrinsic
def prefetch(context, rows, i, j):
    """Have the line of memory with rows[i, j] brought to the caches; any i and j will do."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        item = cgutils.get_item_pointer(context, builder, signature.args[0], array, arguments[1:], wraparound=False)
        function = ir.FunctionType(ir.VoidType(), [BYTE, NUMBER, NUMBER, NUMBER])
        function = builder.module.declare_intrinsic("llvm.prefetch", [BYTE], function)
        to_read, keep, data = (ir.Constant(NUMBER, value) for value in (0, 3, 1))
        builder.call(function, [builder.bitcast(item, BYTE), to_read, keep, data])
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp), generate


def wide(number):
    """float32 of a number as it is stored."""
    raise NotImplementedError


@overload(wide)
def _wide(number):
    if number == types.float32:
        return lambda number: number
    if number == types.int16:
        return lambda number: float_of_half(number)
    return lambda number: float_of_bits(np.uint32(number) << np.uint32(16))  # a bfloat16 is the upper half of a float32


def narrow(value, like):
    """A float32 as it is stored in an array like this one, rounded to the nearest, of two as near to the even one."""
    raise NotImplementedError


@overload(narrow)
def _narrow(value, like):
    if like.dtype == types.float32:
        return lambda value, like: value
    if like.dtype == types.int16:
        return lambda value, like: half_of_float(value)

    def bfloat16(value, like):
        bits = bits_of_float(value)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        return np.uint16(0x7FC0) if value != value else np.uint16(rounded >> np.uint32(16))  # a NaN stays one

    return bfloat16


@njit
def rounded(value, like):
    """A float32 to the nearest of a type."""
    return wide(narrow(value, like))


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


@njit
def share(total):
    """This thread's part of so many: its first, and the one behind its last."""
    return total * thread_number() // thread_count(), total * (thread_number() + 1) // thread_count()


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


@njit
def widen(rows, first, count, out):
    """count rows of a cache [T, C] from the first on, into out [BLOCK, C]; the next are on their way meanwhile."""
    channels = out.shape[1]
    for j in range(count):
        for c in range(0, channels, 64 // rows.itemsize):  # a line of the caches has 64 bytes
            prefetch(rows, first + BLOCK + j, c)
        for c in range(channels):
            out[j, c] = wide(rows[first + j, c])


@njit(fastmath=SUMS)
def score(q, keys, scale, scores):
    """q [G, C] by keys [BLOCK, C] -> scores [G, BLOCK]; four at a time."""
    for g in range(len(q)):
        for j in range(0, BLOCK, 4):
            w = x = y = z = np.float32(0)
            for c in range(q.shape[1]):
                w += q[g, c] * keys[j, c]
                x += q[g, c] * keys[j + 1, c]
                y += q[g, c] * keys[j + 2, c]
                z += q[g, c] * keys[j + 3, c]
            scores[g, j], scores[g, j + 1] = w * scale, x * scale
            scores[g, j + 2], scores[g, j + 3] = y * scale, z * scale


@njit(fastmath=SUMS)
def softmax(scores):
    """e^(s - largest), in place, and their sum."""
    largest, total = scores[0], np.float32(0)
    for j in range(len(scores)):
        largest = max(largest, scores[j])
    for j in range(len(scores)):
        scores[j] = exp(scores[j] - largest)
        total += scores[j]
    return total


@njit(fastmath=SUMS)
def add_values(weights, values, out):
    """The values [BLOCK, C], weighted by weights [G, BLOCK], to out [G, C]; four at a time."""
    for g in range(len(out)):
        for j in range(0, BLOCK, 4):
            w, x, y, z = weights[g, j], weights[g, j + 1], weights[g, j + 2], weights[g, j + 3]
            for c in range(out.shape[1]):
                out[g, c] += w * values[j, c] + x * values[j + 1, c] + y * values[j + 2, c] + z * values[j + 3, c]


@cache
def attention_kernel(dtype: torch.dtype, channels: int) -> int:
    """The address of the kernel behind `RowAttention`.

    Its arguments: key heads, query heads of each, the cache's capacity, position, first visible position, and the
    addresses of q, k and v, cos, sin, the slot's keys, its values, and the result.
    """
    stored, scale = FLOATS[dtype], np.float32(channels**-0.5)

    def kernel(arguments):
        kv_heads, group, capacity = arguments[0], arguments[1], arguments[2]
        position, lo = arguments[3], arguments[4]
        heads, visible = kv_heads * group, position + 1 - lo
        qkv = carray(pointer(arguments[5]), (heads + 2 * kv_heads, channels), stored)
        cos = carray(pointer(arguments[6]), (channels,), stored)
        sin = carray(pointer(arguments[7]), (channels,), stored)
        keys = carray(pointer(arguments[8]), (kv_heads, capacity, channels), stored)
        values = carray(pointer(arguments[9]), (kv_heads, capacity, channels), stored)
        out = carray(pointer(arguments[10]), (heads, channels), stored)
        q, found = np.empty((group, channels), np.float32), np.empty((group, channels), np.float32)
        # The last block may be filled in part. What it held before stays behind the visible keys, and counts for 0.
        block, weights = np.zeros((BLOCK, channels), np.float32), np.empty((group, visible + BLOCK), np.float32)
        sums = np.empty(group, np.float32)
        first, end = share(kv_heads)
        for head in range(first, end):
            turn(qkv[heads + head], cos, sin, block[0])
            for c in range(channels):
                keys[head, position, c] = narrow(block[0, c], keys)
                values[head, position, c] = qkv[heads + kv_heads + head, c]
            for g in range(group):
                turn(qkv[head * group + g], cos, sin, q[g])
            for at in range(0, visible, BLOCK):
                widen(keys[head], lo + at, min(BLOCK, visible - at), block)
                score(q, block, scale, weights[:, at : at + BLOCK])
            for g in range(group):
                sums[g] = softmax(weights[g, :visible])
            weights[:, visible:] = 0
            found[:] = 0
            for at in range(0, visible, BLOCK):
                widen(values[head], lo + at, min(BLOCK, visible - at), block)
                add_values(weights[:, at : at + BLOCK], block, found)
            for g in range(group):
                for c in range(channels):
                    out[head * group + g, c] = narrow(found[g, c] / sums[g], out)

    return address_of(kernel, f"attention_{dtype}_{channels}")
