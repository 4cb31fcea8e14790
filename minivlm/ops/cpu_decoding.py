"""Decoding steps of backend `cpu`: one row's next token with as few calls as its equations need.

A step of a small model takes the time of its calls, of the shipped checkpoint 300 operators and 400 Python functions
through the blocks. Here are the same equations over the same weights of the same blocks, but what is the same in every
step is looked up once: which product, the row's part of the cache, the angles. No module is called, so no forward hook
either. Several rows go through the decoder itself.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from minivlm.ops import cpu
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.norms import RMSNorm
from minivlm.ops.rope import rope_table
from minivlm.ops.rows import Rows

Vectors = Callable[[Tensor], Tensor]  # a vector to a vector


def decoding(decoder: nn.Module, cache: KVCache) -> Callable:
    """A function (ids of B rows, rows) -> hidden states [B, D]: the next token of every row through the decoder."""
    steps: dict[int, Step] = {}  # by slot

    def step(ids: Sequence[int], rows: Rows) -> Tensor:
        if len(ids) > 1 or not isinstance(decoder.lm_head, cpu.GroupedLinear):  # or it was not prepared
            return decoder(decoder.embed_tokens(torch.tensor(ids, device=cache.keys.device)), rows, cache)
        (slot,), (position,) = rows.slots, rows.starts
        if slot not in steps or steps[slot].cache_keys is not cache.keys:  # the cache has grown
            steps[slot] = Step(decoder, cache, slot)
        return steps[slot](ids[0], position)

    return step


class Layer(NamedTuple):
    """A decoder layer as functions of a vector."""

    input_norm: Vectors
    qkv: Vectors
    output: Vectors
    post_attention_norm: Vectors
    gate_up: Vectors
    down: Vectors


class Step:
    """A step of the row in one slot of a cache."""

    def __init__(self, decoder: nn.Module, cache: KVCache, slot: int):
        config, self.cache_keys, self.capacity = decoder.config, cache.keys, cache.capacity
        self.keys, self.values = cache.keys[:, slot], cache.values[:, slot]  # [layers, K, capacity, C]
        self.window, kv_heads = config.sliding_window, config.num_key_value_heads
        heads, channels = config.num_attention_heads, config.head_dim
        self.turned = (heads + kv_heads, kv_heads)  # heads of q and k, which turn, and of v
        self.heads = (heads, kv_heads)
        self.qkv_shape, self.q_shape = (heads + 2 * kv_heads, channels), (kv_heads, heads // kv_heads, channels)
        self.inner = (config.intermediate_size, config.intermediate_size)
        self.cos, self.sin, self.other = _angles(
            cpu.table_size(cache.capacity), config.head_dim, config.rope_theta, cache.keys.dtype
        )
        self.attend = cpu.single_attention(cache.keys.dtype)
        self.embeddings, self.norm = decoder.embed_tokens.weight.detach(), _norm(decoder.norm)
        self.layers = [
            Layer(
                input_norm=_norm(layer.input_layernorm),
                qkv=_product(layer.self_attn.q_proj),
                output=_product(layer.self_attn.o_proj),
                post_attention_norm=_norm(layer.post_attention_layernorm),
                gate_up=_product(layer.mlp.gate_proj),
                down=_product(layer.mlp.down_proj),
            )
            for layer in decoder.layers
        ]

    def __call__(self, token: int, position: int) -> Tensor:
        """The hidden state [1, D] of a token at a position."""
        if position >= self.capacity:
            raise ValueError(f"position {position} does not fit in a cache of {self.capacity} positions")
        end = position + 1
        lo = 0 if self.window is None else max(0, end - self.window)
        kept = [x.narrow(2, lo, end - lo).unbind() for x in (self.keys, self.values)]  # of each layer [K, end - lo, C]
        new = [x.select(2, position).unbind() for x in (self.keys, self.values)]  # [K, C]
        cos, sin = self.cos[position], self.sin[position]  # [C]
        x = self.embeddings[token].contiguous()  # [D]; tied ones may lie by columns
        for layer, keys, values, new_keys, new_values in zip(self.layers, *kept, *new, strict=True):
            qkv = layer.qkv(layer.input_norm(x)).view(self.qkv_shape)  # [H + 2 K, C]
            qk, v = qkv.split_with_sizes(self.turned)
            q, k = torch.addcmul(qk * cos, qk.index_select(1, self.other), sin).split_with_sizes(self.heads)
            new_keys.copy_(k)
            new_values.copy_(v)
            heads = self.attend(q.view(self.q_shape), keys, values)  # [K, H/K, C]
            x = x + layer.output(heads.reshape(-1))
            gate, up = layer.gate_up(layer.post_attention_norm(x)).split_with_sizes(self.inner)
            x = x + layer.down(silu(gate).mul_(up))
        return self.norm(x)[None]


def _product(layer: cpu.GroupedLinear) -> Vectors:
    """x [K] -> [N] by the whole group of a layer."""
    group = layer.group
    return group.forward if group.packed else cpu.of_vector(group.weight.detach(), group.bias)


def _norm(norm: RMSNorm) -> Vectors:
    """x [D] -> [D] with the same roundings, in five operators; PyTorch's own is ten others on a CPU."""
    weight, eps, width = norm.weight.detach(), norm.eps, len(norm.weight)

    def normalise(x: Tensor) -> Tensor:
        wide = x.float()
        return x * (torch.dot(wide, wide).item() / width + eps) ** -0.5 * weight

    return normalise


@lru_cache(maxsize=4)
def _angles(size: int, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin [size, C] with the sign of `rotate` in sin, and the other channel of each channel's pair, [C]."""
    cos, sin = (x[:, 0] for x in rope_table(torch.arange(size, device="cpu"), head_dim, theta, dtype))
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1), torch.arange(head_dim, device="cpu").roll(head_dim // 2)
