"""Attention of many queries: online softmax (Milakov and Gimelshein 2018) in blocks (Dao et al. 2022, FlashAttention).

What a query sees is an interval of keys, so one kernel serves causal and sliding-window rows, packed rows, chunks whose
earlier keys lie in a cache, encoders, and segments behind a shared prefix.

Shapes:     q [S, H, C], k and v [slots, K, T, C], lo, hi and prefix int32 [S], offsets int32 [B + 1],
            slots and origins int32 [B] -> [S, H, C]. Any strides; fastest where channels are contiguous.
Dtypes:     float32, float16, bfloat16. Products accumulate in float32, the softmax is in float32.
Limits:     C up to 256, by the number of registers; a width that is no power of two computes as much as the next.
Operations: 4 C for each pair of query and key in a visited block, and one exp2. Causal over S keys: 2 C S^2 H.
Bytes:      q and the result once, k and v once for each block of queries; of these the L2 cache serves most, since
            the programs that share keys (all heads of a group) are neighbours in the grid.

One program computes BLOCK_M queries of one head. It visits their keys BLOCK_N at a time and keeps for each query the
greatest score so far (`peak`), the sum of exp(score - peak) (`total`) and the sum of exp(score - peak) * v (`acc`).
When the peak rises by d, both sums fade by exp(-d). Scores never reach memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivlm.kernels.checks import require, require_attention

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is an instruction
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: LOWEST - LOWEST is 0, where -inf - -inf is NaN
FAR = tl.constexpr(2**31 - 1)


class Blocks(NamedTuple):
    """How the work is cut: queries and keys of a block, warps of a program, blocks of keys under way, registers."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None  # a thread may have; by themselves the compilers take what one program can get


# By bytes of an element and channels. From 2-byte elements tensor cores make products of 64 rows for each 4 warps;
# float32 is computed without them, to be exact, and its blocks are as small as its operands are large.
BLOCKS = {
    (2, 64): Blocks(128, 64, 8, 3, 128),  # two programs at once
    (2, 128): Blocks(128, 64, 8, 3),
    (2, 256): Blocks(64, 32, 8, 3),
    (4, 64): Blocks(32, 32, 4, 2),
    (4, 128): Blocks(32, 16, 8, 2),
    (4, 256): Blocks(32, 32, 8, 2),
}


def plain_attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    prefix: Tensor | None,
    offsets: Tensor,
    slots: Tensor,
    origins: Tensor,
    longest: int,
) -> Tensor:
    """softmax(q k^T / sqrt(C)) v for B packed rows of queries, each over intervals of its row's keys.

    Args:
        q: [S, H, C]. Row b owns the queries offsets[b] .. offsets[b + 1] - 1.
        k, v: [slots, K, T, C], of q's dtype. Finite wherever they lie between keys that a row sees.
        lo, hi: int32 [S]. Query i sees the keys j of its row with lo[i] <= j < hi[i]; none where hi[i] <= lo[i].
        prefix: int32 [S], or None. Query i sees the keys j < prefix[i] as well.
        offsets: int32 [B + 1], rising from 0 to S.
        slots, origins: int32 [B]. Row b's key 0 is k[slots[b], :, origins[b]]: in a cache every row has a slot of its
            own and the origin 0; without one, all rows lie in slot 0, one behind the other.
        longest: queries of the longest row.

    Returns [S, H, C]; zeros for a query that sees nothing. Examples of intervals, for a query at position p of a row:
    causal [0, p + 1); a sliding window of w [max(0, p + 1 - w), p + 1); an encoder of P patches [0, P).
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for row, (slot, origin) in enumerate(zip(slots.tolist(), origins.tolist(), strict=True)):
        mine = slice(offsets[row].item(), offsets[row + 1].item())
        k_row, v_row = k[slot, :, origin:], v[slot, :, origin:]  # [K, T - origin, C]
        seen = _visible(lo[mine], hi[mine], None if prefix is None else prefix[mine], k_row.shape[1])
        out[mine] = _attend(q[mine], k_row, v_row, seen)
    return out


def _visible(lo: Tensor, hi: Tensor, prefix: Tensor | None, keys: int) -> Tensor:
    """The intervals written out: bool [n, T]."""
    j = torch.arange(keys, device=lo.device)
    seen = (lo[:, None] <= j) & (j < hi[:, None])
    return seen if prefix is None else seen | (j < prefix[:, None])


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """One row: q [n, H, C], k and v [K, T, C], seen bool [n, T] -> [n, H, C]. The softmax is in float32 or wider."""
    groups = q.shape[1] // k.shape[0]
    used = seen.any(dim=0)[:, None]  # what no query sees may be NaN, and 0 * NaN is not 0
    k = k.masked_fill(~used, 0).repeat_interleave(groups, dim=0)  # [H, T, C]
    v = v.masked_fill(~used, 0).repeat_interleave(groups, dim=0)
    scores = torch.matmul(q.transpose(0, 1), k.transpose(1, 2)) * q.shape[-1] ** -0.5  # [H, n, T]
    wide = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(wide, dim=-1).masked_fill(~seen, 0)  # a row of nothing but -inf gave NaN
    return torch.matmul(weights.to(q.dtype), v).transpose(0, 1)  # [n, H, C]


@triton.jit
def _row_of(X, slot, kv_head, origin, stride_b, stride_h, stride_t, stride_c, channel, BLOCK_N: tl.constexpr):
    """Where a row's key 0 of one kv head is, and the offsets from there of a block of keys, [BLOCK_N, C]."""
    at = X + slot.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h + origin.to(tl.int64) * stride_t
    return at, tl.arange(0, BLOCK_N)[:, None] * stride_t + channel[None, :] * stride_c


