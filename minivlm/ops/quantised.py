"""A linear layer whose weight is kept in 8 or 4 bits; kernels/quantise.py has the two formats and their arithmetic.

This is the plain form: it widens the weight whenever it multiplies, which any device can do. Backends that have
products for the packed weights do not call it: triton.py, cpu_quantised.py.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minivlm.errors import InputError
from minivlm.kernels.quantise import GROUP, dequantise_int4, dequantise_int8, quantise_int4, quantise_int8

FORMATS = ("int8", "int4")
PIECE = 2**22  # weights that are widened to float32 at a time


class QuantisedLinear(nn.Module):
    """What stands in the place of an nn.Linear without a bias.

    weight: int8 [V, D], or uint8 [V, D / 2] with two weights in a byte; scale: float32 [V], or [V, D / 128] in the
    type that the layer had. They are buffers: there is nothing here to train.
    """

    bias = None

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.out_features = len(weight)
        self.in_features = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., V] by the weight rounded to x's type."""
        return linear(x, widened(self.weight, self.scale, x.dtype))


def quantise(layer: nn.Linear, form: str) -> QuantisedLinear:
    """The layer in one of FORMATS. Raises InputError where it cannot be."""
    if layer.bias is not None:
        raise InputError(f"weights {form}: found a linear layer with a bias, expected one without")
    if form == "int4" and layer.in_features % GROUP:
        raise InputError(f"weights int4: a layer has {layer.in_features} inputs, expected a multiple of {GROUP}")
    convert = quantise_int8 if form == "int8" else quantise_int4
    rows = max(1, PIECE // layer.in_features)
    pieces = [convert(piece) for piece in layer.weight.detach().split(rows)]
    weight, scale = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return QuantisedLinear(weight, scale)


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A quantised weight as [V, D] of `dtype`."""
    dequantise = dequantise_int8 if weight.dtype == torch.int8 else dequantise_int4
    if weight.numel() <= PIECE:
        return dequantise(weight, scale).to(dtype)
    rows = max(1, PIECE // weight.shape[1])
    pieces = zip(weight.split(rows), scale.split(rows), strict=True)
    return torch.cat([dequantise(*piece).to(dtype) for piece in pieces])
