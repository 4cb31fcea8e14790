"""Joined layers of a CPU, and which of their products are this project's kernels, see kernels/cpu/few_bits.py and, of
weights as stored or without AVX-512, single_row.py: where Numba is installed and the model is not small."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.kernels.cpu import few_bits, single_row
from minivlm.kernels.cpu.compact import BLOCK, Compact
from minivlm.kernels.cpu.few_bits import FewBitsLinear
from minivlm.kernels.cpu.single_row import MOST_INPUTS, RowLinear
from minivlm.ops import joined
from minivlm.ops.norms import RMSNorm

# Models whose layers have at most so many weights do without kernels: Numba takes a third of a second to load. Weights
# without a bias that are not quantised lie by columns there. In 16 bits one row's product is then the sum of the
# columns, weighted by the row, which is what embedding_bag computes, and a few rows have a bag each; oneDNN spends 15
# us on any product before it begins. Microseconds packed / as a vector / by columns, Intel with AMX, bfloat16: 256x256
# 24 / 25 / 7, 1536x256 54 / 56 / 34, 1024x1024 116 / 120 / 108, 2048x1024 215 / 240 / 271. In float32 it is MKL's
# product: the four of a layer of width 256 take 230 / 372 / 733 us for 2 / 8 / 32 rows where the weights lie by rows,
# and 164 / 243 / 491 by columns. Other processors were not measured.
SMALL = 2**19


class Group(joined.Group):
    """Layers of one input; what many rows are multiplied by is for others to say, in `several`."""

    small = False  # whether it belongs to a model that does without kernels
    form: str | None = None  # of its weight, as few_bits.py calls them; None as it was loaded

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__(layers)
        self._made: dict[tuple, FewBitsLinear | RowLinear | None] = {}  # kernels, by what they are for

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N_1 + N_2 + ..]"""
        refuse_gradients(x, *self.parameters())
        if x.shape[-1] != self.inputs:
            raise ValueError(f"linear layer of {self.inputs} inputs: found {list(x.shape)}")
        rows = x.numel() // self.inputs
        linear = self.kernel(x.dtype, rows)
        if linear is None:
            return self.several(x)
        return linear(x.reshape(*(rows,) * (rows > 1), self.inputs).contiguous()).view(*x.shape[:-1], sum(self.sizes))

    def several(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N_1 + N_2 + ..], for any number of rows."""
        raise NotImplementedError

    @property
    def by_rows(self) -> bool:
        """Whether its weight lies as it was loaded or quantised."""
        return not self.packed and self.weight.is_contiguous()

    @property
    def large(self) -> bool:
        """Whether it is to have kernels."""
        return self.by_rows and not self.small and self.bias is None

    def missing(self, dtype: torch.dtype) -> str | None:
        """Why there is no kernel for rows of a type."""
        few = self._missing_few_bits(dtype)
        if few is None or self.form in ("int4", "compact"):
            return few
        return single_row.missing_linear(dtype, self.form == "int8")

    def _missing_few_bits(self, dtype: torch.dtype) -> str | None:
        """Why there is none of few_bits.py."""
        if self.form is None:
            return "the weights are as stored"
        if self.form != "compact" and self.inputs % BLOCK:
            return f"{self.inputs} inputs are no multiple of {BLOCK}"
        return few_bits.missing(dtype, self.form)

    def kernel(
        self, dtype: torch.dtype, rows: int, norm: RMSNorm | None = None, swiglu: bool = False
    ) -> FewBitsLinear | RowLinear | None:
        """For so many rows of a type, perhaps of their norm, perhaps through SwiGLU; None where there is none."""
        key = dtype, norm, swiglu
        if key not in self._made:
            self._made[key] = self._make(*key)
        linear = self._made[key]
        return linear if linear is not None and 0 < rows <= linear.most_rows else None

    def _make(self, dtype: torch.dtype, norm: RMSNorm | None, swiglu: bool) -> FewBitsLinear | RowLinear | None:
        too_wide = self.form == "int8" and self.inputs > MOST_INPUTS
        if not self.large or too_wide or self.missing(dtype) is not None:
            return None
        around = (None, 0.0) if norm is None else (norm.weight.detach(), norm.eps)
        linear = FewBitsLinear if self._missing_few_bits(dtype) is None else RowLinear
        return linear(self.kept, self.scale, *around, swiglu, dtype)

    @property
    def kept(self) -> Compact | Tensor:
        """The weight as kernels take it."""
        return self.weight.detach()


def without_kernels(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why single rows do without kernels in a model that is to have them; None if they have them, or are not to."""
    groups = (module for module in model.modules() if isinstance(module, Group) and module.large)
    return next((group.missing(dtype) for group in groups), None)


def refuse_gradients(*tensors: Tensor) -> None:
    """Raises InputError for tensors that a backward pass would want to come to."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise InputError("backend cpu: its joined weights have no gradients, expected sdpa or reference to train")
