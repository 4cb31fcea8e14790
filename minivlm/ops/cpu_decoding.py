"""Decoding steps of backend `cpu`: the next token of one row or several with as few calls as its equations need.

A step of a small model takes the time of its calls, of the shipped checkpoint 300 operators and 400 Python functions
through the blocks. Here are the same equations over the same weights of the same blocks, but what is the same in every
step is looked up once: which product, the rows' parts of the cache, the angles. No module is called, so no forward hook
either.

One row is a vector [D], several are [B, D]: everything but attention is then computed of all rows at once, and so is
attention unless that would read too many keys that no row sees, see `CALL`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import scaled_dot_product_attention, silu

from minivlm.ops import cpu
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.norms import RMSNorm
from minivlm.ops.rope import rope_table
from minivlm.ops.rows import Rows

# Attention of rows together reads every slot from the first row's to the last one's, as far as the longest row's keys;
# one by one it takes a call for each row, the time in which so many bytes of the cache are read: measured with 8 and 32
# rows of the shipped checkpoint in bfloat16 and float32. Equally long rows of 300 keys take two thirds of the time.
CALL = 80_000

Rowwise = Callable[[Tensor], Tensor]  # of one row or several: [.., K] to [.., N]
Attend = Callable[[int, Tensor], Tensor]


def decoding(decoder: nn.Module, cache: KVCache) -> Callable:
    """A function (ids of B rows, rows) -> hidden states [B, D]: the next token of every row through the decoder."""
    made: list[Step] = []

    def step(ids: Sequence[int], rows: Rows) -> Tensor:
        if not isinstance(decoder.lm_head, cpu.GroupedLinear):  # it was not prepared
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
    gate_up: Rowwise
    down: Rowwise
    keys: Tensor
    values: Tensor


class Step:
    """A step of any rows of a cache."""

    def __init__(self, decoder: nn.Module, cache: KVCache):
        config, self.cache, self.capacity = decoder.config, (cache.keys, cache.values), cache.capacity
        self.window, self.channels, self.half = config.sliding_window, config.head_dim, config.head_dim // 2
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.turned = (heads + kv_heads, kv_heads)  # heads of q and k, which turn, and of v
        self.heads, self.inner = (heads, kv_heads), (config.intermediate_size, config.intermediate_size)
        self.grouped = (kv_heads, heads // kv_heads, config.head_dim)
        self.key_bytes = 2 * kv_heads * config.head_dim * cache.keys.itemsize  # with its value
        self.cos, self.sin = _angles(
            cpu.table_size(cache.capacity), config.head_dim, config.rope_theta, cache.keys.dtype
        )
        self.single = single_attention(cache.keys.dtype)
        self.masks = _masks(self.capacity, self.window or self.capacity, cache.keys.dtype)
        self.embeddings, self.norm = decoder.embed_tokens.weight.detach(), _norm(decoder.norm)
        self.layers = [
            Layer(
                input_norm=_norm(layer.input_layernorm),
                qkv=_product(layer.self_attn.q_proj),
                output=_product(layer.self_attn.o_proj),
                post_attention_norm=_norm(layer.post_attention_layernorm),
                gate_up=_product(layer.mlp.gate_proj),
                down=_product(layer.mlp.down_proj),
                keys=keys.transpose(1, 2),
                values=values.transpose(1, 2),
            )
            for layer, keys, values in zip(decoder.layers, cache.keys, cache.values, strict=True)
        ]

    def __call__(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The hidden states [B, D] of B rows' tokens, each at a position of a slot."""
        if max(positions) >= self.capacity:
            raise ValueError(f"position {max(positions)} does not fit in a cache of {self.capacity} positions")
        if not self._alike(slots, positions):
            return self._hidden(ids, slots, positions, self._one_by_one(slots, positions))
        hidden = self._hidden(ids, slots, positions, self._together(slots, positions))
        if hidden.isfinite().all():
            return hidden
        # What is masked was not a number, where a broken row was before; or a row is broken now.
        return self._hidden(ids, slots, positions, self._one_by_one(slots, positions))

    def _hidden(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], attend: Attend) -> Tensor:
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
            gate, up = layer.gate_up(layer.post_attention_norm(x)).split_with_sizes(self.inner, -1)
            x = x + layer.down(silu(gate).mul_(up))
        return self.norm(x).view(-1, x.shape[-1])

    # ---- attention: functions (number of the layer, q [.., H, C]) -> [B, K, H/K, C]

    def _alike(self, slots: Sequence[int], positions: Sequence[int]) -> bool:
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
        if slots == tuple(range(base, base + len(slots))):  # as most often
            return lambda layer, q: self.single(q.reshape(-1, *self.grouped), *seen[layer], mask)

        row_of, places = torch.tensor(row_of, device="cpu"), torch.tensor(places, device="cpu")

        def attend(layer: int, q: Tensor) -> Tensor:
            queries = q.index_select(0, row_of).view(-1, *self.grouped)
            return self.single(queries, *seen[layer], mask).index_select(0, places)

        return attend


def _product(layer: cpu.GroupedLinear) -> Rowwise:
    """By the whole group of a layer."""
    group = layer.group
    return group.forward if group.packed else cpu.of_rows(group.weight.detach(), group.bias)


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


def _masks(size: int, window: int, dtype: torch.dtype) -> Tensor:
    """[size, size], in row size - 1 - p what is added to the scores of a query at p: 0 for the `window` keys up to p,
    else -inf. All rows are a view of one: of size 3 and window 2 of (-inf, 0, 0, -inf, -inf)."""
    row = torch.full((2 * size - 1,), -torch.inf, dtype=dtype, device="cpu")
    row[max(0, size - window) : size] = 0
    return row.unfold(0, size, 1)


# ---- a single query's attention: q [b, K, H/K, C], keys and values [b, K, t, C], what is added to scores -> like q


def single_attention(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Its fastest form."""
    if cpu.packs() and dtype != torch.float32:
        return _by_products
    return _by_gqa if dtype == torch.bfloat16 else scaled_dot_product_attention


def _by_gqa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """A head a query row. In bfloat16 with AMX, at 300 keys, groups of two take 13 us instead of 20, groups of four as
    long; in float32 and float16 each key would be read for each head."""
    heads = q.view(len(q), -1, 1, q.shape[3])  # [b, H, 1, C]
    return scaled_dot_product_attention(heads, k, v, mask, enable_gqa=True).reshape(q.shape)


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same by two products. With AMX oneDNN first copies all keys into tiles and this is 5 times slower than SDPA;
    without, at 3,000 keys in bfloat16, it is 3 times faster (AMD Zen 5: 0.37 and 1.17 ms a layer)."""
    scores = torch.matmul(q, k.transpose(2, 3)).float() * q.shape[-1] ** -0.5  # [b, K, H/K, t]
    if mask is not None:
        scores += mask
    return torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)
