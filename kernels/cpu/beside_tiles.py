"""Products of tiles with other work between them, as functions for what Numba compiles others around.

AMX takes 16 cycles for a product, and the processor is free meanwhile, but looks only some 500 instructions ahead: what
stands behind a few dozen products waits for them. So what is to be done to sums of earlier products is emitted between
those of later ones, a piece behind each: two shuffles, or a vector's SwiGLU, of 26 to 64 instructions; LLVM may move
some of them. A step of 24 products takes 137 ns, and as long with 4, 8 or 12 instructions behind each product; with 200
or 400 behind all of them 176 and 227.
"""

from collections.abc import Callable
from functools import partial

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minivlm.kernels.cpu.llvm_vectors import (
    I64,
    VECTOR,
    at_address,
    load,
    loop,
    prefetch,
    store_rounded,
    times,
)
from minivlm.kernels.cpu.results import gated, store_result
from minivlm.kernels.cpu.tiles import LINE, LINES, products_of_step, shuffles

# What is done to a tile of sums, of 16 outputs of a weight by 16 rows.
STORED, STORED_WITH, TURNED, GATED = range(4)
SHARE = 16  # one in so many of the next rows' tiles is fetched beside a block
# Lines of the next sums that a step fetches, by a weight's parts: with one, most sums stay near; with three a chunk has
# at most 8 steps, for 64 lines.
FETCHED = {1: 0, 3: 8}


@intrinsic(prefer_literal=True)
def multiply_fetching(context, integers, left_parts, right_parts, places, first, end):
    """`multiply_tiles` of two tiles of columns, steps number `first` to `end`. The first three are constants.

    places: the addresses of the left and the right tiles; of the right tiles that come later, of which a sixteenth is
    fetched meanwhile; and of the sums that come next, which are fetched, too, beside a weight of three parts.
    """
    constants = [constant.literal_value for constant in (integers, left_parts, right_parts)]

    def generate(context, builder, signature, arguments):
        places, first, end = arguments[3:]
        left, right, *fetched = _unpacked(builder, places)

        def step(_, i):
            at = builder.add(first, i)
            products = products_of_step(builder, *constants, 2, left, right, at)
            _spread(products, _fetch(builder, *constants[1:], *fetched, at))
            return []

        loop(builder, builder.sub(end, first), [], step, 1)
        return context.get_dummy_value()

    return types.void(integers, left_parts, right_parts, places, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def multiply_beside(context, left_parts, right_parts, steps, work, kind, places, first, tile, other, out, between):
    """The same of so many steps of bfloat16, and work at a tile of finished sums, 16 outputs by 16 rows of float32. The
    first five are constants.

    stored         transposed, rounded to a kind of numbers, to rows of results so many bytes from one another
    stored with    the same, added to the residual at the address `other`, whose rows are as far from one another
    turned         the tiles at both addresses are transposed where they are
    gated          of two turned tiles silu(tile) * other, to rows of results
    """
    parts, constants = (left_parts.literal_value, right_parts.literal_value), (steps, work, kind)
    count, what, number = (constant.literal_value for constant in constants)

    def generate(context, builder, signature, arguments):
        places, first, tile, other, out, between = arguments[5:]
        left, right, *fetched = _unpacked(builder, places)
        if what == TURNED:
            pieces = [*_turn(builder, tile), *_turn(builder, other)]
        elif what == GATED:
            pieces = _gate(builder, number, tile, other, out, between)
        else:
            pieces = _store(builder, number, tile, other if what == STORED_WITH else None, out, between)
        products, fetches = [], []
        for step in range(count):
            at = builder.add(first, ir.Constant(I64, step))
            products += products_of_step(builder, False, *parts, 2, left, right, at)
            fetches += _fetch(builder, *parts, *fetched, at)
        _spread(products, fetches, pieces)
        return context.get_dummy_value()

    return types.void(left_parts, right_parts, steps, work, kind, places, *[types.int64] * 5), generate


def _unpacked(builder: ir.IRBuilder, numbers: ir.Value) -> list[ir.Value]:
    """The numbers of a tuple."""
    return [builder.extract_value(numbers, i) for i in range(numbers.type.count)]


def _spread(products: list[Callable[[], None]], *works: list[Callable[[], None]]) -> None:
    """Emit the products, and behind each its share of the pieces of all works."""
    for n, product in enumerate(products):
        product()
        for pieces in works:
            for piece in pieces[len(pieces) * n // len(products) : len(pieces) * (n + 1) // len(products)]:
                piece()


def _fetch(
    builder: ir.IRBuilder, left_parts: int, right_parts: int, later: ir.Value, sums: ir.Value, at: ir.Value
) -> list[Callable[[], None]]:
    """What fetches a step's share of the lines of the next rows' tiles, and of the next sums."""
    pieces = []
    for address, lines, near in ((later, 2 * right_parts * LINES // SHARE, 2), (sums, FETCHED[left_parts], 3)):
        for line in range(lines):
            place = builder.add(times(builder, at, lines * LINE), ir.Constant(I64, LINE * line))
            pieces.append(partial(prefetch, builder, address, place, near))
    return pieces


def _columns(builder: ir.IRBuilder, tile: ir.Value) -> tuple[list[Callable[[], None]], list[ir.Value]]:
    """What emits the loading of a tile and its transposition, and where its columns are then."""
    rows = [None] * LINES

    def take(i: int) -> None:
        rows[i] = load(builder, tile, ir.Constant(I64, LINE * i), VECTOR)

    pieces, columns = shuffles(builder, rows)
    return [*(partial(take, i) for i in range(LINES)), *pieces], columns


def _turn(builder: ir.IRBuilder, tile: ir.Value) -> list[Callable[[], None]]:
    """What transposes a tile where it is."""
    pieces, columns = _columns(builder, tile)

    def put(i: int) -> None:
        builder.store(columns[i], at_address(builder, tile, ir.Constant(I64, LINE * i), VECTOR), align=4)

    return [*pieces, *(partial(put, i) for i in range(LINES))]


def _store(
    builder: ir.IRBuilder, kind: int, tile: ir.Value, residual: ir.Value | None, out: ir.Value, between: ir.Value
) -> list[Callable[[], None]]:
    """What makes results of a tile."""
    pieces, columns = _columns(builder, tile)

    def put(i: int) -> None:
        place = times(builder, between, i)
        added = None if residual is None else builder.add(residual, place)
        store_result(builder, kind, columns[i], added, builder.add(out, place), ir.Constant(I64, 0))

    return [*pieces, *(partial(put, i) for i in range(LINES))]


def _gate(
    builder: ir.IRBuilder, kind: int, gate: ir.Value, up: ir.Value, out: ir.Value, between: ir.Value
) -> list[Callable[[], None]]:
    """What makes results of two tiles that were transposed."""

    def put(i: int) -> None:
        offset = ir.Constant(I64, LINE * i)
        value = gated(builder, kind, *(load(builder, tile, offset, VECTOR) for tile in (gate, up)))
        store_rounded(builder, kind, value, builder.add(out, times(builder, between, i)), ir.Constant(I64, 0))

    return [partial(put, i) for i in range(LINES)]
