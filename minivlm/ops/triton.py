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
from torch.nn.functional import linear as product

from minivlm.errors import InputError
from minivlm.kernels.activations import gelu, quick_gelu, swiglu
from minivlm.kernels.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from minivlm.kernels.skinny import MOST_ROWS, plain_skinny_linear, skinny_linear
from minivlm.ops import activations
from minivlm.ops.backend import Backend, rope
from minivlm.ops.joined import GROUPS, joined
from minivlm.ops.norms import RMSNorm
from minivlm.ops.quantised import QuantisedLinear, widened
from minivlm.ops.triton_attention import attention, sight, vision_attention
from minivlm.ops.triton_decoding import decoding
from minivlm.ops.triton_sampler import sampler

# The kernel for an activation, with the bias of the product before it; any other is PyTorch's.
BIASED = {activations.quick_gelu: quick_gelu, nn.functional.gelu: gelu}


def pack(model: nn.Module) -> None:
    """Move weights that are multiplied together into one tensor, layer by layer; the parameters stay, as views of it.

    Raises InputError for a bfloat16 model on a CPU: Triton's interpreter keeps bfloat16 as integers.
    """
    weight = next(model.parameters())
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not _multiplies_bfloat16():
        raise InputError("backend triton: Triton's interpreter computes bfloat16 wrongly, expected dtype float32")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is QuantisedLinear:
                setattr(module, name, SkinnyLinear(child.weight, child.scale))
        children = dict(module.named_children())
        for names in GROUPS:
            if all(name in children for name in names):
                linears = [children[name] for name in names]
                for part in ("weight", "bias", "scale"):
                    if parts := _parts(linears, part):
                        _lay_end_to_end(parts)


class SkinnyLinear(QuantisedLinear):
    """A quantised layer whose product with few rows is the kernel's."""

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., V]"""
        return skinny_linear(x, self.weight, self.scale, None, 0.0, None, False) if _few(x) else super().forward(x)


def _parts(linears: Sequence[nn.Module], name: str) -> list[Tensor]:
    """The layers' tensors of a name; none if they have none."""
    if name == "scale":
        return [linear.scale for linear in linears if isinstance(linear, QuantisedLinear)]
    if name == "bias":
        return [linear.bias for linear in linears if linear.bias is not None]
    return [linear.weight for linear in linears]


def _lay_end_to_end(parameters: Sequence[Tensor]) -> None:
    if joined(parameters) is not None:
        return
    sizes = [len(parameter) for parameter in parameters]
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split(sizes), strict=True):
        parameter.data = part


def _multiplies_bfloat16() -> bool:
    """Whether a product of bfloat16 numbers, each exact, is right."""
    x, weight = torch.full((2, 64), -1.5).bfloat16(), torch.arange(16.0).repeat(64, 1).T.bfloat16()
    arguments = (x, weight.contiguous(), None, None, 0.0, None, False)
    return torch.equal(skinny_linear(*arguments), plain_skinny_linear(*arguments))


def norm_linear(x: Tensor, norm: nn.Module, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Normalise x [.., D] and project it by each of the linears, whose weights make one product."""
    weight, scale, biases = joined(_parts(linears, "weight")), _scale(linears), _parts(linears, "bias")
    bias = joined(biases) if biases else None
    if weight is None or (biases and bias is None):
        unit = _normalised(x, norm)
        return tuple(linear(unit) for linear in linears)
    if _few(x) and isinstance(norm, RMSNorm) and bias is None:
        y = skinny_linear(x, weight, scale, norm.weight, norm.eps, None, False)
    else:
        y = product(_normalised(x, norm), _wide(weight, scale, x.dtype), bias)
    return y.split([linear.out_features for linear in linears], dim=-1)


def decoder_end(
    x: Tensor, heads: Tensor, output: nn.Linear, norm: RMSNorm, gate: nn.Linear, up: nn.Linear, down: nn.Linear
) -> Tensor:
    """x [S, D] plus what attention found, heads [S, H * C] through `output`; plus the gated MLP of that: [S, D]."""
    gate_up, scale = joined([gate.weight, up.weight]), _scale((gate, up))
    if _few(x) and gate_up is not None:
        x = skinny_linear(heads, output.weight, _scale((output,)), None, 0.0, x, False)
        inner = skinny_linear(x, gate_up, scale, norm.weight, norm.eps, None, True)  # [S, F]
        return skinny_linear(inner, down.weight, _scale((down,)), None, 0.0, x, False)
    x, unit = add_rms_norm(output(heads), x, norm.weight, norm.eps)
    if gate_up is None:
        halves = gate(unit), up(unit)
    else:
        halves = product(unit, _wide(gate_up, scale, x.dtype)).chunk(2, dim=-1)
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


def _scale(linears: Sequence[nn.Module]) -> Tensor | None:
    """The joined scales of quantised layers, None of others."""
    scales = _parts(linears, "scale")
    return joined(scales) if scales else None


def _wide(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A joined weight as cuBLAS multiplies it."""
    return weight if scale is None else widened(weight, scale, dtype)


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
