"""What attention_prefill.py calls, compiled by Numba for this processor, which must have AMX.

First all keys and values become right tiles, 32 of them at a time, shared by all query heads of their group. Then each
thread takes blocks of 32 queries of a head: the scores of one block by all the keys that it sees lie in memory, rows of
32; their weights become left tiles, and meet the values. What is divided by the sum of the weights is the result.
"""

import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from minivlm.kernels.cpu.cache_rows import LOWEST, highest, weigh, widen_numbers
from minivlm.kernels.cpu.compiling import FLOATS, KINDS, address, address_of, aligned, narrow, pointer, share, variant
from minivlm.kernels.cpu.openmp import barrier, run, scratch
from minivlm.kernels.cpu.tiles import (
    STEP,
    TILE,
    clear_sums,
    give_registers_back,
    multiply_tiles,
    need_registers,
    store_rows,
    take_registers,
    tile_columns,
    tile_pairs,
    tile_rows,
)

UNSEEN = np.float32(LOWEST)  # a score, beside which no other is less


@njit
def operand(arguments, at, size):
    """Of q, k or v: its address, and the bytes between two positions and two heads."""
    return arguments[at], arguments[at + 1] * size, arguments[at + 2] * size


@njit
def weigh_scores(scores, lo, hi, factor, peaks, totals):
    """Of each query's scores [32, t] powers of 2 in place, of the keys from lo to the one before hi, 0 of others;
    totals: their sums."""
    for i in range(len(lo)):
        first, end = lo[i] // 32 * 32, -(-hi[i] // 32) * 32
        scores[i, first : lo[i]] = UNSEEN
        scores[i, hi[i] : end] = UNSEEN
        peaks[i] = factor * highest(address(scores[i, first:]), end - first)
    for i in range(len(lo)):
        first, end = lo[i] // 32 * 32, -(-hi[i] // 32) * 32
        totals[i] = weigh(address(scores[i, first:]), end - first, factor, peaks[i])
        scores[i, : lo[i]] = 0
        scores[i, hi[i] :] = 0


