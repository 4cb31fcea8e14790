"""Decoding steps of backend `cpu`: the next token of one row or several with as few calls as its equations need.

A step of a small model takes the time of its calls, of the shipped checkpoint 300 operators and 400 Python functions
through the blocks. Here are the same equations over the same weights of the same blocks, but what is the same in every
step is looked up once: which product, the rows' parts of the cache, the angles. No module is called, so no forward hook
either. And where this project's kernels do all that is between the embeddings and the last norm, their calls are
recorded, for each number of rows up to RECORDED once.

Elsewhere one row is a vector [D], several are [B, D].
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import silu

from minivlm.kernels.cpu.recording import Recording
from minivlm.kernels.cpu.single_row import RowAttention, missing_attention
from minivlm.ops import cpu
from minivlm.ops.cpu_attention import SingleQueries
from minivlm.ops.cpu_products import MLP_ACROSS, mlp_across, of_rows
from minivlm.ops.joined import GroupedLinear
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.norms import RMSNorm
from minivlm.ops.rope import rope_table
from minivlm.ops.rows import Rows

RECORDED = 16  # most rows of a recording, which holds what they have in between

Rowwise = Callable[[Tensor], Tensor]  # of one row or several: [.., K] to [.., N]


def decoding(decoder: nn.Module, cache: KVCache) -> Callable:
    """A function (ids of B rows, rows) -> hidden states [B, D]: the next token of every row through the decoder."""
    prepared = isinstance(decoder.lm_head, GroupedLinear)
    made = Step(decoder, cache) if prepared else None  # now, since kernels may have to be compiled

    def step(ids: Sequence[int], rows: Rows) -> Tensor:
        nonlocal made
        if made is None:
            return decoder(decoder.embed_tokens(torch.tensor(ids, device=cache.keys.device)), rows, cache)
        if made.cache[0] is not cache.keys:  # the cache has grown
            made = Step(decoder, cache)
        return made(ids, rows.slots, rows.starts)

    return step


class Layer(NamedTuple):
    """A decoder layer as functions of rows x [.., D].

    qkv: x to the queries, keys and values of its norm, [.., (H + 2 K) C].
    output: what attention found [.., H C], and x, to x plus the projection.
    mlp: x to x plus the gated MLP of its norm.
    """

    qkv: Rowwise
    output: Callable[[Tensor, Tensor], Tensor]
    mlp: Rowwise


class ByKernels(NamedTuple):
    """Layers and attention by this project's kernels, for up to so many rows."""

    layers: Sequence[Layer]
    attention: RowAttention
    most_rows: float


