"""The backend `triton`: the block-level operations on this project's own kernels. Forward only: train with `sdpa`.

It knows nothing of how a kernel works; each is in a file of kernels/ below its plain twin. Products of more than
MOST_ROWS rows are cuBLAS's, which needs no help with them; what lies between the products is fused.

Launches of a decoder layer:
    up to 8 rows   [norm and q, k, v] [rotation, cache] [attention, in runs of keys] [join] [output, added]
                   [norm, gate, up and SwiGLU] [down, added]
    more rows      [norm] [q, k, v] [rotation, cache] [attention] [output] [add, norm] [gate, up] [SwiGLU] [down] [add]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear as product

from minivlm.errors import InputError
from minivlm.kernels.activations import gelu, quick_gelu, swiglu
from minivlm.kernels.attention_decode import MOST_QUERIES, attention_decode, splits_for
from minivlm.kernels.attention_prefill import attention_prefill
from minivlm.kernels.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from minivlm.kernels.rope import rotate_and_cache
from minivlm.kernels.skinny import MOST_ROWS, plain_skinny_linear, skinny_linear
from minivlm.ops import activations
from minivlm.ops.backend import Backend
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.norms import RMSNorm
from minivlm.ops.rows import Rows
from minivlm.ops.triton_sampler import sampler

PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # that lie end to end, for one product
# The kernel for an activation, with the bias of the product before it; any other is PyTorch's.
BIASED = {activations.quick_gelu: quick_gelu, nn.functional.gelu: gelu}
INTERPRETED_PROCESSORS = 32  # what the interpreter plays: enough for several runs of keys


def pack(model: nn.Module) -> None:
    """Move weights that are multiplied together into one tensor, layer by layer; the parameters stay, as views of it.

    Raises InputError for a bfloat16 model on a CPU: Triton's interpreter keeps bfloat16 as integers.
    """
    weight = next(model.parameters())
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not _multiplies_bfloat16():
        raise InputError("backend triton: Triton's interpreter computes bfloat16 wrongly, expected dtype float32")
    for module in model.modules():
        children = dict(module.named_children())
        for names in PACKED:
            if all(name in children for name in names):
                linears = [children[name] for name in names]
                _lay_end_to_end([linear.weight for linear in linears])
                if linears[0].bias is not None:
                    _lay_end_to_end([linear.bias for linear in linears])


def _lay_end_to_end(parameters: Sequence[nn.Parameter]) -> None:
    sizes = [len(parameter) for parameter in parameters]
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split(sizes), strict=True):
        parameter.data = part


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """The one tensor [V_1 + V_2 + .., D] that these [V_i, D] are parts of, without a copy; None if `pack` was not here.

    `model.to` also parts them, so it is seen from where they lie.
    """
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def _multiplies_bfloat16() -> bool:
    """Whether a product of bfloat16 numbers, each exact, is right."""
    x, weight = torch.full((2, 64), -1.5).bfloat16(), torch.arange(16.0).repeat(64, 1).T.bfloat16()
    arguments = (x, weight.contiguous(), None, None, 0.0, None, False)
    return torch.equal(skinny_linear(*arguments), plain_skinny_linear(*arguments))


def norm_linear(x: Tensor, norm: nn.Module, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Normalise x [.., D] and project it by each of the linears, in one product where their weights are joined."""
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    biased = biases[0] is not None
    weight = joined(weights)
    bias = joined(biases) if biased and weight is not None else None
    if weight is None or (biased and bias is None):
        parts = [(w, b, len(w)) for w, b in zip(weights, biases, strict=True)]
    else:
        parts = [(weight, bias, [len(w) for w in weights])]
    if _few(x) and isinstance(norm, RMSNorm) and not biased:
        products = [skinny_linear(x, w, None, norm.weight, norm.eps, None, False) for w, _, _ in parts]
    else:
        x = _normalised(x, norm)
        products = [product(x, w, b) for w, b, _ in parts]
    return tuple(part for y, (_, _, sizes) in zip(products, parts, strict=True) for part in y.split(sizes, dim=-1))


