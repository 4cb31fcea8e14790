"""How many threads a model's operations are worth on a CPU.

A small model's operations are too short for many threads, which wait for one another at the end of each; and they wait
long if another process has the core that one of them needs. The shipped checkpoint's answer about its sample picture
took 0.08 s with two threads and 0.09 s with one, alone on two cores; beside one busy process 0.39 and 0.09 s.
"""

import torch
from torch import nn

CACHED = 2**26  # bytes of weights that a core may find in its caches


def small(model: nn.Module) -> bool:
    """Whether one thread computes a model, or a part of one, about as fast as many do."""
    weights = [*model.parameters(), *model.buffers()]
    return all(tensor.device.type == "cpu" for tensor in weights) and sum(tensor.nbytes for tensor in weights) <= CACHED


def use_one_thread_if_small(model: nn.Module) -> None:
    """Let the process compute with one thread if the model is small."""
    if small(model):
        torch.set_num_threads(1)
