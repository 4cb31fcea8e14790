"""Loops over a row of a weight or a cache in vectors of LLVM, as functions for what Numba compiles.

Numba vectorises loops by their widest type, and spends eight instructions on 16 compact weights. Here bytes are taken
64 at a time to their upper bytes, to pairs, to float32. And a sum of a vector's numbers takes eight instructions; here
16 such sums are made together. Addresses are integers.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minivlm.kernels.compact import BLOCK
from minivlm.kernels.compiling import LINE

HALF = BLOCK // 2
LANES = 16  # float32 of a vector
# How many rows of the weight go side by side for so many rows of x: distant ones come sooner than one alone, and the
# processor has registers for 16 sums.
SIDE_BY_SIDE = {1: 4, 2: 4, 4: 4, 8: 2}
# What is so many weights ahead is fetched; that may be in the next row. GB/s of one row, 5632x1024, without this and
# 512, 1024, 2048 and 4096 ahead: bfloat16 11.9 / 14.8 / 15.0 / 14.5 / 14.0, float32 12.8 / 15.5 / 15.5 / 15.0 / 14.6.
AHEAD = 1024
ADDED = ("reassoc", "contract", "nsz")  # what LLVM may do to a sum

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, PAIRS, NUMBERS = ir.VectorType(I8, HALF), ir.VectorType(I16, HALF // 2), ir.VectorType(I32, LANES)
VECTOR, HALVES = ir.VectorType(F32, LANES), ir.VectorType(I16, LANES)
# Of bytes a and b: a0 b0 a1 b1 .. of the first or the second half of each lane of 16.
INTERLEAVED = [
    [byte for lane in range(4) for i in range(8) for byte in (16 * lane + first + i, HALF + 16 * lane + first + i)]
    for first in (0, 8)
]


def _all(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _at(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    """The pointer to what lies so many bytes behind an address."""
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _load(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(_at(builder, address, offset, kind), align=1)


def _times(builder: ir.IRBuilder, value: ir.Value, factor: int) -> ir.Value:
    return builder.mul(value, ir.Constant(I64, factor))


def _upper_bytes(builder: ir.IRBuilder, table: ir.Value, places: ir.Value) -> ir.Value:
    """Bytes, the entries of a table in each lane at these places."""
    look_up = builder.module.declare_intrinsic("llvm.x86.avx512.pshuf.b.512", (), ir.FunctionType(BYTES, [BYTES] * 2))
    return builder.call(look_up, [table, builder.and_(places, _all(BYTES, 15))])


def _weights(builder: ir.IRBuilder, table: ir.Value, row: tuple, at: ir.Value) -> list[ir.Value]:
    """The BLOCK weights of a row from number `at` on, as the bits of eight vectors of float32.

    row: the addresses of its lower bytes, its places and the rest, None where there is none.
    """
    lower, places, rest = row
    both = _load(builder, places, builder.lshr(at, ir.Constant(I64, 1)), BYTES)
    high = builder.bitcast(builder.lshr(builder.bitcast(both, PAIRS), _all(PAIRS, 4)), BYTES)
    vectors = []
    for part, half in enumerate((both, high)):
        upper = _upper_bytes(builder, table, half)
        below = _load(builder, lower, builder.add(at, ir.Constant(I64, part * HALF)), BYTES)
        for order in INTERLEAVED:
            pairs = builder.shuffle_vector(below, upper, ir.Constant(ir.VectorType(I32, HALF), order))
            pairs = builder.bitcast(pairs, NUMBERS)
            vectors.append(builder.shl(pairs, _all(NUMBERS, 16)))
            vectors.append(builder.and_(pairs, _all(NUMBERS, 0xFFFF0000)))
    if rest is None:
        return vectors
    found = []
    for number, vector in enumerate(vectors):
        offset = _times(builder, builder.add(at, ir.Constant(I64, number * LANES)), 2)
        found.append(builder.or_(vector, builder.zext(_load(builder, rest, offset, HALVES), NUMBERS)))
    return found


def _fetch(builder: ir.IRBuilder, row: tuple, at: ir.Value) -> None:
    """Have the BLOCK weights AHEAD of those at number `at` brought to the caches."""
    for address, halves in zip(row, (2, 1, 4), strict=True):  # half bytes of a weight
        for line in range(0, BLOCK * halves // 2, LINE) if address is not None else ():
            offset = builder.lshr(_times(builder, at, halves), ir.Constant(I64, 1))
            _prefetch(builder, address, builder.add(offset, ir.Constant(I64, AHEAD * halves // 2 + line)))


def _prefetch(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value) -> None:
    """Have the line so many bytes behind an address brought to the caches; any address will do."""
    pointer = I8.as_pointer()
    function = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], function)
    to_read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    builder.call(fetch, [_at(builder, address, offset, I8), to_read, keep, data])


def _loop(builder: ir.IRBuilder, count: ir.Value, begin: list, step: Callable, block: int = BLOCK) -> list[ir.Value]:
    """What `step` makes of values, first of `begin`, for every block of so many: (values, number) -> values."""
    before, body = builder.block, builder.append_basic_block("block")
    end = builder.append_basic_block("end")
    builder.branch(body)
    builder.position_at_end(body)
    at = builder.phi(I64)
    carried = [builder.phi(value.type) for value in begin]
    values = step(carried, at)
    following = builder.add(at, ir.Constant(I64, block))
    for phi, first, then in zip([at, *carried], [ir.Constant(I64, 0), *begin], [following, *values], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), body, end)
    builder.position_at_end(end)
    return values


def _table(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """A table of 16 bytes in each lane."""
    table = builder.load(builder.inttoptr(address, ir.VectorType(I8, 16).as_pointer()), align=1)
    return builder.shuffle_vector(table, table, ir.Constant(ir.VectorType(I32, HALF), list(range(16)) * 4))


def _row(builder: ir.IRBuilder, addresses: tuple, number: ir.Value, inputs: ir.Value, whole: bool) -> tuple:
    """The addresses of a row of a weight."""
    lower, places, rest = addresses
    at = builder.mul(number, inputs)
    half = builder.add(places, builder.lshr(at, ir.Constant(I64, 1)))
    return builder.add(lower, at), half, builder.add(rest, _times(builder, at, 2)) if whole else None


@intrinsic(prefer_literal=True)
def dots(context, side, batch, whole, lower, places, rest, table, inputs, row, stride, x, count, out, between):
    """`side` rows of a weight by up to `batch` rows of x; these two, and whether there is a rest, are constants.

    The others: the addresses of the weight's lower bytes, places, rest and table, its inputs, the first row and how far
    behind it the next is, the address of x, float32 [count, inputs], and of the results, float32 [batch, ..] of so many
    numbers each, in which row 0 of the weight has place 0.
    """

    def generate(context, builder, signature, arguments):
        *addresses, table, inputs, row, stride, x, count, out, between = arguments[3:]
        table = _table(builder, table)
        numbers = [builder.add(row, _times(builder, stride, i)) for i in range(side.literal_value)]
        rows = [_row(builder, addresses, number, inputs, whole.literal_value) for number in numbers]
        last = builder.sub(count, ir.Constant(I64, 1))
        lines = []
        for i in range(batch.literal_value):  # the last row of x stands in for those behind it
            line = ir.Constant(I64, i)
            line = builder.select(builder.icmp_signed("<", line, last), line, last)
            lines.append(builder.add(x, builder.mul(line, _times(builder, inputs, 4))))

        def step(sums, at):
            sums = list(sums)
            for i, row in enumerate(rows):
                _fetch(builder, row, at)
                for j, bits in enumerate(_weights(builder, table, row, at)):
                    offset = _times(builder, builder.add(at, ir.Constant(I64, j * LANES)), 4)
                    weight = builder.bitcast(bits, VECTOR)
                    for k, line in enumerate(lines):
                        product = builder.fmul(weight, _load(builder, line, offset, VECTOR), flags=ADDED)
                        place = i * len(lines) + k
                        sums[place] = builder.fadd(sums[place], product, flags=ADDED)
            return sums

        sums = _loop(builder, inputs, [_all(VECTOR, 0.0)] * (len(rows) * len(lines)), step)
        for place, total in enumerate(sums):
            number = builder.add(numbers[place // len(lines)], _times(builder, between, place % len(lines)))
            builder.store(_reduced(builder, "fadd", total), _at(builder, out, _times(builder, number, 4), F32))
        return context.get_dummy_value()

    return types.void(side, batch, whole, *[types.int64] * 11), generate


def _reduced(builder: ir.IRBuilder, how: str, vector: ir.Value) -> ir.Value:
    """The sum (fadd) or the largest (fmax) of a vector's numbers."""
    first = [ir.Constant(F32, 0.0)] if how == "fadd" else []
    kind, name = ir.FunctionType(F32, [*[F32] * len(first), VECTOR]), f"llvm.vector.reduce.{how}.v16f32"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, [*first, vector], fastmath=("reassoc",))


