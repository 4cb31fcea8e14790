"""Rotary position embedding, the half-split form that Llama and Mistral use (Su et al. 2021, RoFormer, eq. 34)."""

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles: two tensors [S, 1, C].

    Channel c and channel c + C/2 form a pair that turns by position * theta^(-2c/C). The angles are computed in
    float32 and only cos and sin are rounded to the model's dtype: positions in bfloat16 would be wrong beyond 256.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None].float() * (1.0 / theta**exponent)  # [S, C/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]  # [S, 1, C]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x [S, H, C] by the angles of cos, sin [S, 1, C]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
