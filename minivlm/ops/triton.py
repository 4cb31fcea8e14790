"""The backend `triton`: the block-level operations on this project's own kernels. Forward only: train with `sdpa`.

It knows nothing of how a kernel works; each is in a file of kernels/ below its plain twin. Products of more than
MOST_ROWS rows are cuBLAS's, which needs no help with them; what lies between the products is fused.

Launches of a decoder layer:
    up to 8 rows   [norm and q, k, v] [rotation, cache] [attention, in runs of keys] [join] [output, added]
                   [norm, gate, up and SwiGLU] [down, added]
    more rows      [norm] [q, k, v] [rotation, cache] [attention] [output] [add, norm] [gate, up] [SwiGLU] [down] [add]
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minivlm.errors import InputError
from minivlm.kernels.activations import gelu, quick_gelu, swiglu
from minivlm.kernels.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from minivlm.kernels.skinny import MOST_ROWS, plain_skinny_linear, skinny_linear
from minivlm.ops import activations
from minivlm.ops.backend import Backend, rope
from minivlm.ops.joined import Group, group_of, join
from minivlm.ops.norms import RMSNorm
from minivlm.ops.quantised import QuantisedLinear
from minivlm.ops.triton_attention import attention, sight, vision_attention
from minivlm.ops.triton_decoding import decoding
from minivlm.ops.triton_sampler import sampler

# The kernel for an activation, with the bias of the product before it; any other is PyTorch's.
BIASED = {activations.quick_gelu: quick_gelu, nn.functional.gelu: gelu}


def pack(model: nn.Module) -> None:
    """Join layers that read the same input, and give few rows by quantised weights to the kernel.

    Raises InputError for a bfloat16 model on a CPU: Triton's interpreter keeps bfloat16 as integers.
    """
    weight = next(model.parameters())
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not _multiplies_bfloat16():
        raise InputError("backend triton: Triton's interpreter computes bfloat16 wrongly, expected dtype float32")
    join(model, Group, alone=False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is QuantisedLinear:
                setattr(module, name, SkinnyLinear(child.weight, child.scale))


class SkinnyLinear(QuantisedLinear):
    """A quantised layer whose product with few rows is the kernel's."""

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., V]"""
        return skinny_linear(x, self.weight, self.scale, None, 0.0, None, False) if _few(x) else super().forward(x)


def _multiplies_bfloat16() -> bool:
    """Whether a product of bfloat16 numbers, each exact, is right."""
    x, weight = torch.full((2, 64), -1.5).bfloat16(), torch.arange(16.0).repeat(64, 1).T.bfloat16()
    arguments = (x, weight.contiguous(), None, None, 0.0, None, False)
    return torch.equal(skinny_linear(*arguments), plain_skinny_linear(*arguments))


def norm_linear(x: Tensor, norm: nn.Module, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Normalise x [.., D] and project it by each of the linears, whose weights make one product."""
    group = group_of(linears)
    if group is None:  # a model that was not prepared
        unit = _normalised(x, norm)
        return tuple(layer(unit) for layer in linears)
    if _few(x) and isinstance(norm, RMSNorm) and group.bias is None:
        y = skinny_linear(x, group.weight, group.scale, norm.weight, norm.eps, None, False)
        return y.split(group.sizes, dim=-1)
    return group.parts(_normalised(x, norm))


def decoder_end(
    x: Tensor, heads: Tensor, output: nn.Module, norm: RMSNorm, gate: nn.Module, up: nn.Module, down: nn.Module
) -> Tensor:
    """x [S, D] plus what attention found, heads [S, H * C] through `output`; plus the gated MLP of that: [S, D]."""
    group = group_of((gate, up))
    if _few(x) and group is not None:
        x = skinny_linear(heads, output.weight, _scale(output), None, 0.0, x, False)
        inner = skinny_linear(x, group.weight, group.scale, norm.weight, norm.eps, None, True)  # [S, F]
        return skinny_linear(inner, down.weight, _scale(down), None, 0.0, x, False)
    x, unit = add_rms_norm(output(heads), x, norm.weight, norm.eps)
    halves = (gate(unit), up(unit)) if group is None else group.parts(unit)
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
    inner = BIASED[activation](linear(unit, fc1.weight), fc1.bias) if activation in BIASED else activation(fc1(unit))
    return x + fc2(inner)


def _scale(layer: nn.Module) -> Tensor | None:
    """Of a quantised layer, None of another."""
    return layer.scale if isinstance(layer, QuantisedLinear) else None


def _few(x: Tensor) -> bool:
    """Whether reading the weights is all that takes time."""
    return x.dim() == 2 and 0 < len(x) <= MOST_ROWS


def _normalised(x: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, RMSNorm):
        return rms_norm(x, norm.weight, norm.eps)
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


TRITON = Backend(
    name="triton",
    norm_linear=norm_linear,
    decoder_end=decoder_end,
    sight=sight,
    attention=attention,
    vision_attention=vision_attention,
    encoder_end=encoder_end,
    decoding=decoding,
    sampler=sampler,
    rope=rope,
    prepare=pack,
)
