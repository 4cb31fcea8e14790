"""What few_bits.py calls for more than a few rows, compiled by Numba for this processor, which must have AMX.

Rows x become right tiles first, each thread's share of them, normalised, and of int8 quantised. A block of 32 outputs'
weights becomes left tiles, 128 inputs at a time; the sums of their products are transposed to rows of results.

    up to 16 rows   reading the weights is what takes the time: a part of them is multiplied while the next is widened
    more            weights of several blocks are widened once and multiplied by all rows; of many inputs, a chunk of
                    them at a time, so that the weights stay in the second cache, and the sums beside them
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from minivlm.kernels.cpu.compact import BLOCK
from minivlm.kernels.cpu.compiling import (
    FLOATS,
    KINDS,
    LINE,
    address_of,
    aligned,
    bits_of_float,
    float_of_bits,
    keep,
    narrow,
    pointer,
    rounded,
    share,
    variant,
    wide,
)
from minivlm.kernels.cpu.few_bits import FewBitsLinear
from minivlm.kernels.cpu.few_rows_numba import told
from minivlm.kernels.cpu.gates import gate_numbers
from minivlm.kernels.cpu.openmp import barrier, run, scratch
from minivlm.kernels.cpu.single_row_numba import normalised, step_of
from minivlm.kernels.cpu.tiles import (
    STEP,
    TILE,
    add_scaled,
    clear_sums,
    give_registers_back,
    load_sums,
    multiply_tiles,
    need_registers,
    store_sums,
    take_registers,
    tile_columns,
    transpose_tile,
)
from minivlm.kernels.cpu.weight_rows import COMPACT, STEPS, WHOLE, tile_block
from minivlm.kernels.cpu.weight_rows import INT4 as HALF_BYTES
from minivlm.kernels.cpu.weight_rows import INT8 as INTEGERS

FEW = 16  # rows of one tile
OUTPUTS = 32  # of a block: two tiles of rows of the weight
TOGETHER = 8  # blocks of which the sums of a few rows are finished together
# Of many rows: how many blocks' weights are widened together; the bytes of them, a thread, and of their sums where they
# are chunks. Milliseconds of 1,000 rows by 11264x1024 and 1024x2816, bfloat16 and then float32, for 16 blocks, 1 and
# 2 MB: 19.2, 9.1, 55.8, 29.7; 8 blocks 24.0, 9.7, 57.5, 29.0; half of the weights 21.5, 9.7, 62.5, 32.6; a quarter of
# the sums 20.0, 10.4, 63.3, 32.7.
BLOCKS, WEIGHTS, SUMS = 16, 2**20, 2**21
UPPER, HALF = np.uint32(0xFFFF0000), np.uint32(16)


# ---- weights that are kept whole, see compact.py


@njit
def put_kept(starts, columns, values, first, end, tiles):
    """Those of 32 rows, of which `starts` is a part, with columns from `first` to `end`, into left tiles [steps, parts,
    2, 16, 32], where there is 0."""
    row = 0
    for at in range(starts[0], starts[-1]):
        while starts[row + 1] <= at:
            row += 1
        if first <= columns[at] < end:
            step, place, value = (columns[at] - first) // STEP, (columns[at] - first) % STEP, values[at]
            for part in range(tiles.shape[1]):
                bits = np.uint32(bits_of_float(value) & UPPER)
                tiles[step, part, row // 16, row % 16, 2 * (place % 16) + place // 16] = bits >> HALF
                value -= float_of_bits(bits)


@njit
def add_kept(starts, columns, values, packed, found):
    """Those of some rows, of which `starts` is a part, by x in right tiles [steps, parts, 16, 16], to found [B, N]."""
    for n in range(len(starts) - 1):
        for at in range(starts[n], starts[n + 1]):
            step, place = columns[at] // STEP, columns[at] % STEP
            for part in range(packed.shape[1]):
                for b in range(len(found)):
                    pair = packed[step, part, place % 16, b]
                    bits = np.uint32(pair & UPPER) if place // 16 else np.uint32(pair << HALF)
                    found[b, n] += values[at] * float_of_bits(bits)


# ---- what follows a product, for the outputs of a row


@njit
def scaled(found, scale, size):
    """int32 sums of integers to float32, in place."""
    for i in range(len(found)):
        found[i] = np.float32(np.int32(bits_of_float(found[i]))) * scale[i] * size


@njit
def stored(found, out):
    """Results as they are."""
    for i in range(len(out)):
        out[i] = narrow(found[i], out)


@njit
def stored_with(found, residual, out):
    """Results that are added to a residual."""
    for i in range(len(out)):
        out[i] = narrow(rounded(found[i], out) + wide(residual[i]), out)


# ---- kernels


@cache
def _pieces(dtype: torch.dtype, form: int) -> SimpleNamespace:
    """What both kernels of a type of x and a form of weights are made of.

    right: how many parts x has. size: numbers of a step.
    """
    need_registers()
    kind, number, integers, compact = FLOATS[dtype], KINDS[dtype], form == INTEGERS, form in (COMPACT, WHOLE)
    right, size = 1 if integers or dtype == torch.bfloat16 else 3, 2 * STEP if integers else STEP

    @variant(dtype, form)
    def opened(arguments):
        """The arguments as arrays: x, norm, starts, columns, values, scale, residual, out, sizes."""
        rows, outputs, inputs, swiglu, kept = arguments[0], arguments[1], arguments[2], arguments[3], arguments[4]
        total = outputs * (1 + swiglu)
        return (
            carray(pointer(arguments[5]), (rows, inputs), kind),
            carray(pointer(arguments[6]), (inputs if arguments[6] else 0,), kind),
            carray(pointer(arguments[11]), (total + 1 if compact else 0,), np.int32),
            carray(pointer(arguments[12]), (kept,), np.int32),
            carray(pointer(arguments[13]), (kept,), np.float32),
            carray(pointer(arguments[14]), (total if integers else 0,), np.float32),
            carray(pointer(arguments[15]), (rows if arguments[15] else 0, outputs), kind),
            carray(pointer(arguments[16]), (rows, outputs), kind),
            carray(pointer(arguments[19]), (rows,), np.float32),
        )

    @variant(dtype, form)
    def pack(x, norm, eps, unit, sizes, packed, side):
        """Up to 16 rows x as the columns of right tiles at an address, one of so many side by side; sizes: of int8 the
        size of a step of each. unit: [16, P] for what is in between."""
        inputs = x.shape[1]
        for i in range(len(x)):
            unit[i, :inputs] = normalised(x[i], norm, eps)
            if integers:
                sizes[i] = step_of(unit[i])
                for j in range(inputs):
                    unit[i, j] = np.rint(unit[i, j] / sizes[i])
        tile_columns(integers, right, np.int64(unit.ctypes.data), unit.shape[1], side, packed)

    @variant(dtype, form)
    def finish(gate, up, gates, at, scale, size, residual, out):
        """A row's sums gate, float32 [N], of the outputs from number `at` on, to results out [V]; up: those beside,
        if they are gates. residual: [1, V], or nothing."""
        count, outputs = len(gate), len(out)
        if integers:
            scaled(gate, scale[at : at + count], size)
        if gates:
            if integers:
                scaled(up, scale[outputs + at : outputs + at + count], size)
            gate_numbers(number, np.int64(gate.ctypes.data), np.int64(up.ctypes.data), count)
        if len(residual):
            stored_with(gate, residual[0, at : at + count], out[at : at + count])
        else:
            stored(gate, out[at : at + count])

    return SimpleNamespace(right=right, size=size, opened=opened, pack=pack, finish=finish)


def _of_some_rows(dtype: torch.dtype, form: int) -> SimpleNamespace:
    """What the kernel for up to FEW rows is made of besides. half, of_x: bytes of the tiles of a block's weights and of
    its x."""
    pieces, integers = _pieces(dtype, form), form == INTEGERS
    right, grouped, form = pieces.right, form == HALF_BYTES, STEPS if form == HALF_BYTES else form
    left, steps = 3 if form == WHOLE else 1, BLOCK // pieces.size  # steps of a block
    of_step, half, of_x = left * 2 * TILE, steps * left * 2 * TILE, steps * right * TILE
    each = OUTPUTS // steps  # rows that are widened beside a step

    @variant(dtype, form)
    def multiply_rows(weight, row, count, later, tiles_of_x, space, sums, totals):
        """So many rows of a weight, up to 32, by x in its tiles to sums [32, 16]. later: the row behind, at which to go
        on. space, totals: for the tiles of two blocks, and the sums of groups [32, 16].

        A step of the block before is multiplied behind each few rows of this one that were widened: a tile that was
        only just stored is waited for."""
        a, b, c, d, padded = weight
        blocks, here, to = padded // BLOCK, np.int64(space.ctypes.data), np.int64(sums.ctypes.data)
        scales, total = b + row * blocks * 4, np.int64(totals.ctypes.data)
        clear_sums(1)
        totals[:] = 0
        for block in range(blocks + 1):
            now, before = here + block % 2 * half, here + (block - 1) % 2 * half
            more, there = later * padded + OUTPUTS * BLOCK * block, tiles_of_x + (block - 1) * of_x
            for step in range(steps):
                done = step * each
                if block < blocks and done < count:
                    some, next_, place = min(each, count - done), more + done * BLOCK, now + done * LINE
                    tile_block(form, left, a, b, c, d, padded, row + done, some, block * BLOCK, next_, place)
                if block:
                    x = there + step * right * TILE
                    multiply_tiles(integers, left, right, 1, before + step * of_step, x, 1, x)  # nothing else to fetch
            if grouped and block:
                store_sums(1, to)
                clear_sums(1)
                add_scaled(to, scales + 4 * (block - 1), 4 * blocks, count, total)
        store_sums(1, to)
        if grouped:
            sums[:] = totals

    return SimpleNamespace(half=half, of_x=of_x, multiply_rows=multiply_rows)


@cache
def some_rows_kernel(dtype: torch.dtype, form: int) -> int:
    """The address of the kernel for up to FEW rows; its arguments are those of few_rows_numba.py's, and the addresses
    of space for the tiles of x and for the sizes of int8's steps."""
    pieces, more, compact = _pieces(dtype, form), _of_some_rows(dtype, form), form in (COMPACT, WHOLE)
    opened, pack, finish, right = pieces.opened, pieces.pack, pieces.finish, pieces.right
    multiply_rows, half, of_x = more.multiply_rows, more.half, more.of_x

    def kernel(arguments):
        take_registers()
        x, norm, starts, columns, values, scale, residual, out, _ = opened(arguments)
        rows, outputs, parts, blocks = len(x), out.shape[1], 1 + arguments[3], -(-x.shape[1] // BLOCK)
        padded = blocks * BLOCK
        weight = arguments[7], arguments[8], arguments[9], arguments[10], padded
        unit, sizes = aligned(FEW * padded).reshape(FEW, padded), np.empty(rows, np.float32)
        unit[:, x.shape[1] :] = 0
        tiles = aligned(blocks * of_x // 4)  # each thread has its own tiles of x
        packed, tiles_of_x = tiles.view(np.uint32).reshape(-1, right, 16, 16), np.int64(tiles.ctypes.data)
        pack(x, norm, float_of_bits(np.uint32(arguments[17])), unit, sizes, tiles_of_x, 1)
        sums, totals = aligned(2 * OUTPUTS * 16).reshape(2, OUTPUTS, 16)
        space, group = aligned(2 * half // 4), TOGETHER * OUTPUTS
        found = aligned(2 * FEW * group).reshape(2, FEW, group)
        first, end = share(-(-outputs // OUTPUTS))
        for number in range(first, end):
            at, place = number * OUTPUTS, (number - first) % TOGETHER * OUTPUTS
            count = min(OUTPUTS, outputs - at)
            for part in range(parts):
                row = part * outputs + at
                later = row + outputs if part + 1 < parts else at + OUTPUTS
                multiply_rows(weight, row, count, later, tiles_of_x, space, sums, totals)
                for i in range(2):
                    to = np.int64(found[part, 0, place + 16 * i :].ctypes.data)
                    transpose_tile(np.int64(sums[16 * i :].ctypes.data), to, found.strides[1])
                if compact:
                    add_kept(starts[row : row + count + 1], columns, values, packed, found[part, :rows, place:])
            if place + OUTPUTS == group or number + 1 == end:
                begin, width = at - place, place + count
                for i in range(rows):
                    gate, up = found[0, i, :width], found[1, i, :width]
                    finish(gate, up, parts > 1, begin, scale, sizes[i], residual[i : i + 1], out[i])
        give_registers_back()
        keep(tiles)

    return address_of(kernel, f"some_rows_{dtype}_{form}")


def _of_many_rows(dtype: torch.dtype, form: int) -> SimpleNamespace:
    """What the kernel for more rows is made of besides."""
    pieces, integers, compact = _pieces(dtype, form), form == INTEGERS, form in (COMPACT, WHOLE)
    pack, right, size = pieces.pack, pieces.right, pieces.size
    left = 1 if form in (COMPACT, INTEGERS) or right == 1 else 3

    @variant(dtype, form)
    def pack_all(x, norm, eps, padded, sizes, to, of_pair):
        """This thread's share of rows x to tiles at an address, so many bytes of two times 16 rows side by side."""
        unit = aligned(16 * padded).reshape(16, padded)
        unit[:, x.shape[1] :] = 0
        first, end = share(-(-len(x) // 16))
        for i in range(first, end):
            some = slice(16 * i, 16 * i + 16)
            pack(x[some], norm, eps, unit, sizes[some], to + i // 2 * of_pair + i % 2 * TILE, 2)

    @variant(dtype, form)
    def widen(weight, row, count, begin, end, tiles):
        """Columns [begin, end) of so many rows of a weight, up to 32, to left tiles [steps, parts, 2, 16, 32]."""
        a, b, c, d, padded, starts, columns, values = weight
        at = np.int64(tiles.ctypes.data)
        for column in range(begin, end, BLOCK):
            here = at + (column - begin) // size * left * 2 * TILE
            more = (row + OUTPUTS) * padded + OUTPUTS * column
            tile_block(form, left, a, b, c, d, padded, row, count, column, more, here)
        if compact:
            put_kept(starts[row : row + count + 1], columns, values, begin, end, tiles)

    @variant(dtype, form)
    def multiply_blocks(tiles, x, of_pair, begin, steps, sums):
        """Several blocks' tiles of a weight by those of 32 rows x, to sums [B, 4, 256]; added to them unless their
        columns begin with number 0. What follows the rows, so many bytes behind, is fetched meanwhile."""
        for block in range(len(tiles)):
            here, to = np.int64(tiles[block].ctypes.data), np.int64(sums[block].ctypes.data)
            if begin:
                load_sums(2, to)
            else:
                clear_sums(2)
            later = x + of_pair + block * (steps * right * 2 * TILE // BLOCKS)
            multiply_tiles(integers, left, right, 2, here, x, steps, later)
            store_sums(2, to)

    @variant(dtype, form)
    def collect(sums, blocks, found):
        """Sums [B, 4, 256] to results [P, 32, N] of P parts, each of so many blocks."""
        for block in range(len(sums)):
            tiles, place = sums[block], found[block // blocks, 0, block % blocks * OUTPUTS :]
            for j in range(4):
                to = np.int64(place.ctypes.data) + j % 2 * 16 * found.strides[1] + j // 2 * LINE
                transpose_tile(np.int64(tiles[j].ctypes.data), to, found.strides[1])

    return SimpleNamespace(left=left, pack_all=pack_all, widen=widen, multiply_blocks=multiply_blocks, collect=collect)


@cache
def many_rows_kernel(dtype: torch.dtype, form: int) -> int:
    """The address of the kernel for more rows, with the same arguments."""
    pieces, more = _pieces(dtype, form), _of_many_rows(dtype, form)
    opened, finish, right, size, left = pieces.opened, pieces.finish, pieces.right, pieces.size, more.left
    pack_all, widen, multiply_blocks, collect = more.pack_all, more.widen, more.multiply_blocks, more.collect
    step = left * 2 * TILE  # bytes of a step of a block
    columns_together = max(BLOCK, WEIGHTS // (BLOCKS * step) * size // BLOCK * BLOCK)

    def kernel(arguments):
        take_registers()
        x, norm, starts, columns, values, scale, residual, out, sizes = opened(arguments)
        rows, outputs, parts, padded = len(x), out.shape[1], 1 + arguments[3], -(-x.shape[1] // BLOCK) * BLOCK
        tiles_of_x, of_pair = arguments[18], padded // size * right * 2 * TILE
        pack_all(x, norm, float_of_bits(np.uint32(arguments[17])), padded, sizes, tiles_of_x, of_pair)
        barrier()
        weight = arguments[7], arguments[8], arguments[9], arguments[10], padded, starts, columns, values
        pairs, chunk = -(-rows // 32), min(padded, columns_together)
        together = pairs if chunk == padded else max(1, SUMS // (BLOCKS * 4 * TILE))  # of which each has its sums
        group = BLOCKS // parts  # blocks of outputs
        tiles = aligned(BLOCKS * chunk // size * step // 4).view(np.uint16).reshape(BLOCKS, -1, left, 2, 16, 32)
        sums = aligned(BLOCKS * (1 if chunk == padded else together) * 4 * 256).reshape(-1, BLOCKS, 4, 256)
        found = aligned(2 * 32 * OUTPUTS * group).reshape(2, 32, OUTPUTS * group)
        first, end = share(-(-outputs // OUTPUTS))
        for at in range(first * OUTPUTS, min(end * OUTPUTS, outputs), group * OUTPUTS):
            count = min(group * OUTPUTS, end * OUTPUTS - at, outputs - at)
            blocks = -(-count // OUTPUTS)
            for pair in range(0, pairs, together):
                for begin in range(0, padded, chunk):
                    stop = min(begin + chunk, padded)
                    for block in range(parts * blocks):
                        first_of_block = block % blocks * OUTPUTS
                        row = block // blocks * outputs + at + first_of_block
                        widen(weight, row, min(OUTPUTS, count - first_of_block), begin, stop, tiles[block])
                    for i in range(pair, min(pair + together, pairs)):
                        these = sums[(i - pair) % len(sums), : parts * blocks]
                        there = tiles_of_x + i * of_pair + begin // size * right * 2 * TILE
                        multiply_blocks(tiles[: parts * blocks], there, of_pair, begin, (stop - begin) // size, these)
                        if stop == padded:
                            collect(these, blocks, found)
                        for row in range(32 * i, min(32 * i + 32, rows) if stop == padded else 0):
                            gate, up = found[0, row % 32, :count], found[1, row % 32, :count]
                            finish(gate, up, parts > 1, at, scale, sizes[row], residual[row : row + 1], out[row])
        give_registers_back()

    return address_of(kernel, f"many_rows_{dtype}_{form}")


def multiply(product: FewBitsLinear, x: Tensor, rows: int, residual: Tensor | None, out: Tensor) -> Tensor:
    """`FewBitsLinear` of so many rows x, into `out`."""
    form, sizes, read, eps = told(product)
    if rows <= FEW:
        kernel, space = some_rows_kernel(product.dtype, form), (None, None)
    else:
        bytes_ = 1 if form == INTEGERS else 2 if product.dtype == torch.bfloat16 else 6  # of a number in tiles
        numbers = -(-rows // 32) * 32 * -(-product.inputs // BLOCK) * BLOCK
        kernel, space = many_rows_kernel(product.dtype, form), (scratch(numbers * bytes_), scratch(4 * rows))
    run(kernel, rows, *sizes, x, product.norm, *read, residual, out, eps, *space)
    return out
