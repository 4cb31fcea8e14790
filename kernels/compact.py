"""Weights in fewer bits, bit for bit the same numbers: 12 for a bfloat16, 28 for a float32, 12 if it was published as a
bfloat16. And the product of few rows with such a weight on a CPU, where reading the weight is what takes the time.

A bfloat16 is a byte of sign and exponent over a byte that ends the exponent and has the fraction. The upper bytes of a
trained matrix take few values: it has positive and negative numbers of a few magnitudes, none of 2^90. So an upper byte
is kept as its place, 4 bits, in a table of the 15 most frequent and 0, the lower one as it is:

    0.0123 = 0x3C4A   upper 0x3C, place 7 of the table    lower 0x4A
    0              upper 0x00, place 0, in every table  lower 0x00

Of normal numbers 1 in 7,000 is so small that its upper byte is in no table. It is kept whole, with its column, and is 0
where it was. A float32 is a bfloat16 over 16 more bits, which are kept as they are, or not at all where all are 0.

Shapes:     weight [N, K]; rows [B, K] -> [B, N]; with swiglu the weight is [gate | up], and the result [B, N / 2].
Dtypes:     float32, bfloat16. Sums are in float32; what the plain forms round on the way is rounded.
Bytes:      3 / 2 N K, or 7 / 2 N K for float32, once for up to eight rows. K is filled up to a multiple of 128.
Operations: 2 B N K, and for 64 weights 9 instructions of AVX-512 that put them together.

The compiled forms are in compact_numba.py.
"""

from functools import cache
from types import ModuleType
from typing import NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear

from minivlm.kernels import single_row
from minivlm.kernels.single_row import difference, finished, normalised, reason_of, require, require_like

BLOCK = 128  # weights of a row whose places lie together: 64 in the low halves of 64 bytes, 64 in the high halves
DTYPES = (torch.float32, torch.bfloat16)
MOST_ROWS = 8  # that are multiplied at a time
WHOLE = 2**-8  # the largest share of weights that may be kept whole
SAMPLED = 64  # rows of which the upper bytes are counted


@cache
def compiled() -> ModuleType:
    """The compiled forms, which take a third of a second to import."""
    from minivlm.kernels import compact_numba

    return compact_numba


