"""The seam between the model and the code that computes it: a few block-level operations, chosen once by the caller.

A backend is handed to the blocks at construction; they call nothing finer, so there is one decoder and one encoder
whatever computes them. `reference` is plain PyTorch, the text to read and the oracle of the others; `sdpa` uses
PyTorch's fused attention and runs on any device; `cpu` (ops/cpu.py) arranges the weights for a processor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.ops import cpu
from minivlm.ops.attention import attend_rows, eager, fused, sight
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rope import rope_table, rotate
from minivlm.ops.rows import Rows


def rope(rows: Rows, head_dim: int, theta: float, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """cos and sin of the packed positions' angles: two tensors [S, 1, C]."""
    return rope_table(rows.positions(device), head_dim, theta, dtype)


def as_loaded(model: nn.Module) -> None:
    """What most backends do with a model once its weights are there: nothing."""


@dataclass(frozen=True)
class Backend:
    """The operations that blocks are built from; each has the signature of its plain form in this file.

    prepare: called once with a loaded model, whose layers it may replace; then it is for inference only.
    """

    name: str
    norm_linear: Callable
    gated_mlp: Callable
    sight: Callable
    attention: Callable
    vision_attention: Callable
    rope: Callable = rope
    prepare: Callable = as_loaded


def norm_linear(x: Tensor, norm: nn.Module, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Normalise x [S, D] and project it by each of the linears: a tuple of [S, D_i]."""
    x = norm(x)
    return tuple(linear(x) for linear in linears)


def gated_mlp(x: Tensor, norm: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate(norm(x))) * up(norm(x))): SwiGLU (Shazeer 2020, eq. 6). x [S, D] -> [S, D]."""
    x = norm(x)
    return down(nn.functional.silu(gate(x)) * up(x))


def attention_by(attend: Callable) -> Callable:
    """The decoder's attention around `eager` or `fused`: rotate, write the cache, attend."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: Rows,
        seen,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """q [S, H, C], k and v [S, K, C] before rotation; seen: what `sight` returned. Returns [S, H * C]."""
        return attend_rows(attend, rotate(q, *rope), rotate(k, *rope), v, rows, seen, cache, layer)

    return attention


def vision_attention_by(attend: Callable) -> Callable:
    """The encoder's attention around `eager` or `fused`: every patch of a tile sees every other."""

    def vision_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [N, H, P, C] -> [N, H, P, C]."""
        return attend(q, k, v, "all")

    return vision_attention


REFERENCE = Backend("reference", norm_linear, gated_mlp, sight, attention_by(eager), vision_attention_by(eager))
SDPA = replace(REFERENCE, name="sdpa", attention=attention_by(fused), vision_attention=vision_attention_by(fused))
CPU = replace(
    SDPA,
    name="cpu",
    norm_linear=cpu.norm_linear,
    gated_mlp=cpu.gated_mlp,
    attention=cpu.attention,
    rope=cpu.rope,
    prepare=cpu.prepare,
)
BACKENDS = {backend.name: backend for backend in (REFERENCE, SDPA, CPU)}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name. `auto` is `cpu` on a CPU that can multiply this type as `cpu` does, else `sdpa`.

    Raises InputError for an unknown name, and for one that cannot run here, with the reason.
    """
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"backend {name!r} is not known, expected auto, {' or '.join(BACKENDS)}")
    if name == "auto":
        return CPU if device.type == "cpu" and cpu.lacks(dtype) is None else SDPA
    if name == "cpu" and device.type != "cpu":
        raise InputError(f"backend cpu: found device {device}, expected cpu")
    if name == "cpu" and (reason := cpu.lacks(dtype)) is not None:
        raise InputError(f"backend cpu: no packed products of {dtype} ({reason}), expected another type or backend")
    return BACKENDS[name]
