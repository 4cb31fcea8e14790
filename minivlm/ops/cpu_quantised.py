"""Products with quantised weights on a CPU, for the backend `cpu`: joined layers of one input.

- int8: the activations are quantised too, each row of them to 127 steps of its own largest value, when they come; the
  product is of integers, exact, and then scaled. So a row's result depends on the rows beside it by rounding alone,
  which may take a number that lies between two steps to either. The weights lie as they were made, and of few rows are
  the left factor, as in cpu_products.py.
- int4: only the weights. Few rows go through PyTorch's product of packed nibbles, more through the weight widened for
  the moment, which is faster then.

Where this project's kernels can run they take the place of both: of all rows with AMX, of few without, see
cpu_groups.py.

The operators are private to PyTorch, so `missing_quantised` tries them before weights are quantised for them.
"""

from collections.abc import Sequence
from functools import cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear, pad

from minivlm.kernels.cpu import few_bits
from minivlm.kernels.cpu.few_bits import INT4, INT8
from minivlm.kernels.cpu.single_row import LEAST_STEP
from minivlm.kernels.quantise import GROUP, HALF, quantise_int4, quantise_int8
from minivlm.ops import cpu_groups
from minivlm.ops.cpu_compact import WidenedGroup
from minivlm.ops.cpu_shapes import of_rounded
from minivlm.ops.quantised import QuantisedLinear, widened

FEW = 16
BLOCK, LANES = 64, 16  # rows that PyTorch packs together
# Most rows by which int8 weights are multiplied as the left factor. Microseconds of 5632x1024, weights as the left /
# the right one: 8 rows 800 / 1083, 32 rows 887 / 1351; 64 rows with what follows 1994 / 1671.
ACROSS = 32
# Most rows at once: the sums, of 32 bits, stay in the caches for what follows. 1,000 rows take 23.8 ms, 30.8 at once.
PIECE = 256


@cache
def missing_quantised(form: str, dtype: torch.dtype) -> str | None:
    """What this PyTorch or processor lacks for products of weights of a format with activations of `dtype`; None if
    they work, which is tried with one row, a few and many."""
    rows = torch.arange(BLOCK, device="cpu")
    weight = ((rows[:, None] + torch.arange(GROUP, device="cpu")) % 16 - 8).float()  # [V, D], whole numbers
    layer = QuantisedLinear(*(quantise_int8 if form == "int8" else quantise_int4)(weight.to(dtype)))
    expected = 127 * widened(layer.weight, layer.scale, torch.float32).T  # [D, V]
    x = 127 * torch.eye(GROUP, dtype=dtype, device="cpu")
    try:
        product = quantised_group([layer], small=True).several
        found = torch.cat([product(x[:1]), product(x[1:FEW]), product(x)[FEW:]]).float()
    except (AttributeError, RuntimeError) as error:  # no such operator; no kernel for this type on this processor
        return " ".join(str(error).split())
    wrong = (found - expected).abs().max()
    return None if wrong <= expected.max() / 100 else f"its products are inexact here, wrong by {wrong:g}"


def quantised_group(layers: Sequence[QuantisedLinear], small: bool) -> cpu_groups.Group:
    """Layers of one input as one product; those of a small model do without kernels."""
    if layers[0].weight.dtype == torch.int8:
        return Int8Group(layers)
    by_kernels = not small and few_bits.missing(layers[0].scale.dtype, INT4) is None
    return Int4Group(layers) if by_kernels else PackedInt4Group(layers)


class Int8Group(cpu_groups.Group):
    """weight: int8 [N, K]; scale: float32 [N]."""

    form = INT8

    def several(self, x: Tensor) -> Tensor:
        pieces = x.reshape(-1, self.inputs).split(PIECE)
        out = torch.cat([of_rounded(self._product, piece) for piece in pieces])
        return out.view(*x.shape[:-1], sum(self.sizes))

    def _product(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1).float().div_(127).clamp_(min=LEAST_STEP)  # [S]
        steps = (x / step[:, None]).round_().to(torch.int8)
        if len(x) <= ACROSS:
            sums = torch._int_mm(self.weight, steps.t())  # [N, S]
            return (sums * self.scale[:, None]).mul_(step).t().to(x.dtype)
        sums = torch._int_mm(steps, self.weight.t())  # [S, N]
        return (sums * self.scale).mul_(step[:, None]).to(x.dtype)


class Int4Group(WidenedGroup):
    """weight: uint8 [N, K / 2] as in kernels/quantise.py; scale: float32 [N, K / 128]."""

    form = INT4

    def __init__(self, layers: Sequence[QuantisedLinear]):
        super().__init__(layers)
        self.scale = self.scale.float()

    def rows_of(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        return few_bits.widened_int4(self.weight, self.scale, first, end, dtype)


class PackedInt4Group(cpu_groups.Group):
    """weight and scale: in the order that PyTorch's product reads."""

    packed = True

    def __init__(self, layers: Sequence[QuantisedLinear]):
        super().__init__(layers)
        self.weight, self.scale = _packed_nibbles(self.weight), _scales(self.scale)

    def several(self, x: Tensor) -> Tensor:
        return of_rounded(self._product, x.reshape(-1, self.inputs)).view(*x.shape[:-1], sum(self.sizes))

    def _product(self, x: Tensor) -> Tensor:
        if len(x) > FEW:
            return linear(x, self._widened(x.dtype))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, GROUP, self.scale)[:, : sum(self.sizes)]

    def _widened(self, dtype: torch.dtype) -> Tensor:
        """[N, K], unpacked."""
        halves = torch.stack((self.weight & 15, self.weight >> 4)).view(2, -1, self.inputs, 2, LANES)
        steps = rearrange(halves, "half block k pair lane -> (block half pair lane) k").to(dtype).sub_(8)  # [N, K]
        scale = self.scale[:, :, 0].T  # [N, K / 128]
        return steps.unflatten(-1, (-1, GROUP)).mul_(scale[:, :, None]).flatten(1)[: sum(self.sizes)]


def _packed_nibbles(packed: Tensor) -> Tensor:
    """From the order of kernels/quantise.py, uint8 [N, K / 2], to PyTorch's, which is by blocks of 64 rows: of the 32
    bytes of an input, byte 16 p + l holds row 16 p + l in its low half and row 32 + 16 p + l in its high half."""
    bytes_ = packed.unflatten(-1, (-1, HALF))
    steps = torch.cat((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1)  # [N, K]
    steps = pad(steps, (0, 0, 0, -len(steps) % BLOCK))
    pieces = [piece.int() for piece in steps.split(64 * BLOCK)]
    return torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(piece, 1) for piece in pieces])


def _scales(scale: Tensor) -> Tensor:
    """[N, K / 128] -> scales and offsets as PyTorch reads them, [K / 128, N, 2]; the grid has no offsets."""
    scale = pad(scale, (0, 0, 0, -len(scale) % BLOCK))
    return torch.stack((scale.T, torch.zeros_like(scale.T)), dim=-1).contiguous()
