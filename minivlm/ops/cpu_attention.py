"""Attention of backend `cpu`: rows that bring one query each attend together, other rows one after the other.

In a server's step dozens of rows bring one query beside a piece of somebody's prompt. Row by row each costs the calls
of a whole row; together they cost about what one does. Rows of many queries, and tiles of many patches, have a kernel
of this project where it can run, see kernels/cpu/attention_prefill.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minivlm.kernels.cpu import attention_prefill
from minivlm.ops import attention as plain
from minivlm.ops import cpu
from minivlm.ops.cpu_shapes import attend
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rope import rotate
from minivlm.ops.rows import Rows

# Attention of rows together reads every slot from the first row's to the last one's, as far as the longest row's keys;
# one by one it takes a call for each row, the time in which so many bytes of the cache are read: measured with 8 and 32
# rows of the shipped checkpoint in bfloat16 and float32. Equally long rows of 300 keys take two thirds of the time.
CALL = 80_000
# Attention of many queries has a kernel from so many channels of all heads on, which small models do not have, see
# cpu_groups.py, and so many of them by queries by keys. Microseconds of n queries by as many keys, 16 heads of 64
# channels, bfloat16 and float32, the kernel / SDPA: 128 502 / 506 and 536 / 739, 256 1051 / 1413 and 1371 / 2544, 512
# 2862 / 5023 and 4254 / 9950.
WIDE, LARGE = 512, 2**25

Attend = Callable[[int, Tensor], Tensor]  # (number of the layer, q [.., H, C]) -> [B, K, H/K, C]


@dataclass
class Seen:
    """What packed rows see: the first `singles` of them bring one query each.

    places: int64 [2, singles], the slot and the position of each single query.
    intervals: of every row the first key that each of its queries sees, and the one behind the last, int32 [n];
    None where they see several intervals.
    """

    singles: int
    places: Tensor
    sights: tuple[tuple[plain.Sight, ...], ...]  # of all rows
    window: int | None
    intervals: tuple[tuple[Tensor, Tensor] | None, ...]
    attend: Attend | None = None  # of the singles, made at the first layer


def sight(rows: Rows, window: int | None, device) -> Seen:
    """What each row's queries may see, worked out once for all layers."""
    singles = len(list(takewhile(lambda n: n == 1, rows.lengths)))
    places = torch.tensor((rows.slots[:singles], rows.starts[:singles]), dtype=torch.int64, device="cpu")
    intervals = tuple(
        _interval(start, n, window) if len(segments) == 1 else None
        for n, start, segments in zip(rows.lengths, rows.starts, rows.segments, strict=True)
    )
    return Seen(singles, places, plain.sight(rows, window, device), window, intervals)


def _interval(start: int, queries: int, window: int | None) -> tuple[Tensor, Tensor]:
    hi = torch.arange(start + 1, start + queries + 1, dtype=torch.int32, device="cpu")
    return (torch.zeros_like(hi) if window is None else (hi - window).clamp_(min=0)), hi


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    rows: Rows,
    seen: Seen,
    cache: KVCache | None,
    layer: int,
) -> Tensor:
    """q [S, H, C], k and v [S, K, C] before rotation; seen: what `sight` returned. Returns [S, H * C]."""
    q, k, n = rotate(q, *rope), rotate(k, *rope), seen.singles
    if cache is None or n == 0:
        return torch.cat(_one_after_another(q, k, v, rows, seen, cache, layer, 0))
    if seen.attend is None:
        slots, starts = rows.slots[:n], rows.starts[:n]
        if max(starts) >= cache.capacity:
            raise ValueError(f"position {max(starts)} does not fit in a cache of {cache.capacity} positions")
        seen.attend = SingleQueries(cache, q.shape[1], seen.window).of(slots, starts)
    slots, positions = seen.places
    cache.keys[layer].transpose(1, 2)[slots, positions] = k[:n]
    cache.values[layer].transpose(1, 2)[slots, positions] = v[:n]
    heads = seen.attend(layer, q[:n]).view(n, -1)
    if n == len(q):
        return heads
    return torch.cat((heads, *_one_after_another(*(part[n:] for part in (q, k, v)), rows, seen, cache, layer, n)))


