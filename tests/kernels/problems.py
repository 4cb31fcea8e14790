"""Attention problems for kernels and their twins: what each query sees, where keys lie, and when a result is good."""

import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# What one query sees: the keys j < prefix, and those with lo <= j < hi.
Sight = tuple[int, int, int]


def causal(n: int, start: int = 0, window: int | None = None) -> list[Sight]:
    """n queries after `start` earlier keys; with a window, each sees that many keys, itself included."""
    positions = range(start, start + n)
    return [(0 if window is None else max(0, p + 1 - window), p + 1, 0) for p in positions]


def everything(n: int) -> list[Sight]:
    return [(0, n, 0)] * n


def open_prefix(n: int, prefix: int) -> list[Sight]:
    """The first `prefix` positions see one another; the others their past (PaliGemma)."""
    return [(0, max(prefix, p + 1), 0) for p in range(n)]


def segments(prefix: int, *lengths: int) -> list[Sight]:
    """A causal prefix, and behind it segments that see it and themselves."""
    seen, begin = causal(prefix), prefix
    for n in lengths:
        seen += [(begin, begin + i + 1, prefix) for i in range(n)]
        begin += n
    return seen


def drawn(n: int, keys: int, seed: int) -> list[Sight]:
    """Any intervals, one in five of them empty, and now and then a prefix."""
    draw = random.Random(seed)
    seen = []
    for _ in range(n):
        lo, hi = sorted((draw.randint(0, keys), draw.randint(0, keys)))
        prefix = draw.choice((0, 0, draw.randint(0, keys)))
        seen.append((hi, lo, prefix) if draw.random() < 0.2 else (lo, hi, prefix))
    return seen


@dataclass(frozen=True)
class Problem:
    """The arguments of `attention_prefill`. What no query may read is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    lo: Tensor
    hi: Tensor
    prefix: Tensor | None
    offsets: Tensor
    slots: Tensor
    origins: Tensor
    longest: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "Problem":
        """The same numbers elsewhere, with the same strides; q, k and v in another dtype."""
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in vars(self).values()]
        return Problem(*(x.to(dtype) for x in moved[:3]), *moved[3:])

    def arguments(self, device: torch.device, dtype: torch.dtype) -> tuple:
        """What `attention_prefill` is called with there."""
        return tuple(vars(self.to(device, dtype)).values())


def values(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
    """Normal numbers that bfloat16 and float16 hold exactly, so that every dtype computes the same problem."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread
    return drawn.bfloat16().half().float()


def problem(
    rows: list[list[Sight]], heads: int, kv_heads: int, channels: int, packed: bool = False, spread: float = 1.0
) -> Problem:
    """Random q, k and v for rows of queries; keys in a slot of a cache each, or packed one row behind the other.

    q is cut out of a fused projection, and a cache's slots are longer than needed and in no order: nothing is
    contiguous but the channels.
    """
    counts = [len(row) for row in rows]
    held = [max([0, *(max(hi, prefix) for _, hi, prefix in row)]) for row in rows]
    total = sum(counts)
    fused = values(total, heads + 2 * kv_heads, channels, seed=1, spread=spread)
    if packed:
        slots, origins = [0] * len(rows), [sum(held[:i]) for i in range(len(rows))]
        k, v = (torch.full((1, sum(held), kv_heads, channels), torch.nan).transpose(1, 2) for _ in "kv")
    else:
        slots, origins = random.Random(7).sample(range(len(rows) + 2), len(rows)), [0] * len(rows)
        k, v = (torch.full((len(rows) + 2, kv_heads, max(held) + 3, channels), torch.nan) for _ in "kv")
    for row, (slot, origin, n) in enumerate(zip(slots, origins, held, strict=True)):
        for part, x in enumerate((k, v)):
            x[slot, :, origin : origin + n] = values(kv_heads, n, channels, seed=10 + 2 * row + part)
            unseen = min([n, *(0 if prefix else lo for lo, hi, prefix in rows[row] if lo < hi or prefix)])
            x[slot, :, origin : origin + unseen] = torch.nan
    seen = torch.tensor([sight for row in rows for sight in row], dtype=torch.int32).reshape(-1, 3)
    lo, hi, prefix = (column.contiguous() for column in seen.unbind(1))
    offsets = [sum(counts[:i]) for i in range(len(rows) + 1)]
    tables = (torch.tensor(x, dtype=torch.int32) for x in (offsets, slots, origins))
    return Problem(fused[:, :heads], k, v, lo, hi, prefix if prefix.any() else None, *tables, max(counts))


def scattered(x: Tensor) -> Tensor:
    """The same values in memory of twice the size along every axis, the axes in reverse order, NaN between them."""
    wide = x.new_full([2 * n for n in reversed(x.shape)], torch.nan)
    view = wide[(slice(None, None, 2),) * x.dim()].permute(*reversed(range(x.dim())))
    return view.copy_(x)


@contextmanager
def poisoned_memory():
    """Memory that PyTorch hands out is NaN (integers: the greatest), so nothing passes that was never written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The kernel's error is at most twice that of plain PyTorch in the same dtype, beside a few roundings in float32.

    The two of them round in different places: where plain PyTorch happens to be exact, as for a row of one key, the
    kernel may be off by the last bit of a float32.
    """
    assert found.shape == plain.shape == exact.shape and found.dtype == plain.dtype and found.is_contiguous()
    assert exact.isfinite().all()
    found, plain, exact = (x.double().cpu() for x in (found, plain, exact))
    allowed = 2 * (plain - exact).abs().max() + 2**-22 * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


def check_kernel(
    kernel: Callable, twin: Callable, arguments: Callable[[torch.device, torch.dtype], tuple], device, dtype
):
    """`check` for a kernel and its twin; the exact answer is the twin's in float64."""
    exact = twin(*arguments(torch.device("cpu"), torch.float64))
    plain = twin(*arguments(device, dtype))
    with poisoned_memory():
        found = kernel(*arguments(device, dtype))
    check(found, plain, exact)
