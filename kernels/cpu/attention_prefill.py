"""Attention of many queries on a CPU, by AMX, see tiles.py.

Shapes:     q [n, H, C], k and v [t, K, C], lo and hi int32 [n] -> [n, H, C]; channels lie side by side.
Dtypes:     float32, bfloat16. Scores and weights are float32; of bfloat16 the weights are rounded to it before they
            meet the values, and of float32 a product is six in bfloat16.
Limits:     AMX; C a multiple of 16; every query sees a key.
Operations: 4 C for each pair of query and key in a visited block of 32 by 32, and a power of 2.
Bytes:      q, k, v and the result once; k and v as tiles, once for each 32 queries of a head, from the caches.

The compiled form is in attention_prefill_numba.py.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minivlm.kernels.cpu.single_row import difference, missing_tiles, reason_of, require, require_like

DTYPES = (torch.float32, torch.bfloat16)


@cache
def compiled() -> ModuleType:
    """The compiled form, which takes a third of a second to import."""
    from minivlm.kernels.cpu import attention_prefill_numba

    return attention_prefill_numba


@cache
def missing(dtype: torch.dtype, channels: int) -> str | None:
    """Why it cannot run here for a type and width of heads; None if a small one is right."""

    def trial() -> str | None:
        numbers = torch.linspace(-1, 1, 40 * channels, device="cpu").view(40, 1, channels).to(dtype)
        hi = torch.arange(1, 41, dtype=torch.int32, device="cpu")
        arguments = numbers.flip(0), numbers, -numbers, hi - 1, hi
        return difference(attention(*arguments), plain_attention(*arguments))

    if dtype not in DTYPES or channels % 16:
        return f"there is none for {dtype} and {channels} channels"
    return missing_tiles() or reason_of(trial)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v, query i over the keys j with lo[i] <= j < hi[i]. The same in PyTorch."""
    key = torch.arange(len(k), device="cpu")
    seen = (lo[:, None] <= key) & (key < hi[:, None])  # [n, t]
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H or K, n or t, C]
    return scaled_dot_product_attention(*heads, seen, enable_gqa=True)[0].transpose(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The kernel behind `plain_attention`: the same arguments, the same result, contiguous."""
    (queries, heads, channels), (keys, kv_heads, _) = q.shape, k.shape
    require(v.shape == k.shape and k.shape[2] == channels and heads % kv_heads == 0, f"{q.shape}, {k.shape}, {v.shape}")
    require(q.dtype in DTYPES and channels % 16 == 0, f"attention of {q.dtype} and {channels} channels")
    for x in (q, k, v):
        require(x.dtype == q.dtype and x.stride(2) == 1 and x.device.type == "cpu", f"{x.dtype}, strides {x.stride()}")
    for bound in (lo, hi):
        require_like(bound, (queries,), torch.int32)
    require(
        bool(((lo >= 0) & (lo < hi) & (hi <= keys)).all()), f"a query that sees nothing, or what is not there of {keys}"
    )
    return compiled().attend(q, k, v, lo, hi, q.new_empty(queries, heads, channels))
