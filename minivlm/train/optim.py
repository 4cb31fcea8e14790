"""The optimiser of every stage: Muon for the matrices inside the blocks, AdamW for the rest; cosine with warm-up.

Muon (Jordan 2024) orthogonalises each matrix's momentum; embeddings, heads, norms and biases are not such matrices.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from minivlm.errors import InputError


def build_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Optimisers over the given named parameters. `lr` is AdamW's; Muon's is matched to AdamW's update size."""
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"training needs PyTorch 2.9 or newer for its Muon optimiser, found {torch.__version__}")
    matrices, others = [], []
    for name, parameter in named:
        inside = parameter.ndim == 2 and ".layers." in name
        (matrices if inside else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        )
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
    return optimizers


def cosine(step: int, steps: int, warmup: int) -> float:
    """The learning rate's share of its peak: linear up over `warmup` steps, then half a cosine down to zero.

    Example, steps 100 and warmup 10: step 0 -> 0.1, step 9 -> 1.0, step 55 -> 0.5, step 100 -> 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
