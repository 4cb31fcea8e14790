"""What attention does to rows of a cache and of scores, 16 numbers at a time, as functions for what Numba compiles.

The sum of one vector's numbers takes eight instructions; here 16 such sums are made together.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minivlm.kernels.cpu.llvm_vectors import (
    ADDED,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    HALVES,
    I64,
    LANES,
    NUMBERS,
    VECTOR,
    all_of,
    at_address,
    load,
    loop,
    prefetch,
    reduced,
    times,
)


@intrinsic(prefer_literal=True)
def widen_numbers(context, kind, numbers, count, ahead, out):
    """So many numbers, a multiple of 16, to float32; kind is a constant, FLOAT32 or another of them.
    What is so many bytes ahead is on its way to the caches meanwhile."""

    def generate(context, builder, signature, arguments):
        _, numbers, count, ahead, out = arguments
        size = 4 if kind.literal_value == FLOAT32 else 2

        def step(_, at):
            offset = times(builder, at, size)
            prefetch(builder, numbers, builder.add(offset, ahead))
            if kind.literal_value == BFLOAT16:
                wide = builder.shl(builder.zext(load(builder, numbers, offset, HALVES), NUMBERS), all_of(NUMBERS, 16))
            elif kind.literal_value == FLOAT16:
                wide = builder.fpext(load(builder, numbers, offset, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
            else:
                wide = load(builder, numbers, offset, VECTOR)
            builder.store(wide, at_address(builder, out, times(builder, at, 4), wide.type), align=4)
            return []

        loop(builder, count, [], step, LANES)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 4), generate


@intrinsic
def sixteen_dots(context, x, rows, width, out):
    """x by 16 rows that lie one behind the other, all float32 of so many numbers, a multiple of 16 -> float32 [16]."""

    def generate(context, builder, signature, arguments):
        x, rows, width, out = arguments
        size = times(builder, width, 4)
        lines = [builder.add(rows, times(builder, size, i)) for i in range(LANES)]

        def step(sums, at):
            offset = times(builder, at, 4)
            number = load(builder, x, offset, VECTOR)
            products = (builder.fmul(number, load(builder, line, offset, VECTOR), flags=ADDED) for line in lines)
            return [builder.fadd(total, product, flags=ADDED) for total, product in zip(sums, products, strict=True)]

        sums = loop(builder, width, [all_of(VECTOR, 0.0)] * LANES, step, LANES)
        builder.store(_sums(builder, sums), at_address(builder, out, ir.Constant(I64, 0), VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def add_sixteen(context, weights, rows, width, out):
    """To out, float32 of so many numbers, a multiple of 16, so many rows that lie one behind the other as there are
    numbers in a vector, each by its weight, float32 [16]."""

    def generate(context, builder, signature, arguments):
        weights, rows, width, out = arguments
        size, zero = times(builder, width, 4), ir.Constant(I64, 0)
        lines = [builder.add(rows, times(builder, size, i)) for i in range(LANES)]
        each = load(builder, weights, zero, VECTOR)
        each = [builder.shuffle_vector(each, each, all_of(NUMBERS, i)) for i in range(LANES)]

        def step(_, at):
            offset = times(builder, at, 4)
            total, other = load(builder, out, offset, VECTOR), all_of(VECTOR, 0.0)
            for weight, line in zip(each, lines, strict=True):
                product = builder.fmul(weight, load(builder, line, offset, VECTOR), flags=ADDED)
                total, other = other, builder.fadd(total, product, flags=ADDED)
            builder.store(builder.fadd(total, other), at_address(builder, out, offset, VECTOR), align=4)
            return []

        loop(builder, width, [], step, LANES)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def largest(context, numbers, count):
    """The largest of so many float32, a multiple of 16; of those that are numbers, unless the first 16 are none."""

    def generate(context, builder, signature, arguments):
        numbers, count = arguments

        def step(found, at):
            vector = load(builder, numbers, times(builder, at, 4), VECTOR)
            return [builder.select(builder.fcmp_ordered(">", vector, found[0]), vector, found[0])]

        first = load(builder, numbers, ir.Constant(I64, 0), VECTOR)
        return reduced(builder, "fmax", loop(builder, count, [first], step, LANES)[0])

    return types.float32(types.int64, types.int64), generate


def _sums(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """The sum of each of 16 vectors' numbers. Of two vectors one is made of their first halves and one of their second
    ones; added, they hold the partial sums of both. Of two such the halves of halves, and so on."""
    if len(vectors) == 1:
        return vectors[0]
    half = len(vectors) // 2
    pair = [_sums(builder, vectors[:half]), _sums(builder, vectors[half:])]
    part = LANES // len(vectors)  # of the numbers that belong to one sum, half
    lanes = [lane for lane in range(2 * LANES) if lane % (2 * part) < part]
    first, second = (
        builder.shuffle_vector(*pair, ir.Constant(NUMBERS, [lane + shift for lane in lanes])) for shift in (0, part)
    )
    return builder.fadd(first, second, flags=ADDED)
