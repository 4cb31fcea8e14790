"""Weights in 8 and 4 bits, rounded to the nearest step of a symmetric grid: the packed formats that `skinny.py` reads.

It knows nothing of calibration data: each weight matrix is quantised by itself, and `error_of` says what that cost.

int8: one scale per output channel. weight int8 [V, D] from -127 to 127, scale float32 [V]; value = weight * scale.
    Example: a row (0.5, -1.27, 0) has the scale 0.01 and the weights (50, -127, 0).

int4: one scale per group of 128 neighbouring inputs of an output channel. packed uint8 [V, D / 2], scale [V, D / 128]
    of the weight's own dtype. A weight q from -8 to 7 is stored as q + 8, two in a byte: byte i of a group holds
    input i in its low half and input i + 64 in its high half, so that both halves of 64 neighbouring bytes meet 64
    neighbouring inputs. value = q * scale. The group's value of largest magnitude becomes -8 whatever its sign, so
    a scale may be negative; with 16-bit scales a weight takes 4.125 bits.
    Example: the bytes (0x19, ...) of a group with scale 0.5: input 0 is (9 - 8) * 0.5, input 64 is (1 - 8) * 0.5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
HALF = GROUP // 2


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [V, D] -> int8 [V, D] and float32 scale [V]."""
    _check(weight)
    wide = weight.float()
    scale = wide.abs().amax(-1) / 127
    return _steps(wide, scale[:, None]).clamp(-127, 127).to(torch.int8), scale


def dequantise_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [V, D] and scale [V] -> float32 [V, D]."""
    return weight.float() * scale[:, None]


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [V, D], D a multiple of 128 -> packed uint8 [V, D / 2] and scale [V, D / 128] of the weight's dtype."""
    _check(weight)
    if weight.shape[1] % GROUP:
        raise ValueError(f"int4: a weight of {weight.shape[1]} inputs, expected a multiple of {GROUP}")
    groups = weight.float().unflatten(-1, (-1, GROUP))  # [V, D / 128, 128]
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).to(weight.dtype)  # what is stored is rounded first, and the weights fit to that
    steps = (_steps(groups, scale.float()).clamp(-8, 7) + 8).to(torch.uint8)
    low, high = steps.chunk(2, dim=-1)  # [V, D / 128, 64]
    return (low | high << 4).flatten(1), scale.squeeze(-1)


def dequantise_int4(packed: Tensor, scale: Tensor) -> Tensor:
    """Packed uint8 [V, D / 2] and scale [V, D / 128] -> float32 [V, D]."""
    groups = packed.unflatten(-1, (-1, HALF))  # [V, D / 128, 64]
    steps = torch.cat((groups & 15, groups >> 4), dim=-1).to(torch.int8) - 8  # [V, D / 128, 128]
    return (steps.float() * scale.float()[:, :, None]).flatten(1)


@dataclass(frozen=True)
class QuantisationError:
    """How far quantised weights lie from the original.

    Attributes:
        relative: root mean square of the differences over that of the weights. It is also what to expect of the
            product with a random input; a bfloat16 rounding is 0.0017.
        largest: the largest difference.
        bits: stored bits per weight, scales included.
    """

    relative: float
    largest: float
    bits: float


def error_of(weight: Tensor, quantised: Tensor, scale: Tensor) -> QuantisationError:
    """Compare a weight [V, D] with what `quantise_int8` (int8) or `quantise_int4` (uint8) made of it."""
    dequantise = dequantise_int8 if quantised.dtype == torch.int8 else dequantise_int4
    wide = weight.double()
    difference = dequantise(quantised, scale).double() - wide
    norm = wide.norm()
    return QuantisationError(
        relative=(difference.norm() / norm).item() if norm else 0.0,
        largest=difference.abs().max().item(),
        bits=8 * (quantised.nbytes + scale.nbytes) / weight.numel(),
    )


def _steps(wide: Tensor, scale: Tensor) -> Tensor:
    """wide / scale to the nearest integer; 0 where the scale is 0, since then all it stands for is 0."""
    return torch.where(scale == 0, 0.0, wide / scale).round()


def _check(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"quantise: {weight.dtype} {list(weight.shape)}, expected floating point [V, D]")
    if not weight.isfinite().all():
        raise ValueError("quantise: the weight holds infinite values or NaN, expected finite ones")
