"""What compact.py calls, compiled by Numba for this processor, which must have AVX-512.

Numba vectorises loops by their widest type, and spends eight instructions on 16 weights. So the loops over a row are
written here in vectors of LLVM: bytes 64 at a time to their upper bytes, to pairs, to float32. Everything around them
is as in single_row_numba.py.
"""

import struct
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from minivlm.kernels.compact import BLOCK, Compact, CompactLinear, ordered
from minivlm.kernels.openmp import run, thread_count, thread_number
from minivlm.kernels.single_row_numba import (
    FLOATS,
    SUMS,
    address_of,
    float_of_bits,
    narrow,
    normalised,
    pointer,
    rounded,
    share,
    silu,
    wide,
)

HALF = BLOCK // 2
LANES = 16  # float32 of a vector
# How many rows of the weight go side by side for so many rows of x: distant ones come sooner than one alone, and the
# processor has registers for 16 sums.
SIDE_BY_SIDE = {1: 4, 2: 4, 4: 4, 8: 2}
# What is so many weights ahead is fetched; that may be in the next row. GB/s of one row, 5632x1024, without this and
# 512, 1024, 2048 and 4096 ahead: bfloat16 11.9 / 14.8 / 15.0 / 14.5 / 14.0, float32 12.8 / 15.5 / 15.5 / 15.0 / 14.6.
AHEAD = 1024
LINE = 64  # bytes that are fetched together
ADDED = ("reassoc", "contract", "nsz")  # what LLVM may do to a sum

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, PAIRS, NUMBERS = ir.VectorType(I8, HALF), ir.VectorType(I16, HALF // 2), ir.VectorType(I32, LANES)
VECTOR, HALVES = ir.VectorType(F32, LANES), ir.VectorType(I16, LANES)
# Of bytes a and b: a0 b0 a1 b1 .. of the first or the second half of each lane of 16.
INTERLEAVED = [
    [byte for lane in range(4) for i in range(8) for byte in (16 * lane + first + i, HALF + 16 * lane + first + i)]
    for first in (0, 8)
]


# ---- in vectors of LLVM


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
    pointer = I8.as_pointer()
    function = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], function)
    for address, halves in zip(row, (2, 1, 4), strict=True):  # half bytes of a weight
        for line in range(0, BLOCK * halves // 2, LINE) if address is not None else ():
            offset = builder.lshr(_times(builder, at, halves), ir.Constant(I64, 1))
            offset = builder.add(offset, ir.Constant(I64, AHEAD * halves // 2 + line))
            to_read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
            builder.call(fetch, [_at(builder, address, offset, I8), to_read, keep, data])


def _loop(builder: ir.IRBuilder, count: ir.Value, begin: list[ir.Value], step: Callable) -> list[ir.Value]:
    """What `step` makes of values, first of `begin`, for every BLOCK numbers of so many: (values, number) -> values."""
    before, body = builder.block, builder.append_basic_block("block")
    end = builder.append_basic_block("end")
    builder.branch(body)
    builder.position_at_end(body)
    at = builder.phi(I64)
    carried = [builder.phi(value.type) for value in begin]
    values = step(carried, at)
    following = builder.add(at, ir.Constant(I64, BLOCK))
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
            builder.store(_sum(builder, total), _at(builder, out, _times(builder, number, 4), F32))
        return context.get_dummy_value()

    return types.void(side, batch, whole, *[types.int64] * 11), generate


def _sum(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Of a vector's numbers."""
    name = "llvm.vector.reduce.fadd.v16f32"
    add = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(F32, [F32, VECTOR]), name)
    return builder.call(add, [ir.Constant(F32, 0.0), vector], fastmath=("reassoc",))


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


# ---- in Numba


@njit(fastmath=SUMS)
def add_kept(starts, columns, values, x, found):
    """To found [B, N], of rows of which `starts` [N + 1] is a part, x [B, K] by the weights that are kept whole."""
    for i in range(found.shape[1]):
        for at in range(starts[i], starts[i + 1]):
            for b in range(len(found)):
                found[b, i] += values[at] * x[b, columns[at]]


@cache
def linear_kernel(dtype: torch.dtype, whole: bool, batch: int) -> int:
    """The address of the kernel behind `CompactLinear`, for x of a type, weights with a rest or without, and up to so
    many rows.

    Its arguments: rows, outputs, inputs, 1 with swiglu, how many weights are kept whole, the addresses of x, norm, the
    weight's lower bytes, places, rest, table, starts, columns and values, of the residual and the result, 0 for what
    is not there, and the bits of eps.
    """
    stored, side, rest = FLOATS[dtype], SIDE_BY_SIDE[batch], int(whole)

    def kernel(arguments):
        rows, outputs, inputs, swiglu = arguments[0], arguments[1], arguments[2], arguments[3]
        x = carray(pointer(arguments[5]), (rows, inputs), stored)
        norm = carray(pointer(arguments[6]), (inputs if arguments[6] else 0,), stored)
        a, b, c, d = arguments[7], arguments[8], arguments[9], arguments[10]
        starts = carray(pointer(arguments[11]), (outputs * (1 + swiglu) + 1,), np.int32)
        columns = carray(pointer(arguments[12]), (arguments[4],), np.int32)
        values = carray(pointer(arguments[13]), (arguments[4],), np.float32)
        residual = carray(pointer(arguments[14]), (rows if arguments[14] else 0, outputs), stored)
        out = carray(pointer(arguments[15]), (rows, outputs), stored)
        begin, end = share(outputs)
        count, padded = end - begin, -(-inputs // BLOCK) * BLOCK
        space = np.zeros(rows * padded + LANES, np.float32)
        space = space[-np.int64(space.ctypes.data) // 4 % LANES :]  # from the beginning of a line
        unit = space[: rows * padded].reshape(rows, padded)
        found = np.empty((1 + swiglu, batch, count), np.float32)
        for i in range(rows):
            unit[i, :inputs] = normalised(x[i], norm, float_of_bits(np.uint32(arguments[16])))
        source, stride = np.int64(unit.ctypes.data), count // side
        for part in range(1 + swiglu):
            first = begin + part * outputs
            to = np.int64(found[part].ctypes.data) - 4 * first
            for i in range(first, first + stride):
                dots(side, batch, rest, a, b, c, d, padded, i, stride, source, rows, to, count)
            for i in range(first + side * stride, first + count):
                dots(1, batch, rest, a, b, c, d, padded, i, 0, source, rows, to, count)
            add_kept(starts[first : first + count + 1], columns, values, unit, found[part, :rows])
        for i in range(rows):
            for j in range(count):
                value = rounded(found[0, i, j], out)
                if swiglu:
                    value = rounded(rounded(silu(value), out) * rounded(found[1, i, j], out), out)
                if len(residual):
                    value += wide(residual[i, begin + j])
                out[i, begin + j] = narrow(value, out)

    return address_of(kernel, f"compact_linear_{dtype}_{whole}_{batch}")


@cache
def _expand_kernel(dtype: torch.dtype, whole: bool) -> int:
    """The address of the kernel behind `expand`, whose arguments are: rows, the first, inputs, how many weights are
    kept whole, the addresses of lower bytes, places, rest, table, starts, columns, values and the result."""
    stored, rest, wide = FLOATS[dtype], int(whole), int(dtype == torch.float32)

    def kernel(arguments):
        rows, first, inputs, kept = arguments[0], arguments[1], arguments[2], arguments[3]
        starts = carray(pointer(arguments[8]), (first + rows + 1,), np.int32)
        columns = carray(pointer(arguments[9]), (kept,), np.int32)
        values = carray(pointer(arguments[10]), (kept,), np.float32)
        out = carray(pointer(arguments[11]), (rows, inputs), stored)
        a, b, c, d = arguments[4], arguments[5], arguments[6], arguments[7]
        padded = -(-inputs // BLOCK) * BLOCK
        row = np.empty(padded, stored)
        begin, end = share(rows)
        for i in range(begin, end):
            place = out[i].ctypes.data if inputs == padded else row.ctypes.data
            widen_row(rest, wide, a, b, c, d, padded, first + i, np.int64(place))
            if inputs < padded:
                out[i] = row[:inputs]
            for at in range(starts[first + i], starts[first + i + 1]):
                out[i, columns[at]] = narrow(values[at], out)

    return address_of(kernel, f"compact_expand_{dtype}_{whole}")


@cache
def _pack_kernel(dtype: torch.dtype) -> int:
    """The address of the kernel behind `pack`, whose arguments are: rows, inputs, how many weights each thread may keep
    whole, the addresses of the weight, of the place of each upper byte (16 where it has none), of which number each of
    64 bytes belongs to, of the results: lower bytes, places, rest or 0, how many weights of a row are whole, each
    thread's columns and values of those, and its two answers: how many these are, whether any rest is not 0."""
    word = np.uint32 if dtype == torch.float32 else np.uint16
    below = 16 if dtype == torch.float32 else 0

    def kernel(arguments):
        rows, inputs, most = arguments[0], arguments[1], arguments[2]
        padded = -(-inputs // BLOCK) * BLOCK
        weight = carray(pointer(arguments[3]), (rows, inputs), word)
        place_of = carray(pointer(arguments[4]), (256,), np.uint8)
        order = carray(pointer(arguments[5]), (HALF,), np.int64)
        lower = carray(pointer(arguments[6]), (rows, padded), np.uint8)
        places = carray(pointer(arguments[7]), (rows, padded // BLOCK, HALF), np.uint8)
        rest = carray(pointer(arguments[8]), (rows, padded if below else 0), np.uint16)
        counts = carray(pointer(arguments[9]), (rows,), np.int32)
        columns = carray(pointer(arguments[10]), (thread_count(), most), np.int32)[thread_number()]
        values = carray(pointer(arguments[11]), (thread_count(), most), np.float32)[thread_number()]
        answer = carray(pointer(arguments[12]), (thread_count(), 2), np.int64)[thread_number()]
        first, end = share(rows)
        kept, seen = 0, np.uint32(0)
        for i in range(first, end):
            before = kept
            for j in range(0, padded, BLOCK):
                for p in range(BLOCK):
                    at = j + (p & HALF) + order[p % HALF]
                    bits = np.uint32(weight[i, at]) if at < inputs else np.uint32(0)
                    half = bits >> np.uint32(below)
                    place = place_of[half >> np.uint32(8)]
                    lower[i, j + p] = half & np.uint32(255) if place < 16 else 0
                    if p < HALF:
                        places[i, j // BLOCK, p] = place & 15
                    else:
                        places[i, j // BLOCK, p - HALF] |= (place & 15) << 4
                    if below:
                        rest[i, at] = bits & np.uint32(0xFFFF) if place < 16 else 0
                        seen |= rest[i, at]
                    if place == 16:
                        if kept < most:
                            columns[kept] = at
                            values[kept] = float_of_bits(np.uint32(bits << np.uint32(16 - below)))
                        kept += 1
            counts[i] = kept - before
        answer[0], answer[1] = kept, seen != 0

    return address_of(kernel, f"compact_pack_{dtype}")


# ---- what compact.py calls


def pack(weight: Tensor, table: Tensor, most: int) -> tuple | None:
    """(lower, places, rest, starts, columns, values) of a weight by a table; None if more than `most` are whole."""
    place_of = torch.full((256,), 16, dtype=torch.uint8, device="cpu")
    place_of[table.long()] = torch.arange(16, dtype=torch.uint8, device="cpu")
    (rows, inputs), threads, order = weight.shape, torch.get_num_threads(), ordered()
    empty, padded = weight.new_empty, -(-inputs // BLOCK) * BLOCK
    lower, places = empty(rows, padded, dtype=torch.uint8), empty(rows, padded // 2, dtype=torch.uint8)
    rest = empty(rows, padded, dtype=torch.int16) if weight.dtype == torch.float32 else None
    counts, answers = empty(rows, dtype=torch.int32), torch.zeros(threads, 2, dtype=torch.int64, device="cpu")
    columns, values = empty(threads, most, dtype=torch.int32), empty(threads, most, dtype=torch.float32)
    made = (weight, place_of, order, lower, places, rest, counts, columns, values, answers)
    run(_pack_kernel(weight.dtype), rows, inputs, most, *_addresses(made))
    kept, rests = answers.T.tolist()
    if sum(kept) > most:
        return None
    columns, values = (torch.cat([row[:n] for row, n in zip(all_, kept, strict=True)]) for all_ in (columns, values))
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return lower, places, rest if any(rests) else None, starts, columns, values


def multiply(product: CompactLinear, x: Tensor, rows: int, residual: Tensor | None, out: Tensor) -> Tensor:
    """`CompactLinear` of so many rows x, into `out`."""
    weight = product.weight
    kernel = linear_kernel(weight.dtype, weight.rest is not None, next(n for n in SIDE_BY_SIDE if n >= rows))
    sizes = rows, product.outputs, product.inputs, int(product.swiglu), len(weight.values)
    addresses = _addresses((x, product.norm, *_order(weight), residual, out))
    run(kernel, *sizes, *addresses, *struct.unpack("i", struct.pack("f", product.eps)))
    return out


def expand(weight: Compact, first: int, end: int) -> Tensor:
    """Rows of a weight as they were."""
    inputs = weight.shape[1]
    out = torch.empty(end - first, inputs, dtype=weight.dtype, device="cpu")
    kernel = _expand_kernel(weight.dtype, weight.rest is not None)
    run(kernel, end - first, first, inputs, len(weight.values), *_addresses(_order(weight)), out.data_ptr())
    return out


def _order(weight: Compact) -> tuple:
    """What a weight has, in the order of the kernels' arguments."""
    return weight.lower, weight.places, weight.rest, weight.table, weight.starts, weight.columns, weight.values


def _addresses(tensors: tuple) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
