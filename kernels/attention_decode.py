"""Attention of a few queries per row against the cache, cut along the keys (Dao et al. 2023, Flash-Decoding).

One new token per row leaves no queries to spread over the
chip, so the keys of a row are cut into `splits` runs, each attended to by a program of its own; a second kernel joins
the runs. A program serves all query heads of a kv head at once, so each key is read once.

Shapes:     q [S, H, C] with S = B * n, k and v [slots, K, T, C], lo and hi int32 [S], slots int32 [B] -> [S, H, C].
            Any strides; fastest where channels are contiguous. Lengths are read from lo and hi on the device, so that
            a captured graph serves every length.
Dtypes:     float32, float16, bfloat16. Products accumulate in float32, the softmax is in float32.
Limits:     C up to 256; n * H / K, the queries that share a kv head, up to 64.
Bytes:      2 C for each visible key and kv head, which is the floor; plus, where splits > 1, 8 C for each split, query
            and head, written and read again.
Operations: 4 C for each visible key and query head, padded to 16 queries a kv head: hidden behind the bytes.

Example: one row, 8 kv heads and 3000 keys on 132 processors: 16 splits make 128 programs of 192 keys.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivlm.kernels.attention_prefill import plain_attention_prefill, strides_of
from minivlm.kernels.checks import require, require_attention

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is an instruction
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: LOWEST - LOWEST is 0, where -inf - -inf is NaN
FAR = tl.constexpr(2**31 - 1)
MOST_QUERIES = 64  # that share a kv head
JOINED = 16  # splits that are joined at once


class Blocks(NamedTuple):
    """How the work is cut: keys of a block, warps of a program, blocks of keys under way."""

    n: int
    warps: int
    stages: int


# By bytes of an element and channels. In 16 bits a block has 32 KiB of keys and values, and two more are on their way.
BLOCKS = {
    (2, 64): Blocks(128, 4, 3),
    (2, 128): Blocks(64, 4, 3),
    (2, 256): Blocks(32, 4, 3),
    (4, 64): Blocks(64, 8, 3),
    (4, 128): Blocks(16, 8, 3),
    (4, 256): Blocks(16, 8, 3),
}


def plain_attention_decode(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, slots: Tensor, splits: int
) -> Tensor:
    """The same for the same small number n of queries in every row, where reading the keys is all that takes time.

    Args:
        q: [S, H, C] with S = B * n: row b owns the queries b * n .. b * n + n - 1.
        k, v: [slots, K, T, C], of q's dtype. Finite wherever they lie between keys that a row sees.
        lo, hi: int32 [S]. Query i sees the keys j of its slot with lo[i] <= j < hi[i].
        slots: int32 [B], the slot of each row.
        splits: into how many runs the kernel cuts a row's keys; it changes the result only by rounding, here not.

    Returns [S, H, C]; zeros for a query that sees nothing.
    """
    rows = slots.shape[0]
    n = q.shape[0] // rows
    offsets = torch.arange(rows + 1, device=q.device) * n
    return plain_attention_prefill(q, k, v, lo, hi, None, offsets, slots, torch.zeros_like(slots), n)


@triton.jit
def _run_of(lo, hi, split, BLOCK_N: tl.constexpr):
    """The keys [begin, stop) of this program: of what some query of the row sees, the split-th run of whole blocks.

    Also `end`: no query sees a key from there on. Example: keys 0 .. 999 in blocks of 64 and 4 splits: runs of 256.
    """
    end = tl.max(tl.where(lo < hi, hi, 0), 0)
    first = tl.minimum(tl.min(tl.where(lo < hi, lo, FAR), 0), end)
    run = tl.cdiv(tl.cdiv(end - first, BLOCK_N), tl.num_programs(0)) * BLOCK_N
    begin = first + split * run
    return begin, tl.minimum(begin + run, end), end


@triton.jit
def _add_keys(
    start, q, acc, peak, total, k, v, k_offsets, v_offsets, stride_kt, stride_vt, lo, hi, end, scale, real,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the keys start .. start + BLOCK_N - 1 to each lane's sums; when its peak rises, both fade."""
    key = start + tl.arange(0, BLOCK_N)
    written = (key < end)[:, None] & real[None, :]
    k_block = tl.load(k + tl.cast(start, tl.int64) * stride_kt + k_offsets, written, 0.0)  # [BLOCK_N, C]
    v_block = tl.load(v + tl.cast(start, tl.int64) * stride_vt + v_offsets, written, 0.0)
    scores = tl.dot(q, tl.trans(k_block), input_precision="ieee") * scale  # [LANES, BLOCK_N]
    seen = (lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    risen = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - risen[:, None])
    fade = tl.exp2(peak - risen)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_block.dtype), v_block, acc * fade[:, None], input_precision="ieee")
    return acc, risen, total


