"""Rotary positions (Su et al. 2021, eq. 34, in the half-split form) and the write into the key-value cache, in one
launch: what lies between a decoder layer's projections and its attention.

Shapes:     q [S, H, C], k and v [S, K, C], cos and sin [S, 1, C] as `rope_table` makes them, positions and slots
            int32 [S], keys and values [slots, K, T, C] -> the turned q [S, H, C]; keys and values are written.
            Any strides: q, k and v may be slices of one fused projection.
Dtypes:     float32, float16, bfloat16, the same for all but the indices.
Limits:     C even, at most 256. Positions and slots are read on the device, so that one captured graph serves every
            step; hence a wrong index cannot raise, but it writes nothing.
Bytes:      (2 H + 4 K + 1) C elements per token; of cos and sin only the first half, as the second repeats it.
Operations: 3 per element of q and k.

One program computes HEADS heads of one token: the first programs of a token turn q, the others turn k and store k, v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivlm.kernels.checks import DTYPES, WIDEST, require, require_device

HEADS = 8  # per program: 8 heads of 128 channels are 1024 elements


def plain_rotate_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Turn q and k by the angles of cos, sin; store k and v of token s at keys[slots[s], :, positions[s]], and values.

    A token whose slot or position is negative is the padding of a graph's batch: nothing is stored for it. No two
    tokens may have the same slot and position. Returns the turned q [S, H, C].
    """
    used = (positions >= 0) & (slots >= 0)
    where = (slots[used].long(), slice(None), positions[used].long())
    keys[where] = turn(k, cos, sin)[used]  # [S, K, C]
    values[where] = v[used]
    return turn(q, cos, sin)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (c, c + C/2) of x [S, H, C] by the angles of cos, sin [S, 1, C]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@triton.jit
def _turn(first, second, cos, sin):
    """The turned pair, each product rounded before they are added, as plain PyTorch does it.

    In float32 the compiler may fuse a product with the sum, which rounds once less.
    """
    dtype = first.dtype
    first, second, cos, sin = first.to(tl.float32), second.to(tl.float32), cos.to(tl.float32), sin.to(tl.float32)
    left = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    right = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    return left.to(dtype), right.to(dtype)


@triton.jit
def _rotate_and_cache(
    Q, K, V, COS, SIN, POSITIONS, SLOTS, KEYS, VALUES, OUT,
    stride_qs, stride_qh, stride_qc, stride_ks, stride_kh, stride_kc, stride_vs, stride_vh, stride_vc,
    stride_cs, stride_cc, stride_ss, stride_sc,
    stride_keys_b, stride_keys_h, stride_keys_t, stride_keys_c,
    stride_values_b, stride_values_h, stride_values_t, stride_values_c,
    slot_count, capacity,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts: tl.constexpr = (H + HEADS - 1) // HEADS
    c = tl.arange(0, PADDED)[None, :]
    cos = tl.load(COS + token * stride_cs + c * stride_cc, c < HALF, 0.0)  # [1, C/2]
    sin = tl.load(SIN + token * stride_ss + c * stride_sc, c < HALF, 0.0)
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        there = (head < H) & (c < HALF)
        at = Q + token * stride_qs + head * stride_qh + c * stride_qc
        first = tl.load(at, there, 0.0)  # [HEADS, C/2]
        second = tl.load(at + HALF * stride_qc, there, 0.0)
        first, second = _turn(first, second, cos, sin)
        out = OUT + (token * H + head) * (2 * HALF) + c
        tl.store(out, first, there)
        tl.store(out + HALF, second, there)
    else:
        slot = tl.load(SLOTS + token).to(tl.int64)
        position = tl.load(POSITIONS + token).to(tl.int64)
        if (slot >= 0) & (slot < slot_count) & (position >= 0) & (position < capacity):
            head = (part - q_parts) * HEADS + tl.arange(0, HEADS)[:, None]
            there = (head < KV) & (c < HALF)
            at = K + token * stride_ks + head * stride_kh + c * stride_kc
            first = tl.load(at, there, 0.0)
            second = tl.load(at + HALF * stride_kc, there, 0.0)
            first, second = _turn(first, second, cos, sin)
            to = KEYS + slot * stride_keys_b + head * stride_keys_h + position * stride_keys_t + c * stride_keys_c
            tl.store(to, first, there)
            tl.store(to + HALF * stride_keys_c, second, there)
            at = V + token * stride_vs + head * stride_vh + c * stride_vc
            to = VALUES + slot * stride_values_b + head * stride_values_h + position * stride_values_t
            to += c * stride_values_c
            tl.store(to, tl.load(at, there, 0.0), there)
            tl.store(to + HALF * stride_values_c, tl.load(at + HALF * stride_vc, there, 0.0), there)


@torch.library.custom_op("minivlm::rotate_and_cache", mutates_args=("keys", "values"))
def rotate_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """The kernel behind `plain_rotate_and_cache`: the same arguments, the same [S, H, C], contiguous."""
    _check(q, k, v, cos, sin, positions, slots, keys, values)
    tokens, heads, channels = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    kv_heads, half = k.shape[1], channels // 2
    grid = (tokens, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))
    _rotate_and_cache[grid](
        q, k, v, cos, sin, positions, slots, keys, values, out,
        *q.stride(), *k.stride(), *v.stride(), cos.stride(0), cos.stride(2), sin.stride(0), sin.stride(2),
        *keys.stride(), *values.stride(), keys.shape[0], keys.shape[2],
        H=heads, KV=kv_heads, HALF=half, PADDED=triton.next_power_of_2(half), HEADS=HEADS, num_warps=4,
    )  # fmt: skip
    return out


@rotate_and_cache.register_fake
def _(q, k, v, cos, sin, positions, slots, keys, values):
    return q.new_empty(q.shape)


def _check(q, k, v, cos, sin, positions, slots, keys, values) -> None:
    require_device(q)
    require(
        q.dim() == 3 and k.dim() == 3 and k.shape == v.shape and (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2]),
        f"rope: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, expected [S, H, C] and twice [S, K, C]",
    )
    tokens, kv_heads, channels = k.shape
    require(channels % 2 == 0 and 0 < channels <= WIDEST, f"rope: {channels} channels, expected 2, 4, .. {WIDEST}")
    require(
        cos.shape == sin.shape == (tokens, 1, channels),
        f"rope: cos {list(cos.shape)}, sin {list(sin.shape)}, expected [{tokens}, 1, {channels}]",
    )
    require(
        keys.dim() == 4 and keys.shape == values.shape and keys.shape[1::2] == (kv_heads, channels),
        f"rope: keys {list(keys.shape)}, values {list(values.shape)}, expected [slots, {kv_heads}, T, {channels}]",
    )
    for index in (positions, slots):
        require(
            index.dtype == torch.int32 and index.shape == (tokens,) and index.is_contiguous(),
            f"rope: an index tensor is {index.dtype} {list(index.shape)}, expected contiguous int32 [{tokens}]",
        )
    for tensor in (k, v, cos, sin, keys, values):
        require(
            tensor.dtype == q.dtype and q.dtype in DTYPES,
            f"rope: q is {q.dtype}, another {tensor.dtype}, expected one of float32, float16 and bfloat16",
        )
    for tensor in (k, v, cos, sin, positions, slots, keys, values):
        require(tensor.device == q.device, f"rope: tensors on {q.device} and {tensor.device}, expected one device")
