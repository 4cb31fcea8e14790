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
    I32,
    I64,
    LANES,
    NUMBERS,
    VECTOR,
    all_of,
    at_address,
    exp2,
    load,
    loop,
    prefetch,
    reduced,
    times,
)

LOWEST = -3.4028234663852886e38


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


def _pair(builder: ir.IRBuilder, numbers: ir.Value, at: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """Where two vectors of float32 are from number `at` on, and they."""
    places = [times(builder, builder.add(at, ir.Constant(I64, first)), 4) for first in (0, LANES)]
    return [(place, load(builder, numbers, place, VECTOR)) for place in places]


@intrinsic
def highest(context, scores, count):
    """The largest of so many float32, a multiple of 32, that are numbers."""

    def generate(context, builder, signature, arguments):
        scores, count = arguments

        def higher(found, at):
            vectors = zip(found, (vector for _, vector in _pair(builder, scores, at)), strict=True)
            return [builder.select(builder.fcmp_ordered(">", new, old), new, old) for old, new in vectors]

        most = loop(builder, count, [all_of(VECTOR, LOWEST)] * 2, higher, 2 * LANES)
        return reduced(builder, "fmax", builder.select(builder.fcmp_ordered(">", *most), *most))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def weigh(context, scores, count, factor, most):
    """2^(factor s - most) in place of each of so many scores s, a multiple of 32; their sum."""

    def generate(context, builder, signature, arguments):
        scores, count, *numbers = arguments
        factor, most = (_all(builder, number) for number in numbers)

        def replaced(totals, at):
            found = []
            for total, (place, vector) in zip(totals, _pair(builder, scores, at), strict=True):
                # Rounded like `most`, so that no difference is above 0.
                vector = exp2(builder, builder.fsub(builder.fmul(vector, factor), most))
                builder.store(vector, at_address(builder, scores, place, VECTOR), align=4)
                found.append(builder.fadd(total, vector))
            return found

        totals = loop(builder, count, [all_of(VECTOR, 0.0)] * 2, replaced, 2 * LANES)
        return reduced(builder, "fadd", builder.fadd(*totals))

    return types.float32(types.int64, types.int64, types.float32, types.float32), generate


def _all(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """A vector of one number."""
    kind = ir.VectorType(number.type, LANES)
    vector = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(I32, 0))
    return builder.shuffle_vector(vector, vector, all_of(NUMBERS, 0))