@triton.jit
def _sights(LO, HI, PREFIXES, query, inside, PREFIX: tl.constexpr):
    """lo, hi and prefix of these queries; without a prefix lo stands in for it."""
    lo = tl.load(LO + query, inside, 0)
    hi = tl.load(HI + query, inside, 0)
    prefix = lo
    if PREFIX:
        prefix = tl.load(PREFIXES + query, inside, 0)
    return lo, hi, prefix


@triton.jit
def _plan(lo, hi, prefix, inside, BLOCK_N: tl.constexpr, PREFIX: tl.constexpr):
    """Which blocks of keys a block of queries visits; `open` ones need no mask, every query sees all their keys.

    The prefix lies in `prefix_blocks` blocks from key 0 on, the first `prefix_open` of them open. Behind it `blocks`
    blocks begin at key `first`, of which `opens` .. `closes` - 1 are open. No query sees a key from `end` on.
    Example: causal queries 128 .. 255, blocks of 64 keys: first 0, end 256, 4 blocks, of which 0 and 1 are open.
    """
    # Some query sees a key only in [first, end); every query sees every key of [low, high), which may be empty.
    end = tl.max(tl.where(lo < hi, hi, 0), 0)
    first = tl.minimum(tl.min(tl.where(lo < hi, lo, FAR), 0), end)
    low = tl.max(lo, 0)
    high = tl.min(tl.where(inside, hi, FAR), 0)
    prefix_blocks = 0
    prefix_open = 0
    if PREFIX:
        prefix_blocks = tl.cdiv(tl.max(prefix, 0), BLOCK_N)
        prefix_open = tl.min(tl.where(inside, prefix, FAR), 0) // BLOCK_N
        first = tl.maximum(first, prefix_blocks * BLOCK_N)  # the last block of the prefix has these keys too
        end = tl.maximum(end, tl.max(prefix, 0))
    blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK_N)
    opens = tl.minimum(tl.cdiv(tl.maximum(low - first, 0), BLOCK_N), blocks)
    closes = tl.minimum(tl.maximum(tl.maximum(high - first, 0) // BLOCK_N, opens), blocks)
    return first, end, blocks, opens, closes, prefix_blocks, prefix_open


@triton.jit
def _visit(
    start, q, acc, peak, total, k, v, k_offsets, v_offsets, stride_kt, stride_vt, lo, hi, prefix, end, scale,
    C: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Add the keys start .. start + BLOCK_N - 1 to the sums. MASKED: some query does not see some of them."""
    key = start + tl.arange(0, BLOCK_N)
    there = (tl.arange(0, PADDED) < C)[None, :]
    if MASKED:  # beyond `end` lies what was never written, or no memory at all
        there &= (key < end)[:, None]
    k_at = k + tl.cast(start, tl.int64) * stride_kt + k_offsets
    v_at = v + tl.cast(start, tl.int64) * stride_vt + v_offsets
    if MASKED or C < PADDED:
        k_block = tl.load(k_at, there, 0.0)  # [BLOCK_N, C]
        v_block = tl.load(v_at, there, 0.0)
    else:
        k_block = tl.load(k_at)
        v_block = tl.load(v_at)

    scores = tl.dot(q, tl.trans(k_block), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if MASKED:
        seen = (lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None])
        if PREFIX:
            seen |= key[None, :] < prefix[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    # scale > 0, so the greatest scaled score is the greatest score, scaled; score * scale - peak is one instruction.
    risen = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - risen[:, None])
    fade = tl.exp2(peak - risen)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_block.dtype), v_block, acc * fade[:, None], input_precision="ieee")
    return acc, risen, total


@triton.jit
def _attention_prefill(
    Q, K, V, OUT, LO, HI, PREFIXES, OFFSETS, SLOTS, ORIGINS,
    stride_qs, stride_qh, stride_qc,
    stride_kb, stride_kh, stride_kt, stride_kc,
    stride_vb, stride_vh, stride_vt, stride_vc,
    groups, scale,
    UNIT: tl.constexpr, C: tl.constexpr, PADDED: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one row. All strides but the channels' are in units of UNIT elements."""
    stride_qs, stride_qh = stride_qs * UNIT, stride_qh * UNIT
    stride_kb, stride_kh, stride_kt = stride_kb * UNIT, stride_kh * UNIT, stride_kt * UNIT
    stride_vb, stride_vh, stride_vt = stride_vb * UNIT, stride_vh * UNIT, stride_vt * UNIT
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # in causal rows the blocks with most keys go first
    row = tl.program_id(2)
    begin = tl.load(OFFSETS + row) + block * BLOCK_M
    stop = tl.load(OFFSETS + row + 1)
    if begin >= stop:  # the grid is made for the longest row
        return
    query = begin + tl.arange(0, BLOCK_M)
    inside = query < stop
    channel = tl.arange(0, PADDED)
    there = inside[:, None] & (channel < C)[None, :]
    query_at = query.to(tl.int64)[:, None]  # offsets into a large tensor pass 2^31
    q = tl.load(Q + head * stride_qh + query_at * stride_qs + channel[None, :] * stride_qc, there, 0.0)  # [BLOCK_M, C]
    slot = tl.load(SLOTS + row)
    origin = tl.load(ORIGINS + row)
    kv_head = head // groups
    k, k_offsets = _row_of(K, slot, kv_head, origin, stride_kb, stride_kh, stride_kt, stride_kc, channel, BLOCK_N)
    v, v_offsets = _row_of(V, slot, kv_head, origin, stride_vb, stride_vh, stride_vt, stride_vc, channel, BLOCK_N)
    lo, hi, prefix = _sights(LO, HI, PREFIXES, query, inside, PREFIX)
    first, end, blocks, opens, closes, prefix_blocks, prefix_open = _plan(lo, hi, prefix, inside, BLOCK_N, PREFIX)

    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    # The masked blocks are few; without a pipeline of their own they leave the registers to the loop that counts.
    prefix_left = prefix_blocks - prefix_open
    for i in tl.range(0, prefix_left + opens + blocks - closes, num_stages=1):
        after = i - prefix_left
        start = first + tl.where(after < opens, after, after - opens + closes) * BLOCK_N
        if PREFIX:
            start = tl.where(after < 0, (prefix_open + i) * BLOCK_N, start)
        acc, peak, total = _visit(
            start, q, acc, peak, total, k, v, k_offsets, v_offsets, stride_kt, stride_vt, lo, hi, prefix, end, scale,
            C, PADDED, BLOCK_N, True, PREFIX,
        )  # fmt: skip
    for i in range(0, prefix_open + closes - opens):
        start = first + (i - prefix_open + opens) * BLOCK_N
        if PREFIX:
            start = tl.where(i < prefix_open, i * BLOCK_N, start)
        acc, peak, total = _visit(
            start, q, acc, peak, total, k, v, k_offsets, v_offsets, stride_kt, stride_vt, lo, hi, prefix, end, scale,
            C, PADDED, BLOCK_N, False, PREFIX,
        )  # fmt: skip

    out = acc / tl.where(total == 0, 1.0, total)[:, None]  # a query that sees nothing: 0 / 1
    out_at = OUT + (query_at * tl.num_programs(0) + head) * C + channel[None, :]
    tl.store(out_at, out.to(OUT.dtype.element_ty), there)


@torch.library.custom_op("minivlm::attention_prefill", mutates_args=())
def attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    prefix: Tensor | None,
    offsets: Tensor,
    slots: Tensor,
    origins: Tensor,
    longest: int,
) -> Tensor:
    """The kernel: arguments and result of `plain_attention_prefill`."""
    require_attention(q, k, v, (lo, hi) if prefix is None else (lo, hi, prefix), (offsets, slots, origins))
    heads, channels, rows = q.shape[1], q.shape[2], slots.shape[0]
    require(
        offsets.shape[0] == rows + 1 and origins.shape[0] == rows,
        f"attention: {offsets.shape[0]} offsets and {origins.shape[0]} origins, expected {rows + 1} and {rows} for "
        f"{rows} rows",
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    strides, unit = strides_of(q, k, v)
    padded = max(16, triton.next_power_of_2(channels))
    cut = BLOCKS[q.dtype.itemsize, max(64, padded)]
    _attention_prefill[heads, triton.cdiv(longest, cut.m), rows](
        q, k, v, out, lo, hi, lo if prefix is None else prefix, offsets, slots, origins,
        *strides, heads // k.shape[1], channels**-0.5 * LOG2_E,
        UNIT=unit, C=channels, PADDED=padded, PREFIX=prefix is not None, BLOCK_M=cut.m, BLOCK_N=cut.n,
        num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
    )  # fmt: skip
    return out


def strides_of(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides of tensors [..., C], all but those of C in units of 8 elements where possible, else of 1; the unit.

    Triton learns of a stride that it is 1 or a multiple of 16, and of others nothing. Of 72 channels it must be told
    that rows begin at multiples of 16 bytes, or it would load every element by itself.
    """
    unit = 1 if any(stride % 8 for tensor in tensors for stride in tensor.stride()[:-1]) else 8
    return [s for tensor in tensors for s in (*(s // unit for s in tensor.stride()[:-1]), tensor.stride(-1))], unit


@attention_prefill.register_fake
def _(q, k, v, lo, hi, prefix, offsets, slots, origins, longest):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
