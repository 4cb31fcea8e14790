"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): the plain form, PyTorch's fused form, and packed rows.

`eager` is the text to read and the oracle of every faster form. `fused` computes the same with PyTorch's operator.
`attend_rows` applies either to B packed rows with grouped heads (Ainslie et al. 2023, GQA), with or without a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rows import Rows

# What n queries may see of t keys: everything, each its past (n = t), or a table of bool [n, t].
Visible = Literal["all", "causal"] | Tensor
# (q [b, H, n, C], k [b, K, t, C], v [b, K, t, C], visible) -> [b, H, n, C]
Attend = Callable[[Tensor, Tensor, Tensor, Visible], Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """softmax(q k^T / sqrt(C)) v, the softmax in float32 and rounded to q's dtype before it meets v."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # query heads h*groups .. h*groups + groups - 1 share key head h
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # [b, H, t, C]
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [b, H, n, t]
    if isinstance(visible, str) and visible == "causal":
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if isinstance(visible, Tensor):
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)  # [b, H, n, C]


def fused(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """The same by PyTorch's fused operator (FlashAttention where it has one)."""
    groups = q.shape[1] // k.shape[1]
    if isinstance(visible, str) and visible == "all" and q.shape[2] == 1:
        # A single query sees everything, so a group's query heads can stand as query rows: no key is read twice.
        q = rearrange(q, "b (k g) 1 c -> b k g c", g=groups)
        return rearrange(scaled_dot_product_attention(q, k, v), "b k g c -> b (k g) 1 c")
    mask = None if isinstance(visible, str) else visible
    causal = isinstance(visible, str) and visible == "causal"
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)


@dataclass(frozen=True)
class Sight:
    """What a run of consecutive queries of a row may see of the row's keys lo .. hi - 1; of the others, nothing."""

    queries: int
    lo: int
    hi: int
    visible: Visible


def sight(rows: Rows, window: int | None, device) -> tuple[tuple[Sight, ...], ...]:
    """What each row's queries may see, worked out once for all layers."""
    seen = []
    for row, (n, start, segments) in enumerate(zip(rows.lengths, rows.starts, rows.segments, strict=True)):
        t = start + n
        lo = 0 if window is None else max(0, start + 1 - window)  # the first key that the first query sees
        if len(segments) > 1 and start == 0:  # the shared prefix is a plain causal row of its own
            prefix = segments[0]
            rest = Sight(n - prefix, 0, n, rows.visible(row, window, device)[prefix:])
            seen.append((Sight(prefix, 0, prefix, "causal"), rest) if prefix else (rest,))
        elif len(segments) == 1 and n == 1:
            seen.append((Sight(1, lo, t, "all"),))
        elif len(segments) == 1 and start == 0 and (window is None or t <= window):
            seen.append((Sight(n, 0, t, "causal"),))
        else:
            seen.append((Sight(n, lo, t, rows.visible(row, window, device)[:, lo:]),))
    return tuple(seen)


def attend_rows(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    seen: tuple[tuple[Sight, ...], ...],
    cache: KVCache | None,
    layer: int,
) -> Tensor:
    """Attention of B packed rows, each over its own keys.

    q [S, H, C], k and v [S, K, C], already rotated; seen: from `sight`. With a cache, k and v are first written to
    the rows' slots and the rows attend to everything there; without one, a row's keys are its own. Returns [S, H * C].
    """
    outputs = []
    for row, parts in enumerate(zip(*(x.split(rows.lengths) for x in (q, k, v)), strict=True)):
        q_row, k_row, v_row = (part.transpose(0, 1) for part in parts)  # [H or K, n, C]
        if cache is not None:
            k_row, v_row = cache.write(layer, rows.slots[row], rows.starts[row], k_row, v_row)  # [K, start + n, C]
        for look, q_part in zip(seen[row], q_row.split([look.queries for look in seen[row]], dim=1), strict=True):
            k_seen, v_seen = (part[None, :, look.lo : look.hi] for part in (k_row, v_row))  # [1, K, hi - lo, C]
            out = attend(q_part[None], k_seen, v_seen, look.visible)
            outputs.append(rearrange(out, "1 h n c -> n (h c)"))
    return torch.cat(outputs)  # [S, H * C]
