"""The seam between the model and the code that computes it: a few block-level operations, chosen once by the caller.

A backend is handed to the blocks at construction; they call nothing finer, so there is one decoder and one encoder
whatever computes them. `reference` is plain PyTorch, the text to read and the oracle of the others; `sdpa` uses
PyTorch's fused attention and runs on any device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.ops.attention import attend_rows, eager, fused, sight
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rope import rotate
from minivlm.ops.rows import Rows


@dataclass(frozen=True)
class Backend:
    """The operations that blocks are built from; each has the signature of its plain form below."""

    name: str
    norm_linear: Callable
    gated_mlp: Callable
    sight: Callable
    attention: Callable
    vision_attention: Callable


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
BACKENDS = {backend.name: backend for backend in (REFERENCE, SDPA)}


def choose(name: str) -> Backend:
    """The backend of that name; `auto` is `sdpa` on every device."""
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"backend {name!r} is not known, expected auto, {' or '.join(BACKENDS)}")
    return SDPA if name == "auto" else BACKENDS[name]
