"""The backend `cpu`: the same mathematics with fewer bytes moved and fewer operators called.

- Linear layers that read the same input (q, k, v; gate, up) are one product.
- Which product is fastest depends on the processor, see `packs`. Either the weights lie in the order in which oneDNN's
  kernels read them, packed once, after loading (the operators for it are private to PyTorch, so `missing` tries them
  before the backend is chosen); or they lie in fewer bits, see cpu_compact.py, or as they are, see cpu_products.py;
  those of a small model by columns, see cpu_groups.py.
- Rows with one query attend together, and a step reads a cached key once for all query heads of its group where that
  is faster, see cpu_attention.py.
- Rotary angles are looked up.

Joined and packed weights have no gradient. A head that is tied to the embeddings is not packed, which would copy it.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from minivlm.ops import cpu_groups, joined
from minivlm.ops.cpu_compact import compact_group
from minivlm.ops.cpu_groups import refuse_gradients
from minivlm.ops.cpu_memory import keep_freed
from minivlm.ops.cpu_products import MANY, MLP_ACROSS, mlp_across, product, shaped
from minivlm.ops.cpu_quantised import missing_quantised, quantised_group
from minivlm.ops.cpu_shapes import of_rounded
from minivlm.ops.norms import RMSNorm
from minivlm.ops.quantised import QuantisedLinear
from minivlm.ops.rope import rope_table
from minivlm.ops.rows import Rows

ROWS = 1  # what oneDNN is told of the number of rows when it chooses an order; the order serves any number
FIRST_POSITIONS = 2048  # rows of the first table of rotary angles


@cache
def packs() -> bool:
    """Whether packed weights are the faster ones here: everywhere but on Intel's processors with AMX.

    GB/s of weights that one thread reads for one row, as F.linear / packed / vector, bfloat16 and float32:
    Intel with AMX 11.6 / 10.8 / 13.2 and 15.2 / 13.3 / 15.3; AMD Zen 5 17 / 29 / 12 and 22 / 28 / not measured.
    """
    return not torch.cpu._is_amx_tile_supported()


def lacks(dtype: torch.dtype, form: str | None) -> str | None:
    """Why this backend cannot compute here in a type, with weights quantised to a format if one is given; or None."""
    reason = missing(dtype) if packs() else None
    if reason is None and form is not None:
        reason = missing_quantised(form, dtype)
    return reason


@cache
def missing(dtype: torch.dtype) -> str | None:
    """What this PyTorch or processor lacks for packed products of a type; None if they work, which is tried."""
    if not torch.backends.mkldnn.is_available():
        return "PyTorch was built without oneDNN"
    place = {"dtype": dtype, "device": "cpu"}  # whatever device is the default just now
    weight, x = torch.eye(3, 2, **place), torch.tensor([[2.0, 3.0]], **place)
    try:
        found = packed_product(x, _reordered(weight), None)
    except (AttributeError, RuntimeError) as error:  # no such operator; no kernel for this type on this processor
        return " ".join(str(error).split())
    return None if found.tolist() == [[2, 3, 0]] else f"oneDNN computes {found.tolist()}, expected [[2, 3, 0]]"


def _reordered(weight: Tensor) -> Tensor:
    """weight [N, K] in oneDNN's order: an opaque tensor of the same shape and size."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., K] by a packed weight [N, K] -> [.., N]."""
    return of_rounded(lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""), x)


# ---- joined linear layers


class Group(cpu_groups.Group):
    """Layers of one input as one product, its weight packed or plain."""

    def __init__(self, linears: Sequence[nn.Linear], packed: bool):
        super().__init__(linears)
        self.packed = packed
        if packed:
            self.weight = nn.Parameter(_reordered(self.weight), requires_grad=False)

    def whole(self) -> Tensor:
        return self.weight.to_dense() if self.packed else self.weight

    def several(self, x: Tensor) -> Tensor:
        return packed_product(x, self.weight, self.bias) if self.packed else product(x, self.weight, self.bias)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The layers' results one by one. Many rows go through plain weights layer by layer: each result is then
        whole in memory, which saves more than one product costs."""
        if self.packed or x.numel() <= MANY * x.shape[-1]:
            return super().parts(x)
        refuse_gradients(x, self.weight)
        biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
        weights = zip(self.weight.split(self.sizes), biases, strict=True)
        more = shaped(x)
        return tuple(linear(more, *weight)[: len(x)] for weight in weights)


def prepare(model: nn.Module) -> None:
    """Join the linear layers of a loaded model, and pack them or lay them by columns where that is faster; and let the
    process keep its memory. The model has no gradients from then on."""
    keep_freed()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = (module for module in model.modules() if isinstance(module, joined.LINEAR))
    small = max((layer.in_features * layer.out_features for layer in layers), default=0) <= cpu_groups.SMALL

    def group(layers: list[nn.Module]) -> joined.Group:
        made = _group(layers, id(layers[0].weight) in embeddings, small)
        made.small = small
        return made

    joined.join(model, group, alone=True)


def _group(linears: Sequence[nn.Module], tied: bool, small: bool) -> joined.Group:
    """The layers of one input as one; tied ones are the embeddings too."""
    if isinstance(linears[0], QuantisedLinear):
        return quantised_group(linears, small)
    plain = all(layer.bias is None for layer in linears)
    # Only FBGEMM has kernels for embedding_bag.
    if small and plain and "fbgemm" in torch.backends.quantized.supported_engines:
        group = Group(linears, packed=False)
        group.weight.data = group.weight.t().contiguous().t()  # of tied embeddings too
        return group
    compact = compact_group(linears) if plain and not (small or tied or packs()) else None
    return Group(linears, packs() and not tied) if compact is None else compact


# ---- the operations of the seam


def norm_linear(x: Tensor, norm: nn.Module, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Normalise x [S, D] and project it by each of the linears, a whole group at once: a tuple of [S, D_i]."""
    group = joined.group_of(linears)
    if isinstance(group, cpu_groups.Group) and isinstance(norm, RMSNorm):
        kernel = group.kernel(x.dtype, len(x), norm)
        if kernel is not None:
            refuse_gradients(x)
            return kernel(x.contiguous()).split(group.sizes, dim=-1)
    return _project(_norm(x, norm), linears)


