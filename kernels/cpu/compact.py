"""Weights in fewer bits, bit for bit the same numbers: 12 for a bfloat16, 28 for a float32, 12 if it was published as a
bfloat16; a NaN stays one. Reading weights is what takes the time of a step, see few_bits.py.

A bfloat16 is a byte of sign and exponent over a byte that ends the exponent and has the fraction. The upper bytes of a
trained matrix take few values: it has positive and negative numbers of a few magnitudes, none of 2^90. So an upper byte
is kept as its place, 4 bits, in a table of the 15 most frequent and 0, the lower one as it is:

    0.0123 = 0x3C4A   upper 0x3C, place 7 of the table    lower 0x4A
    0              upper 0x00, place 0, in every table  lower 0x00

Of normal numbers 1 in 7,000 is so small that its upper byte is in no table. It is kept whole, with its column, and is 0
where it was. A float32 is a bfloat16 over 16 more bits, which are kept as they are, or not at all where all are 0.

Shapes:     weight [N, K], of which each row is filled up to a multiple of 128 numbers.
Dtypes:     float32, bfloat16.
Bytes:      3 / 2 N K, or 7 / 2 N K for float32, and 8 for each weight that is kept whole.
Limits:     contiguous, on a CPU with AVX-512.

The compiled forms are in compact_numba.py.
"""

from functools import cache
from types import ModuleType
from typing import NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor

from minivlm.kernels.cpu.single_row import require, require_like

BLOCK = 128  # weights of a row whose places lie together: 64 in the low halves of 64 bytes, 64 in the high halves
DTYPES = (torch.float32, torch.bfloat16)
WHOLE = 2**-8  # the largest share of weights that may be kept whole
SAMPLED = 64  # rows of which the upper bytes are counted


@cache
def compiled() -> ModuleType:
    """The compiled forms, which take a third of a second to import."""
    from minivlm.kernels.cpu import compact_numba

    return compact_numba


class Compact(NamedTuple):
    """A weight [N, K] in fewer bits, in rows of P numbers, a multiple of BLOCK; those behind K are 0.

    lower: uint8 [N, P], lower bytes, in the order of `ordered`. places: uint8 [N, P / 2], the places of their upper
    bytes, two to a byte; table: uint8 [16], the upper byte of each place. rest: int16 [N, P], what a float32 has below
    a bfloat16, in the weight's order; None where no number has any.
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
        places = torch.stack((places & 15, places >> 4), dim=2).flatten(1)  # [N, P]
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
