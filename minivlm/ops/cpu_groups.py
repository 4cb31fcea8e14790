"""Joined layers of a CPU, and which of their products of few rows are this project's kernels, see
kernels/cpu/few_rows.py and, of weights as stored or without AVX-512, single_row.py: where Numba is installed and the
model is not small."""

import torch
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.kernels.cpu import few_rows, single_row
from minivlm.kernels.cpu.compact import BLOCK
from minivlm.kernels.cpu.few_rows import MOST_ROWS, FewRowsLinear
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
    form: str | None = None  # of its weight, as few_rows.py calls them; None as it was loaded

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N_1 + N_2 + ..]"""
        refuse_gradients(x, *self.parameters())
        if x.shape[-1] != self.inputs:
            raise ValueError(f"linear layer of {self.inputs} inputs: found {list(x.shape)}")
        rows = x.numel() // self.inputs
        linear = self._alone(x.dtype) if 0 < rows <= MOST_ROWS else None
        if linear is None or rows > linear.most_rows:
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
        few = "the weights are as stored" if self.form is None else few_rows.missing(dtype, self.form)
        if few is None and self.inputs % BLOCK == 0:
            return None
        return single_row.missing_linear(dtype, self.form == "int8") if self.form != "int4" else few

    def row_linear(
        self, dtype: torch.dtype, norm: RMSNorm | None = None, swiglu: bool = False
    ) -> FewRowsLinear | RowLinear | None:
        """The kernel for single rows of a type, or for a few; None where there is none for this group."""
        too_wide = self.form == "int8" and self.inputs > MOST_INPUTS
        if not self.large or too_wide or self.missing(dtype) is not None:
            return None
        around = (None, 0.0) if norm is None else (norm.weight.detach(), norm.eps)
        few = self.form is not None and self.inputs % BLOCK == 0 and few_rows.missing(dtype, self.form) is None
        return (FewRowsLinear if few else RowLinear)(self.weight.detach(), self.scale, *around, swiglu, dtype)

    def _alone(self, dtype: torch.dtype) -> FewRowsLinear | RowLinear | None:
        """`row_linear` without what may surround the product, made once."""
        made = self._made
        if made is None or made[0] != dtype:
            self._made = made = dtype, self.row_linear(dtype)
        return made[1]

    _made: tuple[torch.dtype, FewRowsLinear | RowLinear | None] | None = None


def without_kernels(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why single rows do without kernels in a model that is to have them; None if they have them, or are not to."""
    groups = (module for module in model.modules() if isinstance(module, Group) and module.large)
    return next((group.missing(dtype) for group in groups), None)


def refuse_gradients(*tensors: Tensor) -> None:
    """Raises InputError for tensors that a backward pass would want to come to."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise InputError("backend cpu: its joined weights have no gradients, expected sdpa or reference to train")
