"""What attention_prefill.py calls, compiled by Numba for this processor, which must have AMX.

First all keys and values become right tiles, 32 of them at a time, shared by all query heads of their group. Then each
thread takes blocks of 32 queries of a head: the scores of one block by all the keys that it sees lie in memory, rows of
32; their weights become left tiles, and meet the values. What is divided by the sum of the weights is the result.
"""

import math
from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from minivlm.kernels.cpu.cache_rows import highest, weigh, widen_numbers
from minivlm.kernels.cpu.compiling import FLOATS, address_of, aligned, keep, narrow, pointer, share
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

UNSEEN = np.float32(-1e30)  # a score, beside which another is of any size


@cache
def attention_kernel(dtype: torch.dtype, channels: int) -> int:
    """The address of the kernel behind `attention`, whose arguments are: queries, keys, query heads, those of a group;
    of q, k and v each its address and how many numbers are between two positions and two heads; the addresses of lo and
    hi, of space for the tiles of keys and of values, and of the result.
    """
    need_registers()
    stored, kind, parts = FLOATS[dtype], list(FLOATS).index(dtype), 1 if dtype == torch.bfloat16 else 3
    size, rounds, pairs = np.dtype(stored).itemsize, int(parts == 1), -(-channels // 32)  # pairs of tiles of channels
    width, two_tiles, factor = 32 * pairs, 2 * TILE * parts, np.float32(channels**-0.5 * math.log2(math.e))

    @njit
    def fetch(address, between, count, rows):
        """So many rows of a type at an address, so many bytes apart, as float32 [32, W]; zeros beyond."""
        for i in range(count):
            widen_numbers(kind, address + i * between, channels, 0, np.int64(rows[i].ctypes.data))
        rows[:, channels:] = 0
        rows[count:] = 0

    @njit
    def weights_of(scores, lo, hi, totals, peaks):
        """Of each query's scores [32, t] powers of 2 in place, of the keys from lo to the one before hi, 0 of others;
        totals: their sums."""
        for i in range(len(lo)):
            first, end = lo[i] // 32 * 32, -(-hi[i] // 32) * 32
            scores[i, first : lo[i]] = UNSEEN
            scores[i, hi[i] : end] = UNSEEN
            peaks[i] = factor * highest(np.int64(scores[i, first:].ctypes.data), end - first)
        for i in range(len(lo)):
            first, end = lo[i] // 32 * 32, -(-hi[i] // 32) * 32
            totals[i] = weigh(np.int64(scores[i, first:].ctypes.data), end - first, factor, peaks[i])
            scores[i, : lo[i]] = 0
            scores[i, hi[i] :] = 0

    def kernel(arguments):
        take_registers()
        queries, keys, heads, group = arguments[0], arguments[1], arguments[2], arguments[3]
        q, q_position, q_head = arguments[4], arguments[5] * size, arguments[6] * size
        k, k_position, k_head = arguments[7], arguments[8] * size, arguments[9] * size
        v, v_position, v_head = arguments[10], arguments[11] * size, arguments[12] * size
        lo, hi = (
            carray(pointer(arguments[13]), (queries,), np.int32),
            carray(pointer(arguments[14]), (queries,), np.int32),
        )
        tiles_of_k, tiles_of_v = arguments[15], arguments[16]
        out = carray(pointer(arguments[17]), (queries, heads, channels), stored)
        steps = -(-keys // STEP)
        head_bytes = steps * pairs * two_tiles
        rows = np.empty((32, width), np.float32)
        rows_at, line = np.int64(rows.ctypes.data), rows.strides[0]

        first, end = share(heads // group * steps)
        for unit in range(first, end):
            head, step = unit // steps, unit % steps
            count = min(STEP, keys - STEP * step)
            fetch(k + STEP * step * k_position + head * k_head, k_position, count, rows)
            to = tiles_of_k + head * head_bytes + step * pairs * two_tiles
            for half in range(2):
                tile_columns(0, parts, rows_at + 16 * half * line, width, 2, to + half * TILE)
            fetch(v + STEP * step * v_position + head * v_head, v_position, count, rows)
            for pair in range(pairs):
                to = tiles_of_v + head * head_bytes + (pair * steps + step) * two_tiles
                tile_pairs(parts, rows_at + 128 * pair, line, to)
        barrier()

        scores, weights, asked = (
            aligned(32 * STEP * steps),
            aligned(steps * two_tiles // 4),
            aligned(pairs * two_tiles // 4),
        )
        weights_at, asked_at = np.int64(weights.ctypes.data), np.int64(asked.ctypes.data)
        totals, peaks = np.empty(32, np.float32), np.empty(32, np.float32)
        blocks = -(-queries // 32)
        first, end = share(heads * blocks)
        for unit in range(first, end):
            head, at = unit // blocks, unit % blocks * 32
            count = min(32, queries - at)
            fetch(q + at * q_position + head * q_head, q_position, count, rows)
            tile_rows(parts, 0, rows_at, line, width, asked_at)
            begin, stop = lo[at : at + count].min() // STEP, -(-hi[at : at + count].max() // STEP)
            seen = scores[: 32 * STEP * (stop - begin)].reshape(32, STEP * (stop - begin))
            seen_at = np.int64(seen.ctypes.data)
            here = head // group * head_bytes
            for step in range(begin, stop):
                clear_sums(2)
                there = tiles_of_k + here + step * pairs * two_tiles
                multiply_tiles(0, parts, parts, 2, asked_at, there, pairs, there)
                store_rows(seen_at + 4 * STEP * (step - begin), seen.strides[0])
            some = slice(at, at + count)
            weights_of(seen, lo[some] - STEP * begin, hi[some] - STEP * begin, totals, peaks)
            tile_rows(parts, rounds, seen_at, seen.strides[0], STEP * (stop - begin), weights_at)
            for pair in range(pairs):
                clear_sums(2)
                there = tiles_of_v + here + (pair * steps + begin) * two_tiles
                multiply_tiles(0, parts, parts, 2, weights_at, there, stop - begin, there)
                store_rows(rows_at + 128 * pair, line)
            for i in range(count):
                for c in range(channels):
                    out[at + i, head, c] = narrow(rows[i, c] / totals[i], out)
        give_registers_back()
        keep(weights)
        keep(asked)

    return address_of(kernel, f"attention_prefill_{dtype}_{channels}")


def attend(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, out: Tensor) -> Tensor:
    """`attention`, into `out`."""
    (queries, heads, channels), (keys, kv_heads, _) = q.shape, k.shape
    bytes_ = 2 if q.dtype == torch.bfloat16 else 6  # of a number in tiles
    size = kv_heads * -(-keys // STEP) * STEP * -(-channels // 32) * 32 * bytes_
    strided = [number for x in (q, k, v) for number in (x, *x.stride()[:2])]
    spaces = scratch(size), scratch(size)
    kernel = attention_kernel(q.dtype, channels)
    run(kernel, queries, keys, heads, heads // kv_heads, *strided, lo, hi, *spaces, out)
    return out
