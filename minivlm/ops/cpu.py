"""The backend `cpu`: the same mathematics with fewer bytes moved and fewer operators called.

- Linear layers that read the same input (q, k, v; gate, up) are one product.
- Their weights lie in the order in which oneDNN's kernels read them, packed once, after loading. The operators for it
  are private to PyTorch, so `missing` tries them before the backend is chosen.
- The query heads of a group stand as query rows, so a step reads a cached key once and not once a query head.
- Rotary angles are looked up.

Packed weights have no gradient. They are packed module by module and each original is dropped at once, so there is
never a second copy of the weights; a head that is tied to the embeddings stays plain, as packing would copy it.
"""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from minivlm.errors import InputError
from minivlm.ops.attention import attend_rows, fused
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.norms import RMSNorm
from minivlm.ops.rope import rope_table, rotate
from minivlm.ops.rows import Rows

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one module that read the same input
ROWS = 1024  # what oneDNN is told of the number of rows, when it chooses an order; the order serves any number
FIRST_POSITIONS = 2048  # rows of the first table of rotary angles


@cache
def missing(dtype: torch.dtype) -> str | None:
    """What this PyTorch or processor lacks for packed products of a type; None if they work, which is tried."""
    if not torch.backends.mkldnn.is_available():
        return "PyTorch was built without oneDNN"
    place = {"dtype": dtype, "device": "cpu"}  # whatever device is the default just now
    weight, x = torch.eye(3, 2, **place), torch.tensor([[2.0, 3.0]], **place)
    try:
        found = _product(x, _reordered(weight), None)
    except (AttributeError, RuntimeError) as error:  # no such operator; no kernel for this type on this processor
        return " ".join(str(error).split())
    return None if found.tolist() == [[2, 3, 0]] else f"oneDNN computes {found.tolist()}, expected [[2, 3, 0]]"


def _reordered(weight: Tensor) -> Tensor:
    """weight [N, K] in oneDNN's order: an opaque tensor of the same shape and size."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., K] by a packed weight [N, K] -> [.., N]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


# ---- packed linear layers


class Group(nn.Module):
    """Linear layers of one input as one product, their weights one above the other: [N_1 + N_2 + .., K]."""

    def __init__(self, linears: Sequence[nn.Linear]):
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        weights = [linear.weight.detach() for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.packed = nn.Parameter(_reordered(_joined(weights)), requires_grad=False)
        self.bias = nn.Parameter(_joined([bias.detach() for bias in biases]), requires_grad=False) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError("backend cpu: its packed weights have no gradients, expected sdpa or reference to train")
        return _product(x, self.packed, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """Nothing: the layers save their own weights, under the checkpoint's names."""


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


class PackedLinear(nn.Module):
    """What stands in the place of an nn.Linear: layer number `index` of a group. `weight` is unpacked when read."""

    def __init__(self, group: Group, index: int):
        super().__init__()
        self.group, self.index = group, index
        self.out_features, self.in_features = group.sizes[index], group.packed.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.group(x).split(self.group.sizes, dim=-1)[self.index]

    @property
    def weight(self) -> Tensor:
        """A copy [N, K] in the usual order, bit for bit what was packed."""
        return self.group.packed.to_dense().split(self.group.sizes)[self.index].clone()

    @property
    def bias(self) -> Tensor | None:
        """[N]"""
        return None if self.group.bias is None else self.group.bias.split(self.group.sizes)[self.index]

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias


def prepare(model: nn.Module) -> None:
    """Pack every linear layer of a loaded model, but for a head that is its embedding."""
    model.requires_grad_(False)
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in list(model.modules()):
        plain = [
            name
            for name, child in module.named_children()
            if isinstance(child, nn.Linear) and id(child.weight) not in shared
        ]
        groups = [names for names in GROUPS if set(names) <= set(plain)]
        grouped = {name for names in groups for name in names}
        for names in (*groups, *((name,) for name in plain if name not in grouped)):
            _pack(module, names)