class Compact(NamedTuple):
    """A weight [N, K] in fewer bits, in rows of P numbers, a multiple of BLOCK; those behind K are 0.

    lower: uint8 [N, P], lower bytes, in the order of `ordered`. places: uint8 [N, P / 2], the places of their upper
    bytes, two to a byte; table: uint8 [16], the upper byte of each place. rest: int16 [N, P], what a float32 has below
    a bfloat16, in the weight's order; None where that is 0.
    starts: int32 [N + 1]; of row n columns [starts[n] : starts[n + 1]], int32, are kept whole, and hold `values`,
    float32.
    inputs, dtype: K, and the weight's type.
    """

    lower: Tensor
    places: Tensor
    table: Tensor
    rest: Tensor | None
    starts: Tensor
    columns: Tensor
    values: Tensor
    inputs: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """weight [N, K] of DTYPES, contiguous, on a CPU; None if too many of its upper bytes are rare."""
        require(weight.dim() == 2 and weight.dtype in DTYPES, f"a weight of {weight.dtype} {list(weight.shape)}")
        require_like(weight, weight.shape, weight.dtype)
        table = _frequent(weight)
        packed = compiled().pack(weight, table, int(weight.numel() * WHOLE))
        return None if packed is None else cls(*packed[:2], table, *packed[2:], weight.shape[1], weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return len(self.lower), self.inputs

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(tensor.nbytes for tensor in self if isinstance(tensor, Tensor))

    def expanded(self, first: int = 0, end: int | None = None) -> Tensor:
        """Rows of the weight as they were, [end - first, K]."""
        end = self.shape[0] if end is None else end
        require(0 <= first <= end <= self.shape[0], f"rows {first} to {end} of {self.shape[0]}")
        return compiled().expand(self, first, end)

    def plain(self) -> Tensor:
        """All of the weight as it was, in PyTorch."""
        places = rearrange(self.places, "n (block byte) -> n block byte", byte=BLOCK // 2)
        places = torch.stack((places & 15, places >> 4), dim=2).flatten(1)  # [N, K]
        bits = self.table.int()[places.int()] << 24 | self.lower.int() << 16
        bits = rearrange(bits, ORDERED, **LANES)
        if self.rest is not None:
            bits |= self.rest.int() & 0xFFFF
        weight = bits.view(torch.float32)[:, : self.inputs].contiguous()
        rows = torch.repeat_interleave(self.starts.diff())
        weight[rows, self.columns.long()] = self.values
        return weight.to(self.dtype)


# Where a number of 64 lies: AVX-512 interleaves the upper and lower bytes of eight numbers in each of four lanes of 16,
# which gives pairs, of which it then takes the even ones, and the odd ones. So a vector of 16 numbers one behind the
# other begins as every second byte of one half of each lane.
ORDERED = "n (more lane half pair parity) -> n (more half parity lane pair)"
LANES = {"lane": 4, "half": 2, "pair": 4, "parity": 2}


def ordered() -> Tensor:
    """Which of 64 numbers each of the 64 bytes belongs to."""
    places = rearrange(torch.arange(64, device="cpu")[None], ORDERED, **LANES)[0]  # the byte of each number
    return places.argsort()


def _frequent(weight: Tensor) -> Tensor:
    """uint8 [16]: 0, and the most frequent other upper bytes of some of the rows."""
    some = weight[:: max(1, len(weight) // SAMPLED)].contiguous().view(torch.uint8)
    counts = torch.bincount(some.flatten()[weight.itemsize - 1 :: weight.itemsize], minlength=256)
    counts[0] = counts.sum() + 1
    return counts.topk(16).indices.to(torch.uint8)


@cache
def missing(dtype: torch.dtype) -> str | None:
    """Why weights of a type cannot be kept so here; None if a small one is what it was, and its product right."""

    def trial() -> str | None:
        bits = torch.arange(20 * BLOCK, dtype=torch.int32, device="cpu").view(20, BLOCK) % 977
        weight = (bits * 2.0**-12 * (-1.0) ** bits).to(dtype)
        weight[3, 5] = 2.0**-90  # which is kept whole
        if dtype == torch.float32:
            weight[4, 7] += 2.0**-20  # a rest
        compact = Compact.of(weight)
        if compact is None or not torch.equal(compact.expanded(), weight) or not torch.equal(compact.plain(), weight):
            return "its weights are not what they were"
        product, x = CompactLinear(compact, None, 0, False), weight[:3] * 8
        return difference(product(x), product.plain(x))

    if dtype not in DTYPES:
        return f"there is no such form of {dtype}"
    if not torch.cpu._is_avx512_supported():
        return "the processor has no AVX-512"
    return single_row.missing() or reason_of(trial)


class CompactLinear:
    """The product of up to MOST_ROWS rows with a compact weight, perhaps of their RMSNorm, perhaps through SwiGLU.

    Args:
        weight: [N, K]; with swiglu [gate | up] one above the other. Rows have its type.
        norm: the weight [K] of an RMSNorm, or None; eps is its epsilon.
        swiglu: the result is silu(gate x) * (up x), [.., N / 2].
    """

    def __init__(self, weight: Compact, norm: Tensor | None, eps: float, swiglu: bool):
        (rows, self.inputs), self.dtype = weight.shape, weight.dtype
        if norm is not None:
            require_like(norm, (self.inputs,), self.dtype)
        require(not swiglu or rows % 2 == 0, f"swiglu of {rows} rows")
        self.weight, self.norm, self.eps, self.swiglu, self.outputs = weight, norm, eps, swiglu, rows // (1 + swiglu)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [K] or [B, K], and what the result is added to, or None -> [N] or [B, N]."""
        shape = (*x.shape[:-1], self.inputs)
        require_like(x, shape, self.dtype)
        rows = x.numel() // self.inputs
        require(x.dim() <= 2 and 0 < rows <= MOST_ROWS, f"{list(x.shape)}, expected 1 to {MOST_ROWS} rows")
        out = x.new_empty(*shape[:-1], self.outputs)
        if residual is not None:
            require_like(residual, out.shape, self.dtype)
        return compiled().multiply(self, x, rows, residual, out)

    def plain(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same in PyTorch."""
        product = linear(normalised(x, self.norm, self.eps), self.weight.plain())
        return finished(product, self.swiglu, residual)
