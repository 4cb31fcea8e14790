"""The activations that published checkpoints name in their configurations."""

import torch
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): OpenAI CLIP's approximation of GELU; it differs from the exact one by up to 0.02."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.functional.gelu, "quick_gelu": quick_gelu, "silu": nn.functional.silu}