@intrinsic(prefer_literal=True)
def widen_row(context, whole, wide, lower, places, rest, table, inputs, row, out):
    """A row of a weight as it was, to an address: of float32 if wide, else of bfloat16. Whole and wide are constants;
    the others are as those of `dots`."""

    def generate(context, builder, signature, arguments):
        *addresses, table, inputs, row, out = arguments[2:]
        table, row = _table(builder, table), _row(builder, addresses, row, inputs, whole.literal_value)

        def step(_, at):
            for j, bits in enumerate(_weights(builder, table, row, at)):
                number = builder.add(at, ir.Constant(I64, j * LANES))
                if not wide.literal_value:
                    bits = builder.trunc(builder.lshr(bits, _all(NUMBERS, 16)), HALVES)
                offset = _times(builder, number, 4 if wide.literal_value else 2)
                builder.store(bits, _at(builder, out, offset, bits.type), align=1)
            return []

        _loop(builder, inputs, [], step)
        return context.get_dummy_value()

    return types.void(whole, wide, *[types.int64] * 7), generate


# ---- 16 sums at a time


@intrinsic(prefer_literal=True)
def widen_numbers(context, kind, numbers, count, ahead, out):
    """So many numbers, a multiple of 16, to float32; kind is a constant: 0 for float32, 1 for float16, 2 for bfloat16.
    What is so many bytes ahead is on its way to the caches meanwhile."""

    def generate(context, builder, signature, arguments):
        _, numbers, count, ahead, out = arguments
        size = 2 if kind.literal_value else 4

        def step(_, at):
            offset = _times(builder, at, size)
            _prefetch(builder, numbers, builder.add(offset, ahead))
            if kind.literal_value == 2:
                wide = builder.shl(builder.zext(_load(builder, numbers, offset, HALVES), NUMBERS), _all(NUMBERS, 16))
            elif kind.literal_value == 1:
                wide = builder.fpext(_load(builder, numbers, offset, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
            else:
                wide = _load(builder, numbers, offset, VECTOR)
            builder.store(wide, _at(builder, out, _times(builder, at, 4), wide.type), align=4)
            return []

        _loop(builder, count, [], step, LANES)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 4), generate


@intrinsic
def sixteen_dots(context, x, rows, width, out):
    """x by 16 rows that lie one behind the other, all float32 of so many numbers, a multiple of 16 -> float32 [16]."""

    def generate(context, builder, signature, arguments):
        x, rows, width, out = arguments
        size = _times(builder, width, 4)
        lines = [builder.add(rows, _times(builder, size, i)) for i in range(LANES)]

        def step(sums, at):
            offset = _times(builder, at, 4)
            number = _load(builder, x, offset, VECTOR)
            products = (builder.fmul(number, _load(builder, line, offset, VECTOR), flags=ADDED) for line in lines)
            return [builder.fadd(total, product, flags=ADDED) for total, product in zip(sums, products, strict=True)]

        sums = _loop(builder, width, [_all(VECTOR, 0.0)] * LANES, step, LANES)
        builder.store(_sums(builder, sums), _at(builder, out, ir.Constant(I64, 0), VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def add_sixteen(context, weights, rows, width, out):
    """To out, float32 of so many numbers, a multiple of 16, so many rows that lie one behind the other as there are
    numbers in a vector, each by its weight, float32 [16]."""

    def generate(context, builder, signature, arguments):
        weights, rows, width, out = arguments
        size, zero = _times(builder, width, 4), ir.Constant(I64, 0)
        lines = [builder.add(rows, _times(builder, size, i)) for i in range(LANES)]
        each = _load(builder, weights, zero, VECTOR)
        each = [builder.shuffle_vector(each, each, _all(NUMBERS, i)) for i in range(LANES)]

        def step(_, at):
            offset = _times(builder, at, 4)
            total, other = _load(builder, out, offset, VECTOR), _all(VECTOR, 0.0)
            for weight, line in zip(each, lines, strict=True):
                product = builder.fmul(weight, _load(builder, line, offset, VECTOR), flags=ADDED)
                total, other = other, builder.fadd(total, product, flags=ADDED)
            builder.store(builder.fadd(total, other), _at(builder, out, offset, VECTOR), align=4)
            return []

        _loop(builder, width, [], step, LANES)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def largest(context, numbers, count):
    """The largest of so many float32, a multiple of 16; of those that are numbers, unless the first 16 are none."""

    def generate(context, builder, signature, arguments):
        numbers, count = arguments

        def step(found, at):
            vector = _load(builder, numbers, _times(builder, at, 4), VECTOR)
            return [builder.select(builder.fcmp_ordered(">", vector, found[0]), vector, found[0])]

        first = _load(builder, numbers, ir.Constant(I64, 0), VECTOR)
        return _reduced(builder, "fmax", _loop(builder, count, [first], step, LANES)[0])

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