class Recorded(NamedTuple):
    """Rows x [B, D] through a decoder's layers; places, int64 [B, 3], says where in the cache they belong."""

    x: Tensor
    places: Tensor
    run: Recording


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
        self.layers = [_layer(layer) for layer in decoder.layers]
        self.places = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(*self.cache, strict=True)]
        self.by_kernels = self._found_kernels(decoder)
        self.recordings: dict[int, Recorded] = {}  # by their number of rows
        if self.by_kernels is not None:
            self._recorded(1)  # now, since kernels may have to be compiled; those of more rows when they first come

    def __call__(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The hidden states [B, D] of B rows' tokens, each at a position of a slot."""
        if max(positions) >= self.capacity:
            raise ValueError(f"position {max(positions)} does not fit in a cache of {self.capacity} positions")
        if self.by_kernels is not None and len(ids) <= self.by_kernels.most_rows:
            return self.norm(self._through_kernels(ids, slots, positions))
        single, attend = len(ids) == 1, self._attend(slots, positions)
        x = self.embeddings[ids[0] if single else torch.tensor(ids, device="cpu")]  # [D] or [B, D]
        x = x.contiguous()  # tied ones may lie by columns
        return self.norm(_through(self.layers, attend, x)).view(-1, x.shape[-1])

    def _through_kernels(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Rows through the layers by kernels, recorded or, if they are many, one call after the other."""
        layers, attention, _ = self.by_kernels
        places = torch.tensor([attention.place(*where) for where in zip(slots, positions, strict=True)], device="cpu")
        x = self.embeddings[torch.tensor(ids, device="cpu")]
        if len(ids) > RECORDED:
            return _through(layers, partial(attention.at, places=places), x)
        recorded = self._recorded(len(ids))
        recorded.places.copy_(places)
        recorded.x.copy_(x)
        return recorded.run()

    def _found_kernels(self, decoder: nn.Module) -> ByKernels | None:
        """The layers by this project's kernels; None where one is missing."""
        dtype, config = self.embeddings.dtype, decoder.config
        found = [_kernel_layer(layer, dtype) for layer in decoder.layers]
        if None in found or missing_attention(dtype, config.head_dim) is not None:
            return None
        layers, most_rows = zip(*found, strict=True)
        attention = RowAttention(self.heads[0], *self.cache, self.cos, self.sin, config.sliding_window)
        return ByKernels(layers, attention, min(most_rows))

    def _recorded(self, rows: int) -> Recorded:
        """So many rows through the layers by kernels, noted when there are first so many."""
        if rows not in self.recordings:
            layers, attention, _ = self.by_kernels
            with torch.inference_mode(False):  # tensors that may be written in any mode
                x = torch.empty(rows, self.embeddings.shape[1], dtype=self.embeddings.dtype, device="cpu")
                places = torch.zeros(rows, 3, dtype=torch.int64, device="cpu")
            run = Recording(lambda: _through(layers, partial(attention.at, places=places), x))
            self.recordings[rows] = Recorded(x, places, run)
        return self.recordings[rows]

    def _attend(self, slots: Sequence[int], positions: Sequence[int]) -> Callable[[int, Tensor], Tensor]:
        """A function (number of a layer, q, k and v [.., (H + 2 K) C]) -> [.., H C]: turn, store, attend."""
        among = self.single_queries.of(slots, positions)
        if len(slots) == 1:
            slots, positions = slots[0], positions[0]
        else:
            slots, positions = torch.tensor((slots, positions), device="cpu")
        cos, sin = self.cos[positions], self.sin[positions]  # [1, C] or [B, 1, C]

        def attend(number: int, qkv: Tensor) -> Tensor:
            lead = qkv.shape[:-1]  # () or (B,)
            qk, v = qkv.view(*lead, -1, self.channels).split_with_sizes(self.turned, -2)
            q, k = torch.addcmul(qk * cos, qk.roll(self.half, -1), sin).split_with_sizes(self.heads, -2)
            keys, values = self.places[number]
            keys[slots, positions], values[slots, positions] = k, v
            return among(number, q).view(*lead, -1)

        return attend


def _through(layers: Sequence[Layer], attend: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
    """Rows x [.., D] through layers, of each of which `attend` takes the number, and q, k and v."""
    for number, layer in enumerate(layers):
        x = layer.output(attend(number, layer.qkv(x)), x)
        x = layer.mlp(x)
    return x


def _layer(layer: nn.Module) -> Layer:
    """By the libraries, or product by product by what kernels there are."""
    attention = layer.self_attn
    norm, qkv, project = _norm(layer.input_layernorm), _rowwise(attention.q_proj), _rowwise(attention.o_proj)
    mlp_norm, mlp = _norm(layer.post_attention_layernorm), _mlp(layer.mlp)
    return Layer(
        qkv=lambda x: qkv(norm(x)),
        output=lambda heads, x: x + project(heads),
        mlp=lambda x: x + mlp(mlp_norm(x)),
    )


def _kernel_layer(layer: nn.Module, dtype: torch.dtype) -> tuple[Layer, float] | None:
    """By this project's kernels, and how many rows they all take; None where one is missing."""
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.post_attention_layernorm
    qkv = attention.q_proj.group.kernel(dtype, 1, layer.input_layernorm)
    end = cpu.end_kernels(1, dtype, attention.o_proj, norm, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if qkv is None or end is None:
        return None
    output, inner, down = end
    most_rows = min(kernel.most_rows for kernel in (qkv, *end))
    return Layer(qkv, output, lambda x: down(inner(x), x)), most_rows


def _rowwise(layer: GroupedLinear) -> Rowwise:
    """By the whole group of a layer."""
    group = layer.group
    plain = isinstance(group, cpu.Group) and not group.packed
    return of_rows(group.weight.detach(), group.bias) if plain else group.forward


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
