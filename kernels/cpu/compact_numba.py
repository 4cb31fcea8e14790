"""What compact.py calls, compiled by Numba for this processor, which must have AVX-512.

The loop over a row that is widened is in weight_rows.py.
"""

from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from minivlm.kernels.cpu.compact import BLOCK, Compact
from minivlm.kernels.cpu.compiling import FLOATS, KINDS, address, address_of, float_of_bits, narrow, pointer, share
from minivlm.kernels.cpu.openmp import run, thread_count, thread_number
from minivlm.kernels.cpu.weight_rows import COMPACT, INT4, WHOLE, order_row, widen_row


@cache
def _expand_kernel(dtype: torch.dtype, form: int) -> int:
    """The address of the kernel behind `expand`, whose arguments are: rows, the first, inputs, how many weights are
    kept whole, the addresses of the weight's parts, see `dots`, of a compact one's starts, columns and values, and of
    the result."""
    stored, kind, compact = FLOATS[dtype], KINDS[dtype], form in (COMPACT, WHOLE)

    def kernel(arguments):
        rows, first, inputs, kept = arguments[0], arguments[1], arguments[2], arguments[3]
        starts = carray(pointer(arguments[8]), (first + rows + 1 if compact else 0,), np.int32)
        columns = carray(pointer(arguments[9]), (kept,), np.int32)
        values = carray(pointer(arguments[10]), (kept,), np.float32)
        out = carray(pointer(arguments[11]), (rows, inputs), stored)
        a, b, c, d = arguments[4], arguments[5], arguments[6], arguments[7]
        padded = -(-inputs // BLOCK) * BLOCK
        row = np.empty(padded, stored)
        begin, end = share(rows)
        for i in range(begin, end):
            place = out[i].ctypes.data if inputs == padded else row.ctypes.data
            widen_row(form, kind, a, b, c, d, padded, first + i, np.int64(place))
            if inputs < padded:
                out[i] = row[:inputs]
            for at in range(starts[first + i] if compact else 0, starts[first + i + 1] if compact else 0):
                out[i, columns[at]] = narrow(values[at], out)

    return address_of(kernel, f"compact_expand_{dtype}_{form}")


@njit
def keep_whole(at, bits, lower, places, columns, values, kept):
    """Note a number of a row, by its bits as float32, that is kept whole, if there is room; it is 0 where it was."""
    lower[at] = places[at] = 0
    if kept < len(columns):
        columns[kept] = at
        values[kept] = float_of_bits(bits)


@cache
def _pack_kernel(dtype: torch.dtype) -> int:
    """The address of the kernel behind `pack`, whose arguments are: rows, inputs, how many weights each thread may keep
    whole, the addresses of the weight, of the place of each upper byte (16 where it has none), of the results: lower
    bytes, places, rest or 0, how many weights of a row are whole, each thread's columns and values of those, and its
    two answers: how many these are, whether any number has a rest."""
    word, below = (np.uint32, 16) if dtype == torch.float32 else (np.uint16, 0)

    def kernel(arguments):
        rows, inputs, most = arguments[0], arguments[1], arguments[2]
        padded = -(-inputs // BLOCK) * BLOCK
        weight = carray(pointer(arguments[3]), (rows, inputs), word)
        place_of = carray(pointer(arguments[4]), (256,), np.uint8)
        ordered_lower = carray(pointer(arguments[5]), (rows, padded), np.uint8)
        ordered_places = carray(pointer(arguments[6]), (rows, padded // 2), np.uint8)
        rest = carray(pointer(arguments[7]), (rows, padded if below else 0), np.uint16)
        counts = carray(pointer(arguments[8]), (rows,), np.int32)
        columns = carray(pointer(arguments[9]), (thread_count(), most), np.int32)[thread_number()]
        values = carray(pointer(arguments[10]), (thread_count(), most), np.float32)[thread_number()]
        answer = carray(pointer(arguments[11]), (thread_count(), 2), np.int64)[thread_number()]
        lower, places = np.zeros(padded, np.uint8), np.zeros(padded, np.uint8)
        first, end = share(rows)
        kept, seen = 0, np.uint16(0)
        for i in range(first, end):
            before, rare = kept, np.uint8(0)
            for j in range(inputs):
                lower[j] = np.uint8(weight[i, j] >> below)
                places[j] = place_of[weight[i, j] >> (below + 8)]
            for j in range(inputs):
                rare = np.uint8(rare | places[j])
            for j in range(inputs if below else 0):
                rest[i, j] = np.uint16(weight[i, j])
                seen = np.uint16(seen | rest[i, j])
            for j in range(inputs if rare > 15 else 0):
                if places[j] > 15:
                    bits = np.uint32(np.uint32(weight[i, j]) << np.uint32(16 - below))
                    keep_whole(j, bits, lower, places, columns, values, kept)
                    kept += 1
                    if below:
                        rest[i, j] = 0
            rest[i, inputs:] = 0
            counts[i] = kept - before
            of = address(lower), address(places)
            to = address(ordered_lower[i]), address(ordered_places[i])
            order_row(of[0], of[1], padded, to[0], to[1])
        answer[0], answer[1] = kept, seen != 0

    return address_of(kernel, f"compact_pack_{dtype}")


# ---- what compact.py calls


def pack(weight: Tensor, table: Tensor, most: int) -> tuple | None:
    """(lower, places, rest, starts, columns, values) of a weight by a table; None if more than `most` are whole."""
    place_of = torch.full((256,), 16, dtype=torch.uint8, device="cpu")
    place_of[table.long()] = torch.arange(16, dtype=torch.uint8, device="cpu")
    (rows, inputs), threads = weight.shape, torch.get_num_threads()
    empty, padded = weight.new_empty, -(-inputs // BLOCK) * BLOCK
    lower, places = empty(rows, padded, dtype=torch.uint8), empty(rows, padded // 2, dtype=torch.uint8)
    rest = empty(rows, padded, dtype=torch.int16) if weight.dtype == torch.float32 else None
    counts, answers = empty(rows, dtype=torch.int32), torch.zeros(threads, 2, dtype=torch.int64, device="cpu")
    columns, values = empty(threads, most, dtype=torch.int32), empty(threads, most, dtype=torch.float32)
    made = (weight, place_of, lower, places, rest, counts, columns, values, answers)
    run(_pack_kernel(weight.dtype), rows, inputs, most, *made)
    kept, rests = answers.T.tolist()
    if sum(kept) > most:
        return None
    columns, values = (torch.cat([row[:n] for row, n in zip(all_, kept, strict=True)]) for all_ in (columns, values))
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return lower, places, rest if any(rests) else None, starts, columns, values


def expand(weight: Compact, first: int, end: int) -> Tensor:
    """Rows of a weight as they were."""
    form = COMPACT if weight.rest is None else WHOLE
    return _expanded(form, weight.dtype, weight.inputs, first, end, len(weight.values), *parts(weight))


def expand_int4(weight: Tensor, scale: Tensor, first: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows of an int4 weight, uint8 [N, K / 2] with scale float32 [N, K / 128], rounded to a type, [end - first, K]."""
    return _expanded(INT4, dtype, 2 * weight.shape[1], first, end, 0, weight, scale, *[None] * 5)


def _expanded(form: int, dtype: torch.dtype, inputs: int, first: int, end: int, kept: int, *read) -> Tensor:
    out = torch.empty(end - first, inputs, dtype=dtype, device="cpu")
    run(_expand_kernel(dtype, form), end - first, first, inputs, kept, *read, out)
    return out


def parts(weight: Compact) -> tuple:
    """What a weight has, in the order of the kernels' arguments."""
    return weight.lower, weight.places, weight.rest, weight.table, weight.starts, weight.columns, weight.values