def decoder_end(
    x: Tensor, heads: Tensor, output: nn.Linear, norm: RMSNorm, gate: nn.Linear, up: nn.Linear, down: nn.Linear
) -> Tensor:
    """x [S, D] plus what attention found, heads [S, H * C] through `output`; plus the gated MLP of that: [S, D]."""
    gate_up = joined([gate.weight, up.weight])
    if _few(x):
        x = skinny_linear(heads, output.weight, None, None, 0.0, x, False)
        if gate_up is None:
            halves = (skinny_linear(x, w, None, norm.weight, norm.eps, None, False) for w in (gate.weight, up.weight))
            inner = swiglu(*halves)
        else:
            inner = skinny_linear(x, gate_up, None, norm.weight, norm.eps, None, True)  # [S, F]
        return skinny_linear(inner, down.weight, None, None, 0.0, x, False)
    x, unit = add_rms_norm(output(heads), x, norm.weight, norm.eps)
    halves = (gate(unit), up(unit)) if gate_up is None else product(unit, gate_up).chunk(2, dim=-1)
    return x + down(swiglu(*halves))


def encoder_end(
    x: Tensor,
    heads: Tensor,
    output: nn.Linear,
    norm: nn.LayerNorm,
    fc1: nn.Linear,
    activation: Callable[[Tensor], Tensor],
    fc2: nn.Linear,
) -> Tensor:
    """What follows attention in an encoder layer: the same with a plain MLP. x and heads [N, P, D] -> [N, P, D]."""
    x, unit = add_layer_norm(output(heads), x, norm.weight, norm.bias, norm.eps)
    inner = BIASED[activation](product(unit, fc1.weight), fc1.bias) if activation in BIASED else activation(fc1(unit))
    return x + fc2(inner)


def _few(x: Tensor) -> bool:
    """Whether reading the weights is all that takes time."""
    return x.dim() == 2 and 0 < len(x) <= MOST_ROWS


def _normalised(x: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, RMSNorm):
        return rms_norm(x, norm.weight, norm.eps)
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


@dataclass(frozen=True)
class Sight:
    """Where packed tokens are written and which keys they see, on the device; the same for every layer.

    Attributes:
        positions, slots: int32 [S], of each token's key in the cache.
        lo, hi: int32 [S]. A token sees the keys lo .. hi - 1 of its row.
        prefix: int32 [S]: and those below it; or None where no row is cut into segments.
        offsets: int32 [B + 1]. Row b has the tokens offsets[b] .. offsets[b + 1] - 1.
        row_slots: int32 [B], the slot of each row.
        longest: tokens of the longest row; `each` is the number if all rows have the same, else 0.
        keys: keys of the longest row, the new ones included.
    """

    positions: Tensor
    slots: Tensor
    lo: Tensor
    hi: Tensor
    prefix: Tensor | None
    offsets: Tensor
    row_slots: Tensor
    longest: int
    each: int
    keys: int


