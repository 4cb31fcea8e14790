"""What few_bits.py calls for rows as tiles, compiled by Numba for this processor, which must have AMX.

Weights of several blocks are widened once to left tiles and multiplied by all rows x; of many inputs, a chunk of them
at a time, so that the weights stay in the second cache, and the sums beside them. Up to 16 rows: some_rows_numba.py.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from numba import njit
from torch import Tensor

from minivlm.kernels.cpu.beside_tiles import (
    GATED,
    SHARE,
    STORED,
    STORED_WITH,
    TURNED,
    multiply_beside,
    multiply_fetching,
)
from minivlm.kernels.cpu.compact import BLOCK
from minivlm.kernels.cpu.compiling import (
    KINDS,
    LINE,
    address,
    address_of,
    aligned,
    bits_of_float,
    float_of_bits,
    keep,
    share,
    unowned,
    variant,
)
from minivlm.kernels.cpu.few_bits import FewBitsLinear
from minivlm.kernels.cpu.few_rows_numba import told
from minivlm.kernels.cpu.openmp import barrier, run, scratch
from minivlm.kernels.cpu.row_tiles_numba import HALF, OUTPUTS, UPPER, finishing, row_tiles
from minivlm.kernels.cpu.some_rows_numba import FEW, some_rows_kernel
from minivlm.kernels.cpu.tiles import (
    STEP,
    TILE,
    clear_sums,
    give_registers_back,
    load_sums,
    store_sums,
    take_registers,
    transpose_tile,
)
from minivlm.kernels.cpu.weight_rows import COMPACT, WHOLE, tile_block
from minivlm.kernels.cpu.weight_rows import INT8 as INTEGERS

# How many blocks' weights are widened together; the bytes of them, a thread, and of their sums where they are chunks.
# Two threads' milliseconds of 1,000 rows by 11264x1024 and 1024x2816, bfloat16 and then float32, for 16 blocks, 1 and
# 2 MB: 19.2, 9.1, 55.8, 29.7; 8 blocks 24.0, 9.7, 57.5, 29.0; half of the weights 21.5, 9.7, 62.5, 32.6; a quarter of
# the sums 20.0, 10.4, 63.3, 32.7.
BLOCKS, WEIGHTS, SUMS = 16, 2**20, 2**21


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


def _left_parts(form: int, right: int) -> int:
    """How many parts a weight has, by those of x."""
    return 1 if form in (COMPACT, INTEGERS) or right == 1 else 3


def _packing(dtype: torch.dtype, form: int) -> SimpleNamespace:
    """How rows and weights become tiles."""
    common, compact = row_tiles(dtype, form), form in (COMPACT, WHOLE)
    pack, size, left = common.pack, common.size, _left_parts(form, common.right)

    @variant(dtype, form)
    def pack_all(x, norm, eps, padded, sizes, to, of_pair):
        """This thread's share of rows x to tiles at an address, so many bytes of two times 16 rows side by side."""
        of_unit = aligned(16 * padded)
        unit = unowned(of_unit.reshape(16, padded))
        unit[:, x.shape[1] :] = 0
        first, end = share(-(-len(x) // 16))
        for i in range(first, end):
            some = slice(16 * i, 16 * i + 16)
            pack(x[some], norm, eps, unit, sizes[some], to + i // 2 * of_pair + i % 2 * TILE, 2)
        keep(of_unit)

    @variant(dtype, form)
    def widen(weight, row, count, begin, end, tiles):
        """Columns [begin, end) of so many rows of a weight, up to 32, to left tiles [steps, parts, 2, 16, 32]."""
        a, b, c, d, padded, starts, columns, values = weight
        at = address(tiles)
        for column in range(begin, end, BLOCK):
            here = at + (column - begin) // size * left * 2 * TILE
            more = (row + OUTPUTS) * padded + OUTPUTS * column
            tile_block(form, left, a, b, c, d, padded, row, count, column, more, here)
        if compact:
            put_kept(starts[row : row + count + 1], columns, values, begin, end, tiles)

    return SimpleNamespace(pack_all=pack_all, widen=widen)


def _steps_beside(right: int) -> int:
    """How many steps a quarter of a block is finished beside, by the parts of x."""
    return 2 if right == 3 else 4


def _finishing(dtype: torch.dtype, form: int) -> SimpleNamespace:
    """How sums become results."""
    right, finish, kind = row_tiles(dtype, form).right, finishing(dtype, form).finish, KINDS[dtype]
    left, steps = _left_parts(form, right), _steps_beside(right)

    @variant(dtype, form)
    def finish_block(sums, found, at, scale, sizes, residual, out):
        """Sums [P, 4, 256] of a block to results out [B, V] of up to 32 rows; found: [P, 16, 32] for what is in
        between."""
        for begin in range(0, len(out), 16):
            for part in range(len(sums)):
                for i in range(2):
                    there = address(sums[part]) + (2 * i + begin // 16) * TILE
                    transpose_tile(there, address(found[part]) + i * LINE, found.strides[1])
            some = slice(begin, min(begin + 16, len(out)))
            finish(found, at, scale, sizes[some], residual[some], out[some])

    @variant(dtype, form)
    def finish_beside(part, sums, at, residual, out, places):
        """The same for 32 rows and outputs that are all there, beside the first products of a part of the next block;
        with gates, sums are transposed beside the first part, in place, and finished beside the second."""
        between, parts = out.strides[0], len(sums)
        for j in range(4):
            first, row, place = j * steps, j % 2 * 16, at + j // 2 * 16
            gate, up, to = address(sums[0]) + j * TILE, address(sums[-1]) + j * TILE, address(out[row:, place:])
            if parts == 2 and part == 0:
                multiply_beside(left, right, steps, TURNED, kind, places, first, gate, up, 0, 0)
            elif parts == 2:
                multiply_beside(left, right, steps, GATED, kind, places, first, gate, up, to, between)
            elif len(residual):
                added = address(residual[row:, place:])
                multiply_beside(left, right, steps, STORED_WITH, kind, places, first, gate, added, to, between)
            else:
                multiply_beside(left, right, steps, STORED, kind, places, first, gate, 0, to, between)

    return SimpleNamespace(finish_block=finish_block, finish_beside=finish_beside)


def _multiplying(dtype: torch.dtype, form: int) -> SimpleNamespace:
    """How tiles are multiplied, and finished."""
    right, made, integers = row_tiles(dtype, form).right, _finishing(dtype, form), form == INTEGERS
    finish_block, finish_beside = made.finish_block, made.finish_beside
    left, quarters = _left_parts(form, right), 4 * _steps_beside(right)

    @variant(dtype, form)
    def multiply_blocks(tiles, x, of_pair, begin, steps, sums, ends, found, at, scale, sizes, residual, out):
        """Blocks' tiles of a weight [B, P, ..] by those of 32 rows x, to sums [B, P, 4, 256]; added to them unless
        their columns begin with number 0. What follows the rows, so many bytes behind, is fetched meanwhile. If the
        columns end here, sums become results: of a block beside the products of the next one, where that can be."""
        blocks, parts = len(tiles), tiles.shape[1]
        # Gates with a residual have no emitted form.
        beside = not integers and len(out) == 32 and steps >= quarters and (parts == 1 or not len(residual))
        for number in range(blocks * parts):
            block, part, first = number // parts, number % parts, 0
            here, to = address(tiles[block, part]), address(sums[block, part])
            later = x + of_pair + number * (steps * right * 2 * TILE // SHARE)
            places = here, x, later, to + 4 * TILE
            if begin:
                load_sums(2, to)
            else:
                clear_sums(2)
            if ends and beside and block:
                finish_beside(part, sums[block - 1], at + (block - 1) * OUTPUTS, residual, out, places)
                first = quarters
            if first < steps:
                multiply_fetching(integers, left, right, places, first, steps)
            store_sums(2, to)
            if ends and part == parts - 1 and (block == blocks - 1 or not beside):
                finish_block(sums[block], found, at + block * OUTPUTS, scale, sizes, residual, out)

    return SimpleNamespace(multiply_blocks=multiply_blocks)


@cache
def many_rows_kernel(dtype: torch.dtype, form: int) -> int:
    """The address of the kernel for more rows, with the same arguments."""
    common, packing, multiply_blocks = (
        row_tiles(dtype, form),
        _packing(dtype, form),
        _multiplying(dtype, form).multiply_blocks,
    )
    opened, right, size, left = common.opened, common.right, common.size, _left_parts(form, common.right)
    pack_all, widen = packing.pack_all, packing.widen
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
        chunks = -(-padded // columns_together)
        pairs, chunk = -(-rows // 32), -(-padded // BLOCK // chunks) * BLOCK
        together = pairs if chunk == padded else max(1, SUMS // (BLOCKS * 4 * TILE))  # of which each has its sums
        group = BLOCKS // parts  # blocks of outputs
        of_tiles = aligned(BLOCKS * chunk // size * step // 4)
        of_sums = aligned(BLOCKS * (1 if chunk == padded else together) * 4 * 256)
        of_found = aligned(parts * 16 * OUTPUTS)
        tiles = unowned(of_tiles.view(np.uint16).reshape(group, parts, -1, left, 2, 16, 32))
        sums = unowned(of_sums.reshape(-1, group, parts, 4, 256))
        found = unowned(of_found.reshape(parts, 16, OUTPUTS))
        first, end = share(-(-outputs // OUTPUTS))
        for number in range(first, end, group):
            blocks, at = min(group, end - number), number * OUTPUTS
            for pair in range(0, pairs, together):
                for begin in range(0, padded, chunk):
                    stop = min(begin + chunk, padded)
                    for block in range(blocks):
                        row = at + block * OUTPUTS
                        for part in range(parts):
                            count = min(OUTPUTS, outputs - row)
                            widen(weight, part * outputs + row, count, begin, stop, tiles[block, part])
                    for i in range(pair, min(pair + together, pairs)):
                        these, some = sums[(i - pair) % len(sums), :blocks], slice(32 * i, 32 * i + 32)
                        there = tiles_of_x + i * of_pair + begin // size * right * 2 * TILE
                        results = found, at, scale, sizes[some], residual[some], out[some]
                        steps, ends = (stop - begin) // size, stop == padded
                        multiply_blocks(tiles[:blocks], there, of_pair, begin, steps, these, ends, *results)
        keep((of_tiles, of_sums, of_found))
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
