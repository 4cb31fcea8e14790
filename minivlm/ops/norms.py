"""Root mean square layer normalisation (Zhang and Sennrich 2019, eq. 4), with Llama's rounding order."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis.

    The normalised value is rounded to x's dtype *before* it is multiplied by the weight. Multiplying in float32
    instead would change about a quarter of all bfloat16 results.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
