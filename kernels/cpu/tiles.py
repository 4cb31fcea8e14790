"""Products of tiles by AMX, as functions for what Numba compiles others around.

A tile is 16 lines of 64 bytes, and the processor has registers for eight. One instruction multiplies two of them: of 16
rows by 32 numbers and 32 by 16 columns, bfloat16, 16,384 operations, and adds the products to 16 x 16 float32; of int8
twice as many numbers, to int32. A line of a left tile is a row's next numbers. A line of a right tile has a pair of
numbers (of int8 four) of each of 16 columns: here numbers i and i + 16 of a step of 32, in both, as vectors come so.

A float32 is the sum of three bfloat16 numbers: its first 8 bits, the next 8 and the last 8. Six of the nine products of
such parts have all but 2^-24 of a product (Henry, Tang and Heinecke 2019), so float32 goes through the same
instruction; three suffice where one factor was published as bfloat16.

Numbers below 2^-126 count as 0, and so do parts, so that a float32 below 2^-110 has fewer than its 24 bits; of an
infinite float32 a part is no number, and neither is what it is multiplied by.
"""

import ctypes
import itertools
from collections.abc import Callable, Iterable
from functools import cache, partial

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minivlm.kernels.cpu.llvm_vectors import (
    ADDED,
    F32,
    I8,
    I32,
    I64,
    LANES,
    NUMBERS,
    VECTOR,
    all_of,
    at_address,
    broadcast,
    load,
    loop,
    nearest,
    times,
)

LINES, LINE, TILE = 16, 64, 1024  # of a tile; bytes of a line and of a tile
STEP = 32  # numbers of a line in bfloat16
ARCH_PRCTL, REQUEST, TILES = 158, 0x1023, 18  # Linux: the system call by which a process asks for the registers
# The registers' shapes: palette 1, 14 bytes of nothing, then of 16 registers the bytes of a line, and the lines.
SHAPES = bytes([1, 0, *[0] * 14, *[LINE, 0] * 8, *[0] * 16, *[LINES] * 8, *[0] * 8])
# Registers: four for sums, then two for the left factor and two for the right one.
LEFT, RIGHT = 4, 6
# Which part of the left factor meets which of the right one, by how many parts each has; from one to the next only one
# changes, so that only that is loaded.
MEETINGS = {
    (1, 1): [(0, 0)],
    (1, 3): [(0, 2), (0, 1), (0, 0)],
    (3, 3): [(0, 2), (0, 1), (1, 1), (1, 0), (0, 0), (2, 0)],
}


@cache
def allowed() -> bool:
    """Whether the system lets this process have the registers, which it asks for."""
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST, TILES) == 0


def need_registers() -> None:
    """Raises RuntimeError where it does not: a kernel would end the process."""
    if not allowed():
        raise RuntimeError("the system does not let this process use AMX")


def _function(arguments: tuple, emit: Callable) -> tuple:
    """What an intrinsic returns: its signature, of no result, and how its code is emitted."""

    def generate(context, builder, signature, values):
        emit(builder, *values)
        return context.get_dummy_value()

    return types.void(*arguments), generate


def _amx(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    name = f"llvm.x86.{name}"
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, signature, name), arguments)


def _register(number: int) -> ir.Constant:
    return ir.Constant(I8, number)


def _move(builder: ir.IRBuilder, name: str, register: int, address: ir.Value, tile: int) -> None:
    """Load or store a register; the tile is so many behind an address."""
    place = at_address(builder, address, ir.Constant(I64, tile * TILE), I8)
    _amx(builder, name, _register(register), place, ir.Constant(I64, LINE))


# ---- registers


@intrinsic
def take_registers(context):
    """Before the other functions, in each thread."""

    def emit(builder):
        kind, name = ir.ArrayType(I8, len(SHAPES)), "shapes_of_tiles"
        shapes = builder.module.globals.get(name)
        if shapes is None:
            shapes = ir.GlobalVariable(builder.module, kind, name)
            shapes.initializer, shapes.linkage = ir.Constant(kind, bytearray(SHAPES)), "internal"
            shapes.global_constant = True
        _amx(builder, "ldtilecfg", builder.bitcast(shapes, I8.as_pointer()))

    return _function((), emit)


@intrinsic
def give_registers_back(context):
    """Behind them: nobody has to save them then."""
    return _function((), lambda builder: _amx(builder, "tilerelease"))


# ---- sums: of two tiles of rows, and of one or two tiles of columns side by side, which is a constant


@intrinsic(prefer_literal=True)
def clear_sums(context, columns):
    """To 0."""

    def emit(builder, columns_):
        for register in range(2 * columns.literal_value):
            _amx(builder, "tilezero", _register(register))

    return _function((columns,), emit)


@intrinsic(prefer_literal=True)
def load_sums(context, columns, tiles):
    """From an address."""

    def emit(builder, columns_, tiles):
        for register in range(2 * columns.literal_value):
            _move(builder, "tileloadd64", register, tiles, register)

    return _function((columns, types.int64), emit)