def _pack(module: nn.Module, names: Sequence[str]) -> None:
    group = Group([module.get_submodule(name) for name in names])
    for index, name in enumerate(names):
        setattr(module, name, PackedLinear(group, index))


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model by its name, once; packed ones are unpacked one at a time."""
    seen = set()
    for prefix, module in model.named_modules():
        if isinstance(module, PackedLinear):
            values = {"weight": module.weight} | ({} if module.bias is None else {"bias": module.bias})
        elif isinstance(module, Group):
            continue
        else:
            values = dict(module.named_parameters(recurse=False))
        for name, tensor in values.items():
            if id(tensor) not in seen:  # a tied head is the embedding
                yield f"{prefix}.{name}".removeprefix("."), tensor
        seen |= {id(tensor) for tensor in values.values() if isinstance(tensor, nn.Parameter)}


# ---- the operations of the seam


def norm_linear(x: Tensor, norm: nn.Module, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Normalise x [S, D] and project it by each of the linears, a whole group at once: a tuple of [S, D_i]."""
    return _project(_norm(x, norm), linears)


def gated_mlp(x: Tensor, norm: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate(norm(x))) * up(norm(x))). x [S, D] -> [S, D]."""
    gated, lifted = _project(_norm(x, norm), (gate, up))  # [S, intermediate]
    return down(silu(gated) * lifted)


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x). Of RMSNorm the same roundings with fewer operators called."""
    if isinstance(norm, RMSNorm):
        return rms_norm(x, norm.weight.shape, None, norm.eps) * norm.weight
    return norm(x)


def _project(x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    first = linears[0]
    if isinstance(first, PackedLinear):
        return first.group(x).split(first.group.sizes, dim=-1)
    return tuple(linear(x) for linear in linears)  # a model that was not prepared


def rope(rows: Rows, head_dim: int, theta: float, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """cos and sin for the packed positions, two tensors [S, 1, C], from a table that doubles when outgrown."""
    needed = max(start + n for start, n in zip(rows.starts, rows.lengths, strict=True))
    size = max(FIRST_POSITIONS, 1 << (needed - 1).bit_length())
    cos, sin = _rope_rows(size, head_dim, theta, dtype)  # [size, 1, C]
    if len(rows.lengths) == 1 and len(rows.segments[0]) == 1:
        return cos[rows.starts[0] : needed], sin[rows.starts[0] : needed]
    positions = rows.positions(device)
    return cos[positions], sin[positions]


@lru_cache(maxsize=4)
def _rope_rows(size: int, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a table made while generating must serve a backward pass too
        return rope_table(torch.arange(size, device="cpu"), head_dim, theta, dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: tuple[Tensor, Tensor],
    rows: Rows,
    seen,
    cache: KVCache | None,
    layer: int,
) -> Tensor:
    """q [S, H, C], k and v [S, K, C] before rotation; seen: what `sight` returned. Returns [S, H * C]."""
    q, k = rotate(q, *angles), rotate(k, *angles)
    if cache is None or max(rows.lengths) > 1:
        return attend_rows(fused, q, k, v, rows, seen, cache, layer)
    single = _single_by_products if q.dtype != torch.float32 and not _has_tiles() else _single_by_sdpa
    outputs = []
    for row, (slot, start) in enumerate(zip(rows.slots, rows.starts, strict=True)):
        keys, values = cache.write(layer, slot, start, k[row, :, None], v[row, :, None])  # [K, start + 1, C]
        ((look),) = seen[row]
        out = single(q[row].view(k.shape[1], -1, q.shape[2]), keys[:, look.lo :], values[:, look.lo :])  # [K, H/K, C]
        outputs.append(out.reshape(1, -1))  # [1, H * C]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@cache
def _has_tiles() -> bool:
    """Whether the processor multiplies tiles of 16-bit numbers (Intel's AMX)."""
    return torch.cpu._is_amx_tile_supported()


def _single_by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [K, H/K, C], k and v [K, t, C] -> [K, H/K, C]."""
    return scaled_dot_product_attention(q[None], k[None], v[None])[0]


def _single_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by two products. With AMX oneDNN first copies all keys into tiles and this is 5 times slower than SDPA;
    without, at 3,000 keys in bfloat16, it is 3 times faster (AMD Zen 5: 0.37 and 1.17 ms a layer)."""
    scores = torch.bmm(q, k.transpose(1, 2)).float() * q.shape[-1] ** -0.5  # [K, H/K, t]
    return torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v)