def _one_after_another(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, seen: Seen, cache: KVCache | None, layer: int, first: int
) -> list[Tensor]:
    """The results of the rows from number `first` on, whose q, k and v these are: of each [n, H * C]."""
    lengths, found = rows.lengths[first:], []
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    for row, (queries, keys, values) in enumerate(parts, first):
        interval = seen.intervals[row]
        if interval is None or not _has_kernel(queries, rows.starts[row] + len(queries)):
            alone = Rows(*(part[row : row + 1] for part in (rows.lengths, rows.starts, rows.slots, rows.segments)))
            looks = seen.sights[row : row + 1]
            found.append(plain.attend_rows(attend, queries, keys, values, alone, looks, cache, layer))
            continue
        if cache is not None:
            new = (x.transpose(0, 1) for x in (keys, values))  # [K, n, C]
            stored = cache.write(layer, rows.slots[row], rows.starts[row], *new)
            keys, values = (x.transpose(0, 1) for x in stored)  # [start + n, K, C]
        begin = int(interval[0][0])  # nobody sees keys before
        bounds = [bound - begin for bound in interval]
        found.append(attention_prefill.attention(queries, keys[begin:], values[begin:], *bounds).flatten(1))
    return found


def _has_kernel(q: Tensor, keys: int) -> bool:
    """Whether queries q [n, H, C] go through this project's kernel."""
    if q.numel() * keys < LARGE or q.shape[1] * q.shape[2] < WIDE or q.requires_grad:
        return False
    return attention_prefill.missing(q.dtype, q.shape[2]) is None


def vision_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The encoder's: every patch of a tile sees every other. q, k, v [N, H, P, C] -> [N, H, P, C]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [N, P, H, C]
    patches = q.shape[1]
    if not (len(q) and _has_kernel(q[0], patches)):
        return plain.fused(*(x.transpose(1, 2) for x in (q, k, v)), "all")
    hi = torch.full((patches,), patches, dtype=torch.int32, device="cpu")
    tiles = [attention_prefill.attention(*tile, torch.zeros_like(hi), hi) for tile in zip(q, k, v, strict=True)]
    return torch.stack(tiles).transpose(1, 2)