def sight(rows: Rows, window: int | None, device) -> Sight:
    """What each row's tokens may see: one table of integers, in one transfer.

    Each vector begins at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not.
    """
    positions, slots, lo, hi, prefix = [], [], [], [], []
    for n, start, slot, (first, *others) in zip(rows.lengths, rows.starts, rows.slots, rows.segments, strict=True):
        if others and window is not None:
            raise ValueError("a sliding window over segments with a shared prefix is not defined")
        positions += range(start, start + n)
        slots += [slot] * n
        hi += range(start + 1, start + n + 1)
        lo += [0 if window is None else max(0, p + 1 - window) for p in range(start, start + first)]
        prefix += [0] * first
        for length in others:  # a later segment sees the prefix and itself
            lo += [start + len(lo) - (len(positions) - n)] * length
            prefix += [start + first] * length
    offsets = [*rows.offsets, len(positions)]
    vectors = (positions, slots, lo, hi, prefix, offsets, rows.slots)
    width = -(-max(map(len, vectors)) // 4) * 4
    table = torch.tensor([[*vector, *[0] * (width - len(vector))] for vector in vectors], dtype=torch.int32)
    positions, slots, lo, hi, prefix, offsets, row_slots = (
        row[: len(vector)] for row, vector in zip(table.to(device), vectors, strict=True)
    )
    return Sight(
        positions=positions,
        slots=slots,
        lo=lo,
        hi=hi,
        prefix=prefix if any(len(segments) > 1 for segments in rows.segments) else None,
        offsets=offsets,
        row_slots=row_slots,
        longest=max(rows.lengths),
        each=rows.lengths[0] if len(set(rows.lengths)) == 1 else 0,
        keys=max(start + n for start, n in zip(rows.starts, rows.lengths, strict=True)),
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    rows: Rows,
    seen: Sight,
    cache: KVCache | None,
    layer: int,
) -> Tensor:
    """q [S, H, C], k and v [S, K, C] before rotation; seen: what `sight` returned. Returns [S, H * C]."""
    if cache is None:  # the rows lie end to end in one slot, and each begins where the one before it ends
        tokens, kv_heads, channels = k.shape
        keys, values = k.new_empty(2, 1, kv_heads, tokens, channels)
        everywhere = torch.arange(tokens, dtype=torch.int32, device=k.device)
        q = rotate_and_cache(q, k, v, *rope, everywhere, torch.zeros_like(everywhere), keys, values)
        origins = seen.offsets[:-1]
        places = (seen.offsets, torch.zeros_like(origins), origins)
        out = attention_prefill(q, keys, values, seen.lo, seen.hi, seen.prefix, *places, seen.longest)
        return out.flatten(1)  # [S, H * C]
    if seen.keys > cache.capacity:
        raise ValueError(f"position {seen.keys - 1} does not fit in a cache of {cache.capacity} positions")
    keys, values = cache.keys[layer], cache.values[layer]  # [slots, K, T, C]
    q = rotate_and_cache(q, k, v, *rope, seen.positions, seen.slots, keys, values)
    groups = q.shape[1] // k.shape[1]
    if 0 < seen.each * groups <= MOST_QUERIES and seen.prefix is None:
        splits = splits_for(len(seen.row_slots), k.shape[1], seen.keys, _processors(q.device))
        out = attention_decode(q, keys, values, seen.lo, seen.hi, seen.row_slots, splits)
    else:
        places = (seen.offsets, seen.row_slots, torch.zeros_like(seen.row_slots))
        out = attention_prefill(q, keys, values, seen.lo, seen.hi, seen.prefix, *places, seen.longest)
    return out.flatten(1)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def vision_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [N, H, P, C] -> [N, H, P, C]: every patch of a tile sees every other. A tile is a row, and a slot."""
    tiles, patches = q.shape[0], q.shape[2]
    out = attention_prefill(
        rearrange(q, "n h p c -> (n p) h c"), k, v, *_whole_tiles(tiles, patches, q.device), patches
    )
    return rearrange(out, "(n p) h c -> n h p c", n=tiles)


@lru_cache(maxsize=8)
def _whole_tiles(tiles: int, patches: int, device: torch.device) -> tuple[Tensor | None, ...]:
    """The indices lo, hi, prefix, offsets, slots, origins of `attention_prefill`: the same for every layer."""
    hi = torch.full((tiles * patches,), patches, dtype=torch.int32, device=device)
    offsets = torch.arange(0, (tiles + 1) * patches, patches, dtype=torch.int32, device=device)
    slots = torch.arange(tiles, dtype=torch.int32, device=device)
    return torch.zeros_like(hi), hi, None, offsets, slots, torch.zeros_like(slots)


TRITON = Backend(
    name="triton",
    norm_linear=norm_linear,
    decoder_end=decoder_end,
    sight=sight,
    attention=attention,
    vision_attention=vision_attention,
    encoder_end=encoder_end,
    sampler=sampler,
    pack=pack,
)
