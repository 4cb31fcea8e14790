"""Products of rows of weights that are kept in few bits, and compact ones as they were, as functions for what Numba
compiles others around. A weight is read BLOCK numbers of a row at a time, and needs AVX-512.

compact: bytes are taken 64 at a time to their upper bytes, to pairs, to float32: 16 weights take two instructions,
         where a loop that Numba vectorises takes eight. `whole` has the rest of float32 beside them.
int8:    by rows that are quantised too; four products at a time are added to int32, exactly.
int4:    each half byte is looked up among -8 to 7, in float32; the sum of a group is multiplied by its scale.

Or they become lines of left tiles, see tiles.py: of int8 as they are, of a compact one without its rest and of int4
without its scales after two instructions for 32 of them, in bfloat16; of others the parts of what they are in float32.
"""

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minivlm.kernels.cpu.compact import BLOCK, ordered
from minivlm.kernels.cpu.compiling import LINE
from minivlm.kernels.cpu.llvm_vectors import (
    ADDED,
    BFLOAT16,
    F32,
    FLOAT16,
    FLOAT32,
    HALVES,
    I8,
    I16,
    I32,
    I64,
    LANES,
    NUMBERS,
    VECTOR,
    add_fours,
    all_of,
    at_address,
    broadcast,
    load,
    loop,
    nearest,
    prefetch,
    reduced,
    times,
)
from minivlm.kernels.cpu.tiles import LINES, TILE, split

COMPACT, WHOLE, INT8, INT4, STEPS = range(5)  # steps: int4 without its scales
# How many rows of the weight go side by side for so many rows of x: distant ones come sooner than one alone, and the
# processor has registers for 16 sums.
SIDE_BY_SIDE = {1: 4, 2: 4, 4: 4, 8: 2}
# What is so many weights ahead is fetched; that may be in the next row. GB/s of one row, 5632x1024, without this and
# 512, 1024, 2048 and 4096 ahead: bfloat16 11.9 / 14.8 / 15.0 / 14.5 / 14.0, float32 12.8 / 15.5 / 15.5 / 15.0 / 14.6.
AHEAD = 1024

