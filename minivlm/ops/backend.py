"""The seam between the model and the code that computes it: a few block-level operations, chosen once by the caller.

A backend is handed to the blocks at construction; they call nothing finer, so there is one decoder and one encoder
whatever computes them. `reference` is plain PyTorch, the text to read and the oracle of the others; `sdpa` uses
PyTorch's fused attention and runs on any device; `cpu` (cpu.py) arranges the weights for a processor; `triton`
(triton.py) is this project's own kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.ops import cpu, cpu_attention, cpu_decoding
from minivlm.ops.attention import attend_rows, eager, fused, sight
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rope import rope_table, rotate
from minivlm.ops.rows import Rows
from minivlm.sampler import Choice, sample


def rope(rows: Rows, head_dim: int, theta: float, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """cos and sin of the packed positions' angles: two tensors [S, 1, C]."""
    return rope_table(rows.positions(device), head_dim, theta, dtype)


def as_loaded(model: nn.Module) -> None:
    """What most backends do with a model once its weights are there: nothing."""


@dataclass(frozen=True)
class Backend:
    """The operations that blocks are built from; each has the signature of its plain form in this file.

    prepare: called once with a loaded model, whose layers it may replace; then it is for inference only, where it is.
    """

    name: str
    norm_linear: Callable
    decoder_end: Callable
    sight: Callable
    attention: Callable
    vision_attention: Callable
    encoder_end: Callable
    decoding: Callable
    sampler: Callable
    rope: Callable
    prepare: Callable


def norm_linear(x: Tensor, norm: nn.Module, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Normalise x [S, D] and project it by each of the linears: a tuple of [S, D_i]."""
    x = norm(x)
    return tuple(linear(x) for linear in linears)


def gated_mlp(x: Tensor, norm: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate(norm(x))) * up(norm(x))): SwiGLU (Shazeer 2020, eq. 6). x [S, D] -> [S, D]."""
    x = norm(x)
    return down(nn.functional.silu(gate(x)) * up(x))


def decoder_end(
    x: Tensor, heads: Tensor, output: nn.Module, norm: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module
) -> Tensor:
    """x [S, D] plus what attention found, heads [S, H * C] through `output`; plus the gated MLP of that: [S, D]."""
    x = x + output(heads)
    return x + gated_mlp(x, norm, gate, up, down)


def encoder_end(
    x: Tensor,
    heads: Tensor,
    output: nn.Module,
    norm: nn.Module,
    fc1: nn.Module,
    activation: Callable[[Tensor], Tensor],
    fc2: nn.Module,
) -> Tensor:
    """What follows attention in an encoder layer: the same with a plain MLP. x and heads [N, P, D] -> [N, P, D]."""
    x = x + output(heads)
    return x + fc2(activation(fc1(norm(x))))


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


def decoding(decoder: nn.Module, cache: KVCache) -> Callable:
    """A function (ids of B rows, rows) -> hidden states [B, D]: the next token of every row through the decoder."""

    def step(ids: Sequence[int], rows: Rows) -> Tensor:
        return decoder(decoder.embed_tokens(torch.tensor(ids, device=cache.keys.device)), rows, cache)

    return step


def sampler(allowed: Tensor) -> Callable:
    """Chooses ids among the allowed, bool [V]: a function (logits [B, V], samplings, positions, seen) -> choices.

    Two arguments may follow. Bitmasks, int32 [B, ceil(V / 32)] on the CPU: row b may choose id i only if bit i % 32 of
    word i // 32 is set as well. And where the rows' answers begin, see `sample`.
    """

    def choose(
        logits: Tensor, samplings, positions, seen, bitmasks: Tensor | None = None, starts: Sequence[int] | None = None
    ) -> tuple[Choice, ...]:
        mask = allowed if bitmasks is None else allowed & unpacked_bits(bitmasks, allowed)
        return sample(logits, samplings, positions, seen, mask, starts)

    return choose


def unpacked_bits(words: Tensor, allowed: Tensor) -> Tensor:
    """int32 [B, ceil(V / 32)] -> bool [B, V] on the device of allowed [V]; bit 0 of the first word comes first."""
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != -(-len(allowed) // 32):
        expected = f"torch.int32 [B, {-(-len(allowed) // 32)}]"
        raise InputError(f"bitmasks: found {words.dtype} {list(words.shape)}, expected {expected}")
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32) & 1  # [B, words, 32]
    return bits.flatten(1)[:, : len(allowed)].bool().to(allowed.device)


REFERENCE = Backend(
    name="reference",
    norm_linear=norm_linear,
    decoder_end=decoder_end,
    sight=sight,
    attention=attention_by(eager),
    vision_attention=vision_attention_by(eager),
    encoder_end=encoder_end,
    decoding=decoding,
    sampler=sampler,
    rope=rope,
    prepare=as_loaded,
)
SDPA = replace(REFERENCE, name="sdpa", attention=attention_by(fused), vision_attention=vision_attention_by(fused))
CPU = replace(
    SDPA,
    name="cpu",
    norm_linear=cpu.norm_linear,
    decoder_end=cpu.decoder_end,
    sight=cpu_attention.sight,
    attention=cpu_attention.attention,
    vision_attention=cpu_attention.vision_attention,
    decoding=cpu_decoding.decoding,
    rope=cpu.rope,
    prepare=cpu.prepare,
)
BACKENDS = {backend.name: backend for backend in (REFERENCE, SDPA, CPU)}
NAMES = (*BACKENDS, "triton")
OLDEST = (8, 0)  # the compute capability from which on the kernels were compiled: Ampere


def choose(name: str, device: torch.device, dtype: torch.dtype, form: str | None = None) -> Backend:
    """The backend of that name. `auto` is `cpu` on a CPU where it can run, else `sdpa`: `triton` has to be asked for,
    until its tests have passed on a GPU. form: what the decoder's weights are quantised to, if they are.

    Raises InputError for a backend that is not known, or that cannot run here, with the reason.
    """
    if name not in ("auto", *NAMES):
        raise InputError(f"backend {name!r} is not known, expected auto, {' or '.join(NAMES)}")
    if name == "auto":
        name = "cpu" if _obstacle("cpu", device, dtype, form) is None else "sdpa"
    if obstacle := _obstacle(name, device, dtype, form):
        raise InputError(f"backend {name}: {obstacle}")
    if name != "triton":
        return BACKENDS[name]
    from minivlm.ops.triton import TRITON  # here, since Triton is not everywhere, and takes a second to import

    return TRITON


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, form: str | None) -> str | None:
    """Why a backend cannot run on this device with this type and these weights; None if it can."""
    if name == "cpu" and device.type != "cpu":
        return f"found device {device}, expected cpu"
    if name == "cpu" and (reason := cpu.lacks(dtype, form)) is not None:
        what = dtype if form is None else f"{dtype} with {form} weights"
        return f"no packed products of {what} ({reason}), expected another type or backend"
    return _triton_obstacle(device) if name == "triton" else None


def _triton_obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed, expected `pip install triton`, on Linux"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"{device} has compute capability {'.'.join(map(str, capability))}, expected 8.0 or more"
        if device.index is not None and device.index != torch.cuda.current_device():
            return f"found {device}, expected CUDA's current device, cuda:{torch.cuda.current_device()}"
        return None
    from minivlm.kernels.checks import interpreted

    if device.type == "cpu" and interpreted():
        return None
    return (
        f"found device {device}, expected cuda (on a CPU its kernels run only in Triton's interpreter, for tests: "
        "TRITON_INTERPRET=1 set before Python starts)"
    )