def decoder_end(
    x: Tensor, heads: Tensor, output: nn.Module, norm: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module
) -> Tensor:
    """x [S, D] plus what attention found, heads [S, H * C] through `output`; plus the gated MLP of that: [S, D]."""
    kernels = end_kernels(len(x), x.dtype, output, norm, gate, up, down)
    if kernels is None:
        x = x + output(heads)
        return x + gated_mlp(x, norm, gate, up, down)
    refuse_gradients(x, heads)
    project, inner, lower = kernels
    x = project(heads.contiguous(), x.contiguous())
    return lower(inner(x), x)


def end_kernels(
    rows: int,
    dtype: torch.dtype,
    output: nn.Module,
    norm: nn.Module,
    gate: nn.Module,
    up: nn.Module,
    down: nn.Module,
) -> tuple[Callable, Callable, Callable] | None:
    """This project's kernels for so many rows, of the products in `decoder_end`: `output`, [gate | up] with all that is
    around it, and `down`; None where one is missing."""
    groups = [joined.group_of(layers) for layers in ((output,), (gate, up), (down,))]
    if not all(isinstance(group, cpu_groups.Group) for group in groups):
        return None
    arounds = (None, False), (norm, True), (None, False)
    kernels = tuple(group.kernel(dtype, rows, *around) for group, around in zip(groups, arounds, strict=True))
    return None if None in kernels else kernels


def gated_mlp(x: Tensor, norm: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate(norm(x))) * up(norm(x))). x [S, D] -> [S, D]."""
    unit = _norm(x, norm)
    if len(x) in MLP_ACROSS.get(x.dtype, ()) and (weights := mlp_weights(gate, up, down)):
        refuse_gradients(unit, *weights)
        return mlp_across(unit, *weights)
    gated, lifted = _project(shaped(unit), (gate, up))  # [S or more, intermediate]
    if isinstance(gate, joined.GroupedLinear) and gated.is_contiguous():
        inner = silu(gated, inplace=True).mul_(lifted)  # fresh large buffers cost as much as the arithmetic
    else:
        inner = silu(gated) * lifted
    return down(inner)[: len(x)]


def mlp_weights(gate: nn.Module, up: nn.Module, down: nn.Module) -> tuple[Tensor, ...] | None:
    """The three weights if all lie as they were loaded and have no bias."""
    groups = joined.group_of((gate, up)), joined.group_of((down,))
    if all(isinstance(group, Group) and group.by_rows and group.bias is None for group in groups):
        return (*groups[0].weight.split(groups[0].sizes), groups[1].weight)
    return None


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x). Of RMSNorm the same roundings with fewer operators called."""
    if isinstance(norm, RMSNorm):
        return rms_norm(x, norm.weight.shape, None, norm.eps) * norm.weight
    return norm(x)


def _project(x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    group = joined.group_of(linears)
    return tuple(layer(x) for layer in linears) if group is None else group.parts(x)  # None: it was not prepared


def rope(rows: Rows, head_dim: int, theta: float, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """cos and sin for the packed positions, two tensors [S, 1, C], from a table that doubles when outgrown."""
    needed = max(start + n for start, n in zip(rows.starts, rows.lengths, strict=True))
    size = table_size(needed)
    cos, sin = _rope_rows(size, head_dim, theta, dtype, torch.is_inference_mode_enabled())  # [size, 1, C]
    if len(rows.lengths) == 1 and len(rows.segments[0]) == 1:
        return cos[rows.starts[0] : needed], sin[rows.starts[0] : needed]
    positions = rows.positions(device)
    return cos[positions], sin[positions]


def table_size(positions: int) -> int:
    """The rows of a table of so many positions: few sizes, so that one is seldom made."""
    return max(FIRST_POSITIONS, 1 << (positions - 1).bit_length())


@lru_cache(maxsize=4)
def _rope_rows(size: int, head_dim: int, theta: float, dtype: torch.dtype, inference: bool) -> tuple[Tensor, Tensor]:
    """inference: only keeps apart the tensors that a backward pass cannot use."""
    return rope_table(torch.arange(size, device="cpu"), head_dim, theta, dtype)
