"""Joined layers of a CPU with their weights in fewer bits, the same numbers, see kernels/cpu/compact.py: a step reads
three quarters of the bytes, and the model takes three quarters of the memory.

This project's kernels multiply by it; where they lack AMX, more than a few rows by the library, the weight widened a
piece at a time.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from minivlm.kernels.cpu import few_bits
from minivlm.kernels.cpu.compact import Compact
from minivlm.ops import cpu_groups
from minivlm.ops.cpu_groups import refuse_gradients
from minivlm.ops.cpu_products import MANY, product, shaped

WORTH = 0.95  # the largest share of the bytes as stored; short rows are filled up to 128 numbers
PIECE = 2**22  # numbers of a weight that are widened at a time: fewer, and the calls cost more than the caches save


def compact_group(linears: Sequence[nn.Linear]) -> "CompactGroup | None":
    """Layers of one input without biases as one product; None if their weights are not for this."""
    if linears[0].weight.device.type != "cpu" or few_bits.missing(linears[0].weight.dtype, "compact") is not None:
        return None
    group = CompactGroup(linears)
    weight, group.weight = group.weight.detach().contiguous(), None
    compact = Compact.of(weight)
    if compact is None or compact.nbytes > WORTH * weight.nbytes:
        return None
    group.keep(compact)
    return group


class WidenedGroup(cpu_groups.Group):
    """Layers whose weight is widened, a piece at a time, for the products of many rows."""

    def rows_of(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows of the weight in a type, [end - first, K]."""
        raise NotImplementedError

    def several(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs)
        return self._product(shaped(rows), 0, sum(self.sizes))[: len(rows)].view(*x.shape[:-1], sum(self.sizes))

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The layers' results one by one, of many rows each whole in memory."""
        if x.numel() <= MANY * self.inputs:
            return super().parts(x)
        refuse_gradients(x)
        rows = x.reshape(-1, self.inputs)
        more = shaped(rows)
        found = [self._product(more, *ends)[: len(rows)] for ends in pairwise(accumulate(self.sizes, initial=0))]
        return tuple(part.view(*x.shape[:-1], part.shape[1]) for part in found)

    def _product(self, x: Tensor, first: int, end: int) -> Tensor:
        """x [S, K] by rows of the weight -> [S, end - first]."""
        out, step = x.new_empty(len(x), end - first), max(1, PIECE // self.inputs)
        for at in range(first, end, step):
            weight = self.rows_of(at, min(at + step, end), x.dtype)
            place = out[:, at - first : at - first + len(weight)]
            if len(x) > MANY:
                torch.mm(x, weight.t(), out=place)
            else:
                place.copy_(product(x, weight, None))
        return out


class CompactGroup(WidenedGroup):
    """compact: the weight [N_1 + N_2 + .., K]."""

    packed, form, large = True, "compact", True
    compact: Compact

    def keep(self, compact: Compact) -> None:
        """Take a weight; its parts are buffers, so that they count as the model's."""
        self.compact = compact
        for name, part in compact._asdict().items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part, persistent=False)

    @property
    def kept_bytes(self) -> int:
        return self.compact.nbytes

    def whole(self) -> Tensor:
        return self.compact.expanded()

    @property
    def kept(self) -> Compact:
        return self.compact

    def rows_of(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        return self.compact.expanded(first, end).to(dtype)