HALF = BLOCK // 2
BYTES, PAIRS, SIXTEEN = ir.VectorType(I8, HALF), ir.VectorType(I16, HALF // 2), ir.VectorType(I8, LANES)
# Of bytes a and b: a0 b0 a1 b1 .. of the first or the second half of each lane of 16.
INTERLEAVED = [
    [byte for lane in range(4) for i in range(8) for byte in (16 * lane + first + i, HALF + 16 * lane + first + i)]
    for first in (0, 8)
]
# The lower and the upper byte of -8 to 7 in bfloat16, for each lane.
STEP_BYTES = [
    ir.Constant(BYTES, torch.arange(-8.0, 8).bfloat16().view(torch.uint8)[half::2].tolist() * 4) for half in (0, 1)
]


class Weight:
    """A weight while code is emitted for it: where its parts are, and what its blocks are added to sums with.

    parts: the address of each part, and how many half bytes a number takes there.
    """

    def __init__(self, builder: ir.IRBuilder, form: int, addresses: list[ir.Value], inputs: ir.Value):
        self.builder, self.form, self.inputs = builder, form, inputs
        halves = {COMPACT: (2, 1), WHOLE: (2, 1, 4), INT8: (2,), INT4: (1,), STEPS: (1,)}[form]
        self.parts = list(zip(addresses, halves, strict=False))
        if form in (COMPACT, WHOLE):
            table = builder.load(builder.inttoptr(addresses[3], SIXTEEN.as_pointer()), align=1)
            self.table = builder.shuffle_vector(table, table, _places(list(range(16)) * 4))  # one for each lane
        self.scales = addresses[1] if form == INT4 else None
        self.sum_type = NUMBERS if form == INT8 else VECTOR
        self.x_size = 1 if form == INT8 else 4  # bytes of a number of the rows x

    def row(self, number: ir.Value) -> list[ir.Value]:
        """The addresses of a row's parts, and of its scales where it has some."""
        builder, first = self.builder, self.builder.mul(number, self.inputs)
        addresses = [builder.add(address, self._bytes(first, halves)) for address, halves in self.parts]
        if self.scales is not None:
            scales = times(builder, builder.udiv(first, ir.Constant(I64, BLOCK)), 4)
            addresses.append(builder.add(self.scales, scales))
        return addresses

    def fetch(self, row: list[ir.Value], at: ir.Value, near: int = 3) -> None:
        """Have the block of a row from number `at` on brought to the caches."""
        for address, (_, halves) in zip(row, self.parts, strict=False):
            first = self._bytes(at, halves)
            for line in range(0, BLOCK * halves // 2, LINE):
                prefetch(self.builder, address, self.builder.add(first, ir.Constant(I64, line)), near)

    def numbers(self, row: list[ir.Value], at: ir.Value) -> list[ir.Value]:
        """The block of a row from number `at` on, as the bits of eight vectors of float32; not of int8."""
        builder, vectors = self.builder, []
        if self.form == INT4:
            steps, order = self._steps(row, at)
            values = [builder.fmul(step, self._scale(row, at)) for step in steps]
            return [builder.bitcast(values[order.index(place)], NUMBERS) for place in range(len(order))]
        for pairs in self._pairs(row, at):
            vectors.append(builder.shl(pairs, all_of(NUMBERS, 16)))
            vectors.append(builder.and_(pairs, all_of(NUMBERS, 0xFFFF0000)))
        if self.form == COMPACT:
            return vectors
        rests = [load(builder, row[2], self._number(at, i * LANES, 2), HALVES) for i in range(len(vectors))]
        return [builder.or_(bits, builder.zext(rest, NUMBERS)) for bits, rest in zip(vectors, rests, strict=True)]

    def lines(self, row: list[ir.Value], at: ir.Value, parts: int) -> list[list[ir.Value]]:
        """The block of a row from number `at` on as lines of left tiles: of each step its parts."""
        builder = self.builder
        if self.form == INT8:
            places = [self._number(at, first, 1) for first in range(0, BLOCK, HALF)]
            return [[builder.bitcast(load(builder, row[0], place, BYTES), NUMBERS)] for place in places]
        if self.form in (COMPACT, STEPS):
            return [[pairs] for pairs in self._pairs(row, at)]
        vectors = [builder.bitcast(bits, VECTOR) for bits in self.numbers(row, at)]
        if parts == 1:
            vectors = [nearest(builder, vector) for vector in vectors]
        return [split(builder, *vectors[i : i + 2], parts) for i in range(0, len(vectors), 2)]

    def _pairs(self, row: list[ir.Value], at: ir.Value) -> list[ir.Value]:
        """A block of a compact row, or of steps, in bfloat16: of four times 32 numbers each of the first 16 beside the
        one that is 16 behind it."""
        builder, pairs, steps = self.builder, [], self.form == STEPS
        look_up = ir.FunctionType(BYTES, [BYTES] * 2)
        look_up = builder.module.declare_intrinsic("llvm.x86.avx512.pshuf.b.512", (), look_up)
        both = load(builder, row[0 if steps else 1], self._bytes(at, 1), BYTES)
        if steps:
            both = builder.shuffle_vector(both, both, _places(ordered().tolist()))
        high = builder.bitcast(builder.lshr(builder.bitcast(both, PAIRS), all_of(PAIRS, 4)), BYTES)
        for part, places in enumerate((both, high)):
            places = builder.and_(places, all_of(BYTES, 15))
            upper = builder.call(look_up, [STEP_BYTES[1] if steps else self.table, places])
            if steps:
                lower = builder.call(look_up, [STEP_BYTES[0], places])
            else:
                lower = load(builder, row[0], builder.add(at, ir.Constant(I64, part * HALF)), BYTES)
            for order in INTERLEAVED:
                pairs.append(builder.bitcast(builder.shuffle_vector(lower, upper, _places(order)), NUMBERS))
        return pairs

    def add(self, sums: list[ir.Value], row: list[ir.Value], at: ir.Value, lines: list[ir.Value]) -> list[ir.Value]:
        """The sums plus the products of a block from number `at` on and the lines x."""
        if self.form == INT8:
            return self._add_integers(sums, row, at, lines)
        if self.form == INT4:
            vectors, order = self._steps(row, at)
        else:
            vectors, order = [self.builder.bitcast(bits, VECTOR) for bits in self.numbers(row, at)], range(8)
        begin = sums if self.scales is None else [all_of(VECTOR, 0.0)] * len(sums)
        found = list(begin)
        for weight, place in zip(vectors, order, strict=True):
            for k, line in enumerate(lines):
                x = load(self.builder, line, self._number(at, place * LANES, 4), VECTOR)
                found[k] = self._plus(found[k], weight, x)
        if self.scales is None:
            return found
        scale = self._scale(row, at)
        return [self._plus(total, scale, group) for total, group in zip(sums, found, strict=True)]

    def _scale(self, row: list[ir.Value], at: ir.Value) -> ir.Value:
        """That of an int4 block, in every place of a vector."""
        place = times(self.builder, self.builder.udiv(at, ir.Constant(I64, BLOCK)), 4)
        return broadcast(self.builder, load(self.builder, row[1], place, F32))

    def _steps(self, row: list[ir.Value], at: ir.Value) -> tuple[list[ir.Value], list[int]]:
        """The block of an int4 row in float32 without its scale, and which eighth of the block each vector is."""
        builder, vectors, order = self.builder, [], []
        look_up = builder.module.declare_intrinsic(
            "llvm.x86.avx512.permvar.sf.512", (), ir.FunctionType(VECTOR, [VECTOR, NUMBERS])
        )
        steps = ir.Constant(VECTOR, [float(step) for step in range(-8, 8)])
        for part in range(4):
            offset = builder.add(self._bytes(at, 1), ir.Constant(I64, part * LANES))
            both = builder.zext(load(builder, row[0], offset, SIXTEEN), NUMBERS)  # the lowest four bits are looked up
            for half, places in enumerate((both, builder.lshr(both, all_of(NUMBERS, 4)))):
                vectors.append(builder.call(look_up, [steps, places]))
                order.append(4 * half + part)
        return vectors, order

    def _add_integers(self, sums: list, row: list[ir.Value], at: ir.Value, lines: list[ir.Value]) -> list[ir.Value]:
        """x is more by 128 than it is to be; so much too much is what the last sum becomes."""
        builder, sums = self.builder, list(sums)
        for first in range(0, BLOCK, HALF):
            weight = load(builder, row[0], self._number(at, first, 1), NUMBERS)
            for k, line in enumerate(lines):
                x = load(builder, line, self._number(at, first, 1), NUMBERS)
                sums[k] = add_fours(builder, sums[k], x, weight)
            sums[-1] = add_fours(builder, sums[-1], all_of(NUMBERS, 0x80808080), weight)
        return sums

    def _plus(self, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.fadd(total, self.builder.fmul(a, b, flags=ADDED), flags=ADDED)

    def _bytes(self, number: ir.Value, halves: int) -> ir.Value:
        """How far behind the first a number is, of so many half bytes each."""
        return self.builder.lshr(times(self.builder, number, halves), ir.Constant(I64, 1))

    def _number(self, at: ir.Value, more: int, size: int) -> ir.Value:
        """The same of number at + more, of so many bytes each."""
        return times(self.builder, self.builder.add(at, ir.Constant(I64, more)), size)


def _places(order: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(order)), order)


@intrinsic(prefer_literal=True)
def dots(context, form, side, batch, a, b, c, d, inputs, row, stride, x, count, out, between):
    """`side` rows of a weight by up to `batch` rows of x; these two and the form are constants.

    The others: the addresses of the weight's parts (compact: lower bytes, places, rest, table; int8: itself; int4:
    itself and its scales, float32), its inputs, the first row and how far behind it the next is, the address of x
    [count, inputs], float32 or for int8 uint8 with 128 for 0, and of the results, float32 [batch, ..] of so many
    numbers each, in which row 0 of the weight has place 0.
    """

    def generate(context, builder, signature, arguments):
        *addresses, inputs, row, stride, x, count, out, between = arguments[3:]
        weight, integers = Weight(builder, form.literal_value, addresses, inputs), form.literal_value == INT8
        numbers = [builder.add(row, times(builder, stride, i)) for i in range(side.literal_value)]
        rows = [weight.row(number) for number in numbers]
        last, lines = builder.sub(count, ir.Constant(I64, 1)), []
        for i in range(batch.literal_value):  # the last row of x stands in for those behind it
            line = ir.Constant(I64, i)
            line = builder.select(builder.icmp_signed("<", line, last), line, last)
            lines.append(builder.add(x, builder.mul(line, times(builder, inputs, weight.x_size))))
        each = len(lines) + integers  # sums of a row

        def step(sums, at):
            found = []
            for i, row in enumerate(rows):
                weight.fetch(row, builder.add(at, ir.Constant(I64, AHEAD)))
                found += weight.add(sums[i * each : (i + 1) * each], row, at, lines)
            return found

        nothing = all_of(weight.sum_type, 0 if integers else 0.0)
        sums = loop(builder, inputs, [nothing] * (len(rows) * each), step, BLOCK)
        totals = [reduced(builder, "add" if integers else "fadd", total) for total in sums]
        for i, number in enumerate(numbers):
            for k, total in enumerate(totals[i * each :][: len(lines)]):
                if integers:
                    total = builder.sitofp(builder.sub(total, totals[(i + 1) * each - 1]), F32)
                place = builder.add(number, times(builder, between, k))
                builder.store(total, at_address(builder, out, times(builder, place, 4), F32))
        return context.get_dummy_value()

    return types.void(form, side, batch, *[types.int64] * 11), generate


@intrinsic(prefer_literal=True)
def widen_row(context, form, kind, a, b, c, d, inputs, row, out):
    """A row of a weight, not of int8, rounded to a type, to an address. The form and the kind of the type, which are
    the place in FLOATS, are constants; the others are as those of `dots`."""

    def generate(context, builder, signature, arguments):
        *addresses, inputs, row, out = arguments[2:]
        weight = Weight(builder, form.literal_value, addresses, inputs)
        row, size = weight.row(row), 4 if kind.literal_value == FLOAT32 else 2

        def step(_, at):
            for j, bits in enumerate(weight.numbers(row, at)):
                if kind.literal_value == BFLOAT16:
                    bits = _upper_half(builder, bits, form.literal_value == INT4)
                elif kind.literal_value == FLOAT16:
                    bits = builder.fptrunc(builder.bitcast(bits, VECTOR), ir.VectorType(ir.HalfType(), LANES))
                offset = times(builder, builder.add(at, ir.Constant(I64, j * LANES)), size)
                builder.store(bits, at_address(builder, out, offset, bits.type), align=1)
            return []

        loop(builder, inputs, [], step, BLOCK)
        return context.get_dummy_value()

    return types.void(form, kind, *[types.int64] * 7), generate


def _upper_half(builder: ir.IRBuilder, bits: ir.Value, rounds: bool) -> ir.Value:
    """The bfloat16 of float32 that are finite; exact ones need no rounding."""
    bits = builder.bitcast(nearest(builder, bits), NUMBERS) if rounds else bits
    return builder.trunc(builder.lshr(bits, all_of(NUMBERS, 16)), HALVES)


@intrinsic(prefer_literal=True)
def tile_block(context, form, parts, a, b, c, d, inputs, row, rows, at, later, out):
    """BLOCK numbers, from number `at` on, of up to 32 rows of a weight as left tiles, each in so many parts, to an
    address. As many of all of its numbers, from number `later` on, are fetched. The form and the parts are constants;
    the others are as those of `dots`."""

    def generate(context, builder, signature, arguments):
        *addresses, inputs, row, rows, at, later, out = arguments[2:]
        weight = Weight(builder, form.literal_value, addresses, inputs)

        def step(_, i):
            here = weight.row(builder.add(row, i))
            weight.fetch(addresses, builder.add(later, times(builder, i, BLOCK)), near=2)
            tile = times(builder, builder.udiv(i, ir.Constant(I64, LINES)), TILE)
            place = builder.add(out, builder.add(tile, times(builder, builder.urem(i, ir.Constant(I64, LINES)), LINE)))
            lines = [part for parts_ in weight.lines(here, at, parts.literal_value) for part in parts_]
            for number, line in enumerate(lines):
                offset = ir.Constant(I64, 2 * TILE * number)
                builder.store(line, at_address(builder, place, offset, NUMBERS), align=4)
            return []

        loop(builder, rows, [], step, 1)
        return context.get_dummy_value()

    return types.void(form, parts, *[types.int64] * 10), generate


@intrinsic
def order_row(context, lower, places, inputs, ordered_lower, ordered_places):
    """A compact row's lower bytes and places, one byte each, from the order of its numbers to that of its blocks, in
    which two places share a byte; so many of them, a multiple of BLOCK."""

    def generate(context, builder, signature, arguments):
        lower, places, inputs, ordered_lower, ordered_places = arguments
        order = _places(ordered().tolist())

        def step(_, at):
            halves = []
            for part in range(2):
                offset = builder.add(at, ir.Constant(I64, part * HALF))
                for source in (lower, places):
                    vector = load(builder, source, offset, BYTES)
                    vector = builder.shuffle_vector(vector, vector, order)
                    if source is lower:
                        builder.store(vector, at_address(builder, ordered_lower, offset, BYTES), align=1)
                    else:
                        halves.append(builder.bitcast(vector, PAIRS))
            both = builder.bitcast(builder.or_(halves[0], builder.shl(halves[1], all_of(PAIRS, 4))), BYTES)
            offset = builder.lshr(at, ir.Constant(I64, 1))
            builder.store(both, at_address(builder, ordered_places, offset, BYTES), align=1)
            return []

        loop(builder, inputs, [], step, BLOCK)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate
