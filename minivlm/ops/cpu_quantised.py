"""Products with quantised weights on a CPU, for the backend `cpu`: joined layers of one input, their weights packed.

- int8: the activations are quantised too, each row of them to 127 steps of its own largest value, when they come; the
  product is of integers, exact, and then scaled. So a row's result depends on the rows beside it by rounding alone,
  which may take a number that lies between two steps to either.
- int4: only the weights. Up to FEW rows go through PyTorch's product of packed nibbles, more through the weight
  widened for the moment, which is faster then.

Both operators are private to PyTorch, so `missing_quantised` tries them before weights are packed for them.
"""

from collections.abc import Sequence
from functools import cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear, pad

from minivlm.kernels.quantise import GROUP, HALF, quantise_int4, quantise_int8
from minivlm.ops.cpu_shapes import of_rounded
from minivlm.ops.joined import Group
from minivlm.ops.quantised import QuantisedLinear, widened

FEW = 16
BLOCK, LANES = 64, 16  # rows that PyTorch packs together
# A single row by int8 weights of at most 256 rows, or of just 256 columns, is computed by oneDNN 3.12's reference code,
# as its own report says: 13 ms for 1536x256. Beside rows of zeros, of which `of_rounded` makes seven, it takes 0.05.
NARROW = 256
TINY = 1e-30  # the least step of a row, whose numbers may all be 0


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
        group = QuantisedGroup([layer])
        found = torch.cat([group(x[:1]), group(x[1:FEW]), group(x)[FEW:]]).float()
    except (AttributeError, RuntimeError) as error:  # no such operator; no kernel for this type on this processor
        return " ".join(str(error).split())
    wrong = (found - expected).abs().max()
    return None if wrong <= expected.max() / 100 else f"its products are wrong by {wrong:g}"


class QuantisedGroup(Group):
    """Layers of one input as one product, its weight and scale in the order that the product reads."""

    packed = True

    def __init__(self, layers: Sequence[QuantisedLinear]):
        super().__init__(layers)
        if self.weight.dtype == torch.int8:
            self.form, self.weight = "int8", torch.ops.onednn.qlinear_prepack(self.weight, None)
            self.zeros = torch.zeros(len(self.scale), dtype=torch.int32, device="cpu")  # the grid is symmetric
            self.single = len(self.scale) > NARROW and self.inputs != NARROW
        else:
            self.form, self.weight, self.scale = "int4", _packed_nibbles(self.weight), _scales(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N_1 + N_2 + ..]."""
        rows = x.reshape(-1, self.inputs)
        if self.form == "int4":
            out = of_rounded(self._by_4_bits, rows)
        elif len(rows) == 1 and not self.single:
            out = of_rounded(self._by_8_bits, pad(rows, (0, 0, 0, 1)))[:1]
        else:
            out = of_rounded(self._by_8_bits, rows)
        return out.view(*x.shape[:-1], -1)

    def _by_8_bits(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            step = x.abs().amax(-1, keepdim=True).float().div_(127).clamp_(min=TINY)  # [S, 1]
            steps = (x / step).round_().to(torch.int8)
            return self._integers(steps, 1.0, torch.float32).mul_(step).to(x.dtype)
        step = max(x.abs().amax().item() / 127, TINY)  # the same in fewer operators
        steps = (x.float() * (1 / step)).round_().to(torch.int8)
        if x.dtype == torch.float16:  # which PyTorch 2.8's product does not return
            return self._integers(steps, step, torch.float32).to(x.dtype)
        return self._integers(steps, step, x.dtype)

    def _integers(self, steps: Tensor, step: float, dtype: torch.dtype) -> Tensor:
        """The product of whole numbers [S, K], times the weights' scales and the activations' step."""
        return torch.ops.onednn.qlinear_pointwise(
            steps, step, 0, self.weight, self.scale, self.zeros, None, 1.0, 0, dtype, "none", [], ""
        )

    def _by_4_bits(self, x: Tensor) -> Tensor:
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