@intrinsic(prefer_literal=True)
def store_sums(context, columns, tiles):
    """To an address."""

    def emit(builder, columns_, tiles):
        for register in range(2 * columns.literal_value):
            _move(builder, "tilestored64", register, tiles, register)

    return _function((columns, types.int64), emit)


@intrinsic
def add_scaled(context, sums, scales, between, count, totals):
    """Rows of sums, of 16 numbers each, to totals at an address, each times its scale, so many bytes between two."""

    def emit(builder, sums, scales, between, count, totals):
        def row(_, i):
            scale = broadcast(builder, load(builder, scales, builder.mul(between, i), F32))
            place = times(builder, i, LINE)
            total = load(builder, totals, place, VECTOR)
            product = builder.fmul(load(builder, sums, place, VECTOR), scale, flags=ADDED)
            _store(builder, builder.fadd(total, product, flags=ADDED), totals, place)
            return []

        loop(builder, count, [], row, 1)

    return _function((types.int64,) * 5, emit)


@intrinsic
def store_rows(context, out, between):
    """Two tiles of columns' sums to an address as 32 rows of 32 numbers, so many bytes between two."""

    def emit(builder, out, between):
        for register in range(LEFT):
            offset = builder.add(
                times(builder, between, LINES * (register // 2)), ir.Constant(I64, LINE * (register % 2))
            )
            _amx(builder, "tilestored64", _register(register), at_address(builder, out, offset, I8), between)

    return _function((types.int64, types.int64), emit)


@intrinsic(prefer_literal=True)
def multiply_tiles(context, integers, left_parts, right_parts, columns, left, right, steps):
    """Add the products of so many steps to the sums. The first four are constants.

    left, right: where they are; of each step its parts, of each two tiles, or as many as there are columns.
    """
    constants = [constant.literal_value for constant in (integers, left_parts, right_parts, columns)]

    def emit(builder, *values):
        left, right, steps = values[4:]

        def step(_, at):
            for product in products_of_step(builder, *constants, left, right, at):
                product()
            return []

        loop(builder, steps, [], step, 1)

    return _function((integers, left_parts, right_parts, columns, *[types.int64] * 3), emit)


def products_of_step(
    builder: ir.IRBuilder, integers: bool, left_parts: int, right_parts: int, columns: int,
    left: ir.Value, right: ir.Value, at: ir.Value,
) -> list[Callable[[], None]]:  # fmt: skip
    """What emits the products of step number `at`, one by one, each with what it has to load."""
    product, found, before = "tdpbssd" if integers else "tdpbf16ps", [], (None, None)
    here = builder.add(left, times(builder, at, 2 * TILE * left_parts))
    there = builder.add(right, times(builder, at, columns * TILE * right_parts))

    def emit(a: int, b: int, i: int, j: int, load_left: bool, load_right: bool) -> None:
        if load_left:
            _move(builder, "tileloadd64", LEFT + i, here, 2 * a + i)
        if load_right:
            _move(builder, "tileloadd64", RIGHT + j, there, columns * b + j)
        _amx(builder, product, *map(_register, (columns * i + j, LEFT + i, RIGHT + j)))

    for a, b in MEETINGS[left_parts, right_parts]:
        for i, j in itertools.product(range(2), range(columns)):
            found.append(partial(emit, a, b, i, j, a != before[0] and j == 0, b != before[1] and i == 0))
        before = a, b
    return found


# ---- numbers to tiles, and back


@intrinsic(prefer_literal=True)
def tile_rows(context, parts, rounds, rows, between, width, out):
    """32 rows of float32, so many bytes between two, of so many numbers, a multiple of 32, as left tiles to an address.
    The parts are a constant, and whether the numbers are rounded first, to the one part."""
    number = parts.literal_value

    def emit(builder, parts_, rounds_, rows, between, width, out):
        def row(_, i):
            line, place = builder.add(rows, builder.mul(between, i)), builder.add(out, times(builder, i, LINE))

            def step(_, at):
                pair = _vectors(builder, line, at, STEP)
                if rounds.literal_value:
                    pair = [nearest(builder, vector) for vector in pair]
                begin = times(builder, at, 2 * TILE * number // STEP)
                for part, words in enumerate(split(builder, *pair, number)):
                    _store(builder, words, place, builder.add(begin, ir.Constant(I64, 2 * TILE * part)))
                return []

            loop(builder, width, [], step, STEP)
            return []

        loop(builder, ir.Constant(I64, 2 * LINES), [], row, 1)

    return _function((parts, rounds, *[types.int64] * 4), emit)


@intrinsic(prefer_literal=True)
def tile_columns(context, integers, parts, rows, width, columns, out):
    """16 rows of so many float32, a multiple of a step, as the columns of right tiles to an address: of each step one
    of so many tiles side by side. The first two are constants; integers are whole numbers up to 127."""
    number, size = parts.literal_value, 2 * STEP if integers.literal_value else STEP

    def emit(builder, integers_, parts_, rows, width, columns, out):
        lines = [builder.add(rows, times(builder, width, 4 * i)) for i in range(LINES)]

        def step(_, at):
            numbers = [_vectors(builder, line, at, size) for line in lines]
            if integers.literal_value:
                words = [[_bytes(builder, line) for line in numbers]]
            else:
                words = zip(*(split(builder, *line, number) for line in numbers), strict=True)
            step = builder.udiv(at, ir.Constant(I64, size))
            for part, column in enumerate(words):
                tile = builder.add(times(builder, step, number), ir.Constant(I64, part))
                place = builder.add(out, builder.mul(times(builder, columns, TILE), tile))
                for i, words_ in enumerate(_transposed(builder, column)):
                    _store(builder, words_, place, ir.Constant(I64, LINE * i))
            return []

        loop(builder, width, [], step, size)

    return _function((integers, parts, *[types.int64] * 4), emit)


@intrinsic(prefer_literal=True)
def tile_pairs(context, parts, rows, between, out):
    """32 rows of 32 float32, so many bytes between two, as a step of right tiles to an address, two side by side, whose
    columns theirs are; the parts are a constant."""

    def emit(builder, parts_, rows, between, out):
        def row(_, i):
            line = builder.add(rows, builder.mul(between, i))
            other = builder.add(line, times(builder, between, LINES))
            for tile, pair in enumerate(
                zip(*(_vectors(builder, at, ir.Constant(I64, 0), STEP) for at in (line, other)), strict=True)
            ):
                for part, words in enumerate(split(builder, *pair, parts.literal_value)):
                    offset = ir.Constant(I64, TILE * (2 * part + tile))
                    _store(builder, words, out, builder.add(times(builder, i, LINE), offset))
            return []

        loop(builder, ir.Constant(I64, LINES), [], row, 1)

    return _function((parts, *[types.int64] * 3), emit)


@intrinsic
def transpose_tile(context, tile, out, between):
    """The columns of a tile of 16 x 16 numbers as lines to an address, so many bytes between two."""

    def emit(builder, tile, out, between):
        rows = [load(builder, tile, ir.Constant(I64, LINE * i), NUMBERS) for i in range(LINES)]
        for i, row in enumerate(_transposed(builder, rows)):
            _store(builder, row, out, times(builder, between, i))

    return _function((types.int64,) * 3, emit)


def split(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, parts: int) -> list[ir.Value]:
    """Of two vectors of float32 the pairs of bfloat16 numbers that are their first 8 bits, the next 8, and so on."""
    upper, pairs = all_of(NUMBERS, 0xFFFF0000), []
    for _ in range(parts):
        tops = [builder.and_(builder.bitcast(vector, NUMBERS), upper) for vector in (first, second)]
        pairs.append(builder.or_(builder.lshr(tops[0], all_of(NUMBERS, 16)), tops[1]))
        first, second = (
            builder.fsub(x, builder.bitcast(top, VECTOR)) for x, top in zip((first, second), tops, strict=True)
        )
    return pairs


def _vectors(builder: ir.IRBuilder, line: ir.Value, at: ir.Value, count: int) -> list[ir.Value]:
    """So many float32 from number `at` of a line on."""
    places = [times(builder, builder.add(at, ir.Constant(I64, first)), 4) for first in range(0, count, LANES)]
    return [load(builder, line, place, VECTOR) for place in places]


def _store(builder: ir.IRBuilder, vector: ir.Value, address: ir.Value, offset: ir.Value) -> None:
    builder.store(vector, at_address(builder, address, offset, vector.type), align=4)


def _bytes(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """Four vectors of whole float32 as one of int8."""
    narrow = [builder.trunc(builder.fptosi(vector, NUMBERS), ir.VectorType(I8, LANES)) for vector in vectors]
    halves = [builder.shuffle_vector(*narrow[i : i + 2], _order(range(2 * LANES))) for i in (0, 2)]
    return builder.bitcast(builder.shuffle_vector(*halves, _order(range(4 * LANES))), NUMBERS)


def _transposed(builder: ir.IRBuilder, rows: Iterable[ir.Value]) -> list[ir.Value]:
    """16 vectors of 16 numbers, of which row i is what was column i.

    Row i and row i + 8 are shuffled into one another like two halves of a deck of cards, four times.
    """
    pieces, columns = shuffles(builder, list(rows))
    for piece in pieces:
        piece()
    return columns


def shuffles(builder: ir.IRBuilder, rows: list[ir.Value]) -> tuple[list[Callable[[], None]], list[ir.Value]]:
    """What emits the shuffles of `_transposed`, two by two, when the rows are in their list, and the list where the
    columns are then."""
    zips = [_order(half + i // 2 + LANES * (i % 2) for i in range(LANES)) for half in (0, 8)]
    decks = [rows, *([None] * LANES for _ in range(4))]

    def piece(deck: list[ir.Value], shuffled: list[ir.Value], i: int) -> None:
        shuffled[2 * i : 2 * i + 2] = [builder.shuffle_vector(deck[i], deck[i + 8], order) for order in zips]

    return [partial(piece, *decks[n : n + 2], i) for n in range(4) for i in range(8)], decks[-1]


def _order(places: Iterable[int]) -> ir.Constant:
    places = list(places)
    return ir.Constant(ir.VectorType(I32, len(places)), places)