@triton.jit
def _attend_split(
    Q, K, V, OUT, ACCS, PEAKS, TOTALS, LO, HI, SLOTS,
    stride_qs, stride_qh, stride_qc,
    stride_kb, stride_kh, stride_kt, stride_kc,
    stride_vb, stride_vh, stride_vt, stride_vc,
    pairs, heads, scale,
    UNIT: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_N: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """One run of keys of one kv head of one row. A lane is a pair of query and head; JOIN: the run is not all keys.

    All strides but the channels' are in units of UNIT elements.
    """
    stride_qs, stride_qh = stride_qs * UNIT, stride_qh * UNIT
    stride_kb, stride_kh, stride_kt = stride_kb * UNIT, stride_kh * UNIT, stride_kt * UNIT
    stride_vb, stride_vh, stride_vt = stride_vb * UNIT, stride_vh * UNIT, stride_vt * UNIT
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    lane = tl.arange(0, LANES)
    inside = lane < N * GROUPS
    query = row * N + lane // GROUPS
    head = kv_head * GROUPS + lane % GROUPS
    channel = tl.arange(0, PADDED)
    real = channel < C
    there = inside[:, None] & real[None, :]
    q_at = Q + query.to(tl.int64)[:, None] * stride_qs + head[:, None] * stride_qh + channel[None, :] * stride_qc
    q = tl.load(q_at, there, 0.0)  # [LANES, C]
    slot = tl.load(SLOTS + row).to(tl.int64)
    k = K + slot * stride_kb + kv_head.to(tl.int64) * stride_kh
    v = V + slot * stride_vb + kv_head.to(tl.int64) * stride_vh
    k_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_kt + channel[None, :] * stride_kc
    v_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_vt + channel[None, :] * stride_vc

    lo = tl.load(LO + query, inside, 0)
    hi = tl.load(HI + query, inside, 0)
    begin, stop, end = _run_of(lo, hi, split, BLOCK_N)
    peak = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    acc = tl.zeros([LANES, PADDED], tl.float32)
    for start in range(begin, stop, BLOCK_N):
        acc, peak, total = _add_keys(
            start, q, acc, peak, total, k, v, k_offsets, v_offsets, stride_kt, stride_vt, lo, hi, end, scale, real,
            BLOCK_N,
        )  # fmt: skip

    pair = query * heads + head
    if JOIN:
        at = split * pairs + pair
        tl.store(PEAKS + at, peak, inside)
        tl.store(TOTALS + at, total, inside)
        # A run without keys leaves its sums unwritten. NaN != 0 holds, so a NaN is passed on.
        tl.store(ACCS + at.to(tl.int64)[:, None] * C + channel[None, :], acc, there & (total != 0)[:, None])
    else:
        out = acc / tl.where(total == 0, 1.0, total)[:, None]  # a query that sees nothing: 0 / 1
        tl.store(OUT + pair.to(tl.int64)[:, None] * C + channel[None, :], out.to(OUT.dtype.element_ty), there)


@triton.jit
def _join_splits(
    ACCS, PEAKS, TOTALS, OUT, pairs, splits, C: tl.constexpr, PADDED: tl.constexpr, JOINED: tl.constexpr
):  # fmt: skip
    """One pair of query and head: the runs' sums, faded to their common peak, added and divided."""
    pair = tl.program_id(0)
    channel = tl.arange(0, PADDED)
    peak = LOWEST + 0.0
    total = 0.0
    acc = tl.zeros([PADDED], tl.float32)
    for start in range(0, splits, JOINED):
        split = start + tl.arange(0, JOINED)
        at = split * pairs + pair
        peaks = tl.load(PEAKS + at, split < splits, LOWEST)
        totals = tl.load(TOTALS + at, split < splits, 0.0)
        written = (totals != 0)[:, None] & (channel < C)[None, :]
        accs = tl.load(ACCS + at.to(tl.int64)[:, None] * C + channel[None, :], written, 0.0)  # [JOINED, C]
        risen = tl.maximum(peak, tl.max(peaks, 0))
        fade = tl.exp2(peak - risen)
        fades = tl.exp2(peaks - risen)
        total = total * fade + tl.sum(totals * fades, 0)
        acc = acc * fade + tl.sum(accs * fades[:, None], 0)
        peak = risen
    out = acc / tl.where(total == 0, 1.0, total)
    tl.store(OUT + tl.cast(pair, tl.int64) * C + channel, out.to(OUT.dtype.element_ty), channel < C)


@torch.library.custom_op("minivlm::attention_decode", mutates_args=())
def attention_decode(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, slots: Tensor, splits: int) -> Tensor:
    """The kernels: arguments and result of `plain_attention_decode`."""
    require_attention(q, k, v, (lo, hi), (slots,))
    queries, heads, channels = q.shape
    rows, kv_heads = slots.shape[0], k.shape[1]
    require(splits > 0, f"attention: {splits} splits, expected at least 1")
    require(queries % max(rows, 1) == 0, f"attention: {queries} queries in {rows} rows, expected as many in each")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    n, groups = queries // rows, heads // kv_heads
    require(
        n * groups <= MOST_QUERIES,
        f"attention: {n} queries of {groups} heads share a kv head, expected at most {MOST_QUERIES} (else prefill)",
    )
    strides, unit = strides_of(q, k, v)
    lanes = max(16, triton.next_power_of_2(n * groups))
    padded = max(16, triton.next_power_of_2(channels))
    cut = BLOCKS[q.dtype.itemsize, max(64, padded)]
    pairs = queries * heads
    parts = splits if splits > 1 else 0
    accs = torch.empty(parts, pairs, channels, dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty(2, parts, pairs, dtype=torch.float32, device=q.device)
    _attend_split[splits, kv_heads, rows](
        q, k, v, out, accs, peaks, totals, lo, hi, slots,
        *strides, pairs, heads, channels**-0.5 * LOG2_E,
        UNIT=unit, N=n, GROUPS=groups, LANES=lanes, C=channels, PADDED=padded, BLOCK_N=cut.n, JOIN=splits > 1,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if splits > 1:
        _join_splits[(pairs,)](accs, peaks, totals, out, pairs, splits, C=channels, PADDED=padded, JOINED=JOINED)
    return out


@attention_decode.register_fake
def _(q, k, v, lo, hi, slots, splits):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def splits_for(rows: int, kv_heads: int, keys: int, processors: int) -> int:
    """Splits that give each of the chip's processors one program, for rows of up to `keys` keys; no run is under 64."""
    return max(1, min(processors // (rows * kv_heads), keys // 64))
