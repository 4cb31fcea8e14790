"""The attention of backend `triton`: rotation, cache write and attention of packed rows; and that of the encoder.

The kernels read intervals of keys (`Rows` says which) as tensors; `sight` makes those, once for all layers.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from minivlm.kernels.attention_decode import MOST_QUERIES, attention_decode, splits_for
from minivlm.kernels.attention_prefill import attention_prefill
from minivlm.kernels.rope import rotate_and_cache
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rows import Rows

INTERPRETED_PROCESSORS = 32  # what the interpreter plays: enough for several runs of keys


@dataclass(frozen=True)
class Sight:
    """Where packed tokens are written and which keys they see, on the device; the same for every layer.

    Attributes:
        positions, slots: int32 [S], of each token's key in the cache.
        lo, hi: int32 [S]. A token sees the keys lo .. hi - 1 of its row.
        prefix: int32 [S]: and those below it; or None where no row is cut into segments.
        offsets: int32 [B + 1]. Row b has the tokens offsets[b] .. offsets[b + 1] - 1.
        row_slots: int32 [B], the slot of each row.
        longest: tokens of the longest row; `each` is the number if all rows have the same, else 0.
        keys: keys of the longest row, the new ones included.
    """

    positions: Tensor
    slots: Tensor
    lo: Tensor
    hi: Tensor
    prefix: Tensor | None
    offsets: Tensor
    row_slots: Tensor
    longest: int
    each: int
    keys: int


def sight(rows: Rows, window: int | None, device) -> Sight:
    """What each row's tokens may see: one table of integers, in one transfer.

    Each vector begins at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not.
    """
    positions, slots, lo, hi, prefix = [], [], [], [], []
    for n, start, slot, (first, *others) in zip(rows.lengths, rows.starts, rows.slots, rows.segments, strict=True):
        if others and window is not None:
            raise ValueError("a sliding window over segments with a shared prefix is not defined")
        positions += range(start, start + n)
        slots += [slot] * n
        hi += range(start + 1, start + n + 1)
        lo += [0 if window is None else max(0, p + 1 - window) for p in range(start, start + first)]
        prefix += [0] * first
        for length in others:  # a later segment sees the prefix and itself
            lo += [start + len(lo) - (len(positions) - n)] * length
            prefix += [start + first] * length
    offsets = [*rows.offsets, len(positions)]
    vectors = (positions, slots, lo, hi, prefix, offsets, rows.slots)
    width = -(-max(map(len, vectors)) // 4) * 4
    table = torch.tensor([[*vector, *[0] * (width - len(vector))] for vector in vectors], dtype=torch.int32)
    positions, slots, lo, hi, prefix, offsets, row_slots = (
        row[: len(vector)] for row, vector in zip(table.to(device), vectors, strict=True)
    )
    return Sight(
        positions=positions,
        slots=slots,
        lo=lo,
        hi=hi,
        prefix=prefix if any(len(segments) > 1 for segments in rows.segments) else None,
        offsets=offsets,
        row_slots=row_slots,
        longest=max(rows.lengths),
        each=rows.lengths[0] if len(set(rows.lengths)) == 1 else 0,
        keys=max(start + n for start, n in zip(rows.starts, rows.lengths, strict=True)),
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    rows: Rows,
    seen: Sight,
    cache: KVCache | None,
    layer: int,
) -> Tensor:
    """q [S, H, C], k and v [S, K, C] before rotation; seen: what `sight` returned. Returns [S, H * C]."""
    if cache is None:  # the rows lie end to end in one slot, and each begins where the one before it ends
        tokens, kv_heads, channels = k.shape
        keys, values = k.new_empty(2, 1, kv_heads, tokens, channels)
        everywhere = torch.arange(tokens, dtype=torch.int32, device=k.device)
        q = rotate_and_cache(q, k, v, *rope, everywhere, torch.zeros_like(everywhere), keys, values)
        origins = seen.offsets[:-1]
        places = (seen.offsets, torch.zeros_like(origins), origins)
        out = attention_prefill(q, keys, values, seen.lo, seen.hi, seen.prefix, *places, seen.longest)
        return out.flatten(1)  # [S, H * C]
    if seen.keys > cache.capacity:
        raise ValueError(f"position {seen.keys - 1} does not fit in a cache of {cache.capacity} positions")
    keys, values = cache.keys[layer], cache.values[layer]  # [slots, K, T, C]
    q = rotate_and_cache(q, k, v, *rope, seen.positions, seen.slots, keys, values)
    groups = q.shape[1] // k.shape[1]
    if 0 < seen.each * groups <= MOST_QUERIES and seen.prefix is None:
        splits = splits_for(len(seen.row_slots), k.shape[1], seen.keys, _processors(q.device))
        out = attention_decode(q, keys, values, seen.lo, seen.hi, seen.row_slots, splits)
    else:
        places = (seen.offsets, seen.row_slots, torch.zeros_like(seen.row_slots))
        out = attention_prefill(q, keys, values, seen.lo, seen.hi, seen.prefix, *places, seen.longest)
    return out.flatten(1)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def vision_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [N, H, P, C] -> [N, H, P, C]: every patch of a tile sees every other. A tile is a row, and a slot."""
    tiles, patches = q.shape[0], q.shape[2]
    out = attention_prefill(
        rearrange(q, "n h p c -> (n p) h c"), k, v, *_whole_tiles(tiles, patches, q.device), patches
    )
    return rearrange(out, "(n p) h c -> n h p c", n=tiles)


@lru_cache(maxsize=8)
def _whole_tiles(tiles: int, patches: int, device: torch.device) -> tuple[Tensor | None, ...]:
    """The indices lo, hi, prefix, offsets, slots, origins of `attention_prefill`: the same for every layer."""
    hi = torch.full((tiles * patches,), patches, dtype=torch.int32, device=device)
    offsets = torch.arange(0, (tiles + 1) * patches, patches, dtype=torch.int32, device=device)
    slots = torch.arange(tiles, dtype=torch.int32, device=device)
    return torch.zeros_like(hi), hi, None, offsets, slots, torch.zeros_like(slots)