class SingleQueries:
    """Attention of rows with one query each over the keys in a cache, together where that is faster."""

    def __init__(self, cache: KVCache, heads: int, window: int | None):
        self.cache, self.capacity, self.window = (cache.keys, cache.values), cache.capacity, window
        kv_heads, channels = cache.keys.shape[2], cache.keys.shape[4]
        self.grouped = (kv_heads, heads // kv_heads, channels)
        self.key_bytes = 2 * kv_heads * channels * cache.keys.itemsize  # with its value
        self.single = single_attention(cache.keys.dtype, heads // kv_heads)
        self.masks = _masks(self.capacity, window or self.capacity, cache.keys.dtype)

    def of(self, slots: Sequence[int], positions: Sequence[int]) -> Attend:
        """The attention of rows whose queries are at these positions of their slots."""
        if not self.alike(slots, positions):
            return self._one_by_one(slots, positions)
        together = self._together(slots, positions)

        def attend(layer: int, q: Tensor) -> Tensor:
            heads = together(layer, q)
            if heads.isfinite().all():
                return heads
            # What is masked was not a number, where a broken row was before; or a row is broken now.
            return self._one_by_one(slots, positions)(layer, q)

        return attend

    def alike(self, slots: Sequence[int], positions: Sequence[int]) -> bool:
        """Whether several rows attend together."""
        if len(slots) == 1:
            return False
        first = [self._first(position) for position in positions]
        read = (max(slots) - min(slots) + 1) * (max(positions) + 1 - min(first))
        seen = sum(positions) + len(slots) - sum(first)
        return (read - seen) * self.key_bytes <= len(slots) * CALL

    def _first(self, position: int) -> int:
        """The first position that one sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def _one_by_one(self, slots: Sequence[int], positions: Sequence[int]) -> Attend:
        """Each row over its own keys."""
        seen = []
        for slot, position in zip(slots, positions, strict=True):
            lo = self._first(position)
            kept = (x.select(1, slot).narrow(2, lo, position + 1 - lo).unsqueeze(1) for x in self.cache)
            seen.append(list(zip(*(x.unbind() for x in kept), strict=True)))  # keys, values [1, K, t, C] of each layer
        shape = (-1, 1, *self.grouped)

        def attend(layer: int, q: Tensor) -> Tensor:
            rows = zip(q.reshape(shape), seen, strict=True)
            heads = [self.single(query, *kept[layer]) for query, kept in rows]
            return heads[0] if len(heads) == 1 else torch.cat(heads)

        return attend

    def _together(self, slots: Sequence[int], positions: Sequence[int]) -> Attend:
        """All rows over the keys of all slots from the first to the last, as many as the longest row has. What a row
        does not see is masked: it must be finite, and unwritten positions of a cache are 0."""
        base, lo, end = min(slots), min(map(self._first, positions)), max(positions) + 1
        places = [slot - base for slot in slots]
        row_of = [0] * (max(places) + 1)  # a slot in between without a row computes row 0, for nobody
        for row, place in enumerate(places):
            row_of[place] = row
        mask = self.masks.narrow(1, lo, end - lo).index_select(
            0, torch.tensor([self.capacity - 1 - positions[row] for row in row_of], device="cpu")
        )[:, None, None]  # [slots, 1, 1, t]
        kept = (x[:, base : base + len(row_of), :, lo:end].unbind() for x in self.cache)
        seen = list(zip(*kept, strict=True))  # keys, values [slots, K, t, C] of each layer
        if tuple(slots) == tuple(range(base, base + len(slots))):  # as most often
            return lambda layer, q: self.single(q.reshape(-1, *self.grouped), *seen[layer], mask)

        row_of, places = torch.tensor(row_of, device="cpu"), torch.tensor(places, device="cpu")

        def attend(layer: int, q: Tensor) -> Tensor:
            queries = q.index_select(0, row_of).view(-1, *self.grouped)
            return self.single(queries, *seen[layer], mask).index_select(0, places)

        return attend


def _masks(size: int, window: int, dtype: torch.dtype) -> Tensor:
    """[size, size], in row size - 1 - p what is added to the scores of a query at p: 0 for the `window` keys up to p,
    else -inf. All rows are a view of one: of size 3 and window 2 of (-inf, 0, 0, -inf, -inf)."""
    row = torch.full((2 * size - 1,), -torch.inf, dtype=dtype, device="cpu")
    row[max(0, size - window) : size] = 0
    return row.unfold(0, size, 1)


# ---- a single query's attention: q [b, K, H/K, C], keys and values [b, K, t, C], what is added to scores -> like q


def single_attention(dtype: torch.dtype, group: int) -> Callable[..., Tensor]:
    """Its fastest form, for groups of so many query heads."""
    if cpu.packs() and dtype != torch.float32:
        return _by_products
    return _by_gqa if dtype == torch.bfloat16 and group < 4 else scaled_dot_product_attention


def _by_gqa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each query head attends alone, to its group's keys.

    Microseconds of 1,000 keys and 4 key heads of 64 channels in bfloat16 with AMX, groups of 2, 4 and 8 query heads:
    73, 119 and 217, and as rows of one product 105, 115 and 134; with two threads 62, 95 and 163, and 70, 70 and 77.
    In float32 and float16 each key would be read for each head.
    """
    heads = q.view(len(q), -1, 1, q.shape[3])  # [b, H, 1, C]
    return scaled_dot_product_attention(heads, k, v, mask, enable_gqa=True).reshape(q.shape)


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same by two products. With AMX oneDNN first copies all keys into tiles and this is 5 times slower than SDPA;
    without, at 3,000 keys in bfloat16, it is 3 times faster (AMD Zen 5: 0.37 and 1.17 ms a layer)."""
    scores = torch.matmul(q, k.transpose(2, 3)).float() * q.shape[-1] ** -0.5  # [b, K, H/K, t]
    if mask is not None:
        scores += mask
    return torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)