@cache
def _pieces(dtype: torch.dtype) -> SimpleNamespace:
    """What the kernel of a type is made of.

    rows: float32 [32, 32 P], of queries, keys, values or results, the channels in P pairs of tiles. two_tiles: bytes of
    such a pair.
    """
    need_registers()
    kind, parts = KINDS[dtype], 1 if dtype == torch.bfloat16 else 3
    rounds, two_tiles = int(parts == 1), 2 * TILE * parts

    @variant(dtype)
    def fetch(x, channels, head, at, count, rows):
        """So many positions of a head, from number `at` on; zeros beyond."""
        place, between, of_head = x
        place += at * between + head * of_head
        for i in range(count):
            widen_numbers(kind, place + i * between, channels, 0, address(rows[i]))
        rows[:, channels:] = 0
        rows[count:] = 0

    @variant(dtype)
    def tile_step(k, v, channels, keys, unit, rows, tiles_of_k, tiles_of_v):
        """A step of a head's keys and values, by its number among all, to tiles."""
        steps, at, line, pairs = -(-keys // STEP), address(rows), rows.strides[0], rows.shape[1] // 32
        head, step = unit // steps, unit % steps
        count = min(STEP, keys - STEP * step)
        fetch(k, channels, head, STEP * step, count, rows)
        for half in range(2):
            to = tiles_of_k + unit * pairs * two_tiles + half * TILE
            tile_columns(0, parts, at + 16 * half * line, 32 * pairs, 2, to)
        fetch(v, channels, head, STEP * step, count, rows)
        for pair in range(pairs):
            tile_pairs(parts, at + 128 * pair, line, tiles_of_v + ((head * pairs + pair) * steps + step) * two_tiles)

    @variant(dtype)
    def score(rows, tiles, begin, stop, asked, scores):
        """32 queries by a head's keys of the steps from `begin` on to scores [32, t]; asked: space for their tiles."""
        left, to, pairs = address(asked), address(scores), rows.shape[1] // 32
        tile_rows(parts, 0, address(rows), rows.strides[0], 32 * pairs, left)
        for step in range(begin, stop):
            right = tiles + step * pairs * two_tiles
            clear_sums(2)
            multiply_tiles(0, parts, parts, 2, left, right, pairs)
            store_rows(to + 4 * STEP * (step - begin), scores.strides[0])

    @variant(dtype)
    def mix(scores, tiles, begin, stop, steps, weights, rows):
        """32 queries' weights [32, t] by those keys' values to rows; weights: space for their tiles."""
        left, to = address(weights), address(rows)
        tile_rows(parts, rounds, address(scores), scores.strides[0], scores.shape[1], left)
        for pair in range(rows.shape[1] // 32):
            right = tiles + (pair * steps + begin) * two_tiles
            clear_sums(2)
            multiply_tiles(0, parts, parts, 2, left, right, stop - begin)
            store_rows(to + 128 * pair, rows.strides[0])

    return SimpleNamespace(fetch=fetch, tile_step=tile_step, score=score, mix=mix, two_tiles=two_tiles)


@cache
def attention_kernel(dtype: torch.dtype) -> int:
    """The address of the kernel behind `attention`, whose arguments are: queries, keys, query heads, those of a group;
    of q, k and v each its address and how many numbers are between two positions and two heads; the addresses of lo and
    hi, of space for the tiles of keys and of values, and of the result; the channels of a head.
    """
    pieces, stored = _pieces(dtype), FLOATS[dtype]
    fetch, tile_step, score, mix, two_tiles = pieces.fetch, pieces.tile_step, pieces.score, pieces.mix, pieces.two_tiles
    size, exponent = np.dtype(stored).itemsize, math.log2(math.e)

    def kernel(arguments):
        take_registers()
        queries, keys, heads, group = arguments[0], arguments[1], arguments[2], arguments[3]
        q, k, v = operand(arguments, 4, size), operand(arguments, 7, size), operand(arguments, 10, size)
        lo = carray(pointer(arguments[13]), (queries,), np.int32)
        hi = carray(pointer(arguments[14]), (queries,), np.int32)
        tiles_of_k, tiles_of_v, channels = arguments[15], arguments[16], arguments[18]
        out = carray(pointer(arguments[17]), (queries, heads, channels), stored)
        steps, blocks = -(-keys // STEP), -(-queries // 32)
        rows = np.empty((32, -(-channels // 32) * 32), np.float32)
        of_step, factor = rows.shape[1] // 32 * two_tiles, np.float32(exponent / math.sqrt(channels))
        first, end = share(heads // group * steps)
        for unit in range(first, end):
            tile_step(k, v, channels, keys, unit, rows, tiles_of_k, tiles_of_v)
        barrier()
        space, weights, asked = aligned(32 * STEP * steps), aligned(steps * two_tiles // 4), aligned(of_step // 4)
        peaks, totals = np.empty(32, np.float32), np.empty(32, np.float32)
        first, end = share(heads * blocks)
        for unit in range(first, end):
            head, at = unit // blocks, unit % blocks * 32
            count, behind = min(32, queries - at), head // group * steps * of_step
            begins, ends = lo[at : at + count], hi[at : at + count]
            begin, stop = begins.min() // STEP, -(-ends.max() // STEP)
            scores = space[: 32 * STEP * (stop - begin)].reshape(32, STEP * (stop - begin))
            fetch(q, channels, head, at, count, rows)
            score(rows, tiles_of_k + behind, begin, stop, asked, scores)
            weigh_scores(scores, begins - STEP * begin, ends - STEP * begin, factor, peaks, totals)
            mix(scores, tiles_of_v + behind, begin, stop, steps, weights, rows)
            for i in range(count):
                for c in range(channels):
                    out[at + i, head, c] = narrow(rows[i, c] / totals[i], out)
        give_registers_back()

    return address_of(kernel, f"attention_prefill_{dtype}")


def attend(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, out: Tensor) -> Tensor:
    """`attention`, into `out`."""
    (queries, heads, channels), (keys, kv_heads, _) = q.shape, k.shape
    bytes_ = 2 if q.dtype == torch.bfloat16 else 6  # of a number in tiles
    size = kv_heads * -(-keys // STEP) * STEP * -(-channels // 32) * 32 * bytes_
    strided = [number for x in (q, k, v) for number in (x, *x.stride()[:2])]
    spaces = scratch(size), scratch(size)
    run(attention_kernel(q.dtype), queries, keys, heads, heads // kv_heads, *strided, lo, hi, *spaces, out, channels)
    return out
