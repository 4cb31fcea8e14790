"""Decoding steps of backend `cpu`: the next token of one row or several with as few calls as its equations need.

A step of a small model takes the time of its calls, of the shipped checkpoint 300 operators and 400 Python functions
through the blocks. Here are the same equations over the same weights of the same blocks, but what is the same in every
step is looked up once: which product, the rows' parts of the cache, the angles. No module is called, so no forward hook
either.

One row is a vector [D], several are [B, D].
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import silu

from minivlm.ops import cpu
from minivlm.ops.cpu_attention import SingleQueries
from minivlm.ops.cpu_products import MLP_ACROSS, mlp_across, of_rows
from minivlm.ops.joined import GroupedLinear
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.norms import RMSNorm
from minivlm.ops.rope import rope_table
from minivlm.ops.rows import Rows

Rowwise = Callable[[Tensor], Tensor]  # of one row or several: [.., K] to [.., N]


def decoding(decoder: nn.Module, cache: KVCache) -> Callable:
    """A function (ids of B rows, rows) -> hidden states [B, D]: the next token of every row through the decoder."""
    made: list[Step] = []

    def step(ids: Sequence[int], rows: Rows) -> Tensor:
        if not isinstance(decoder.lm_head, GroupedLinear):  # it was not prepared
            return decoder(decoder.embed_tokens(torch.tensor(ids, device=cache.keys.device)), rows, cache)
        if not made or made[0].cache[0] is not cache.keys:  # the cache has grown
            made[:] = [Step(decoder, cache)]
        return made[0](ids, rows.slots, rows.starts)

    return step


class Layer(NamedTuple):
    """A decoder layer as functions of rows, and its part of the cache, two tensors [slots, capacity, K, C]."""

    input_norm: Rowwise
    qkv: Rowwise
    output: Rowwise
    post_attention_norm: Rowwise
    mlp: Rowwise
    keys: Tensor
    values: Tensor


class Step:
    """A step of any rows of a cache."""

    def __init__(self, decoder: nn.Module, cache: KVCache):
        config, self.cache, self.capacity = decoder.config, (cache.keys, cache.values), cache.capacity
        self.channels, self.half = config.head_dim, config.head_dim // 2
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.turned = (heads + kv_heads, kv_heads)  # heads of q and k, which turn, and of v
        self.heads = (heads, kv_heads)
        self.cos, self.sin = _angles(
            cpu.table_size(cache.capacity), config.head_dim, config.rope_theta, cache.keys.dtype
        )
        self.single_queries = SingleQueries(cache, heads, config.sliding_window)
        self.embeddings, self.norm = decoder.embed_tokens.weight.detach(), _norm(decoder.norm)
        self.layers = [
            Layer(
                input_norm=_norm(layer.input_layernorm),
                qkv=_rowwise(layer.self_attn.q_proj),
                output=_rowwise(layer.self_attn.o_proj),
                post_attention_norm=_norm(layer.post_attention_layernorm),
                mlp=_mlp(layer.mlp),
                keys=keys.transpose(1, 2),
                values=values.transpose(1, 2),
            )
            for layer, keys, values in zip(decoder.layers, cache.keys, cache.values, strict=True)
        ]

    def __call__(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The hidden states [B, D] of B rows' tokens, each at a position of a slot."""
        if max(positions) >= self.capacity:
            raise ValueError(f"position {max(positions)} does not fit in a cache of {self.capacity} positions")
        attend = self.single_queries.of(slots, positions)
        if len(ids) == 1:
            ids, slots, positions = ids[0], slots[0], positions[0]
        else:
            ids, slots, positions = torch.tensor((ids, slots, positions), device="cpu")
        x = self.embeddings[ids].contiguous()  # [D] or [B, D]; tied ones may lie by columns
        cos, sin = self.cos[positions], self.sin[positions]  # [1, C] or [B, 1, C]
        lead = x.shape[:-1]  # () or (B,)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.input_norm(x)).view(*lead, -1, self.channels)  # [.., H + 2 K, C]
            qk, v = qkv.split_with_sizes(self.turned, -2)
            q, k = torch.addcmul(qk * cos, qk.roll(self.half, -1), sin).split_with_sizes(self.heads, -2)
            layer.keys[slots, positions] = k
            layer.values[slots, positions] = v
            x = x + layer.output(attend(number, q).view(*lead, -1))
            x = x + layer.mlp(layer.post_attention_norm(x))
        return self.norm(x).view(-1, x.shape[-1])


def _rowwise(layer: GroupedLinear) -> Rowwise:
    """By the whole group of a layer."""
    group = layer.group
    return group.forward if group.packed else of_rows(group.weight.detach(), group.bias)


def _mlp(mlp: nn.Module) -> Rowwise:
    """The gated MLP of normalised rows."""
    gate_up, down, sizes = _rowwise(mlp.gate_proj), _rowwise(mlp.down_proj), mlp.gate_proj.group.sizes
    weights = cpu.mlp_weights(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    across = () if weights is None else MLP_ACROSS.get(weights[0].dtype, ())

    def gated(x: Tensor) -> Tensor:
        if x.dim() > 1 and len(x) in across:
            return mlp_across(x, *weights)
        gate, up = gate_up(x).split_with_sizes(sizes, -1)
        return down(silu(gate).mul_(up))

    return gated


def _norm(norm: RMSNorm) -> Rowwise:
    """With the same roundings in five operators, of several rows in seven; PyTorch's own is ten on a CPU."""
    weight, eps, width = norm.weight.detach(), norm.eps, len(norm.weight)
    least = torch.tensor(eps, device="cpu")

    def normalise(x: Tensor) -> Tensor:
        wide = x.float()
        if x.dim() > 1:
            length = vector_norm(wide, dim=-1, keepdim=True)  # [B, 1]
            return (wide * least.addcmul(length, length, value=1 / width).rsqrt_()).to(x.dtype) * weight
        return x * (torch.dot(wide, wide).item() / width + eps) ** -0.5 * weight

    return normalise


@lru_cache(maxsize=4)
def _angles(size: int, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [size, 1, C], with the sign of `rotate` in sin."""
    cos, sin = rope_table(torch.arange(size, device="cpu"), head_dim, theta, dtype)
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)
