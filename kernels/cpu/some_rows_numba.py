"""What many_rows_numba.py calls for up to 16 rows, by AMX, compiled by Numba for this processor.

Reading the weights is what takes the time: a part of them is multiplied while the next is widened to left tiles.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from numba import njit

from minivlm.kernels.cpu.compact import BLOCK
from minivlm.kernels.cpu.compiling import LINE, address, address_of, aligned, float_of_bits, keep, share, variant
from minivlm.kernels.cpu.row_tiles_numba import HALF, OUTPUTS, UPPER, finishing, row_tiles
from minivlm.kernels.cpu.tiles import (
    STEP,
    TILE,
    add_scaled,
    clear_sums,
    give_registers_back,
    multiply_tiles,
    store_sums,
    take_registers,
    transpose_tile,
)
from minivlm.kernels.cpu.weight_rows import COMPACT, STEPS, WHOLE, tile_block
from minivlm.kernels.cpu.weight_rows import INT4 as HALF_BYTES
from minivlm.kernels.cpu.weight_rows import INT8 as INTEGERS

FEW = 16  # rows of one tile
TOGETHER = 8  # blocks of which the sums are finished together


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


def _of_some_rows(dtype: torch.dtype, form: int) -> SimpleNamespace:
    """What the kernel for up to FEW rows is made of besides. half, of_x: bytes of the tiles of a block's weights and of
    its x."""
    common, integers = row_tiles(dtype, form), form == INTEGERS
    right, grouped, form = common.right, form == HALF_BYTES, STEPS if form == HALF_BYTES else form
    left, steps = 3 if form == WHOLE else 1, BLOCK // common.size  # steps of a block
    of_step, half, of_x = left * 2 * TILE, steps * left * 2 * TILE, steps * right * TILE
    each = OUTPUTS // steps  # rows that are widened beside a step

    @variant(dtype, form)
    def multiply_rows(weight, row, count, later, tiles_of_x, space, sums, totals):
        """So many rows of a weight, up to 32, by x in its tiles to sums [32, 16]. later: the row behind, at which to go
        on. space, totals: for the tiles of two blocks, and the sums of groups [32, 16].

        A step of the block before is multiplied behind each few rows of this one that were widened: a tile that was
        only just stored is waited for."""
        a, b, c, d, padded = weight
        blocks, here, to = padded // BLOCK, address(space), address(sums)
        scales, total = b + row * blocks * 4, address(totals)
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
                    multiply_tiles(integers, left, right, 1, before + step * of_step, x, 1)
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
    """The address of the kernel for up to FEW rows; its arguments are those of few_rows_numba.py's, and two
    addresses of space, which only the kernel for more rows uses."""
    common, more, compact = row_tiles(dtype, form), _of_some_rows(dtype, form), form in (COMPACT, WHOLE)
    opened, pack, right, finish = common.opened, common.pack, common.right, finishing(dtype, form).finish
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
        packed, tiles_of_x = tiles.view(np.uint32).reshape(-1, right, 16, 16), address(tiles)
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
                    to = address(found[part, 0, place + 16 * i :])
                    transpose_tile(address(sums[16 * i :]), to, found.strides[1])
                if compact:
                    add_kept(starts[row : row + count + 1], columns, values, packed, found[part, :rows, place:])
            if place + OUTPUTS == group or number + 1 == end:
                finish(found[:parts, :rows, : place + count], at - place, scale, sizes, residual, out)
        give_registers_back()
        keep(tiles)

    return address_of(kernel, f"some_rows_{dtype}_{form}")
