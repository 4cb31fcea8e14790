"""Products with weights that are not packed, on a CPU: the fastest form for each number of rows.

    one row     weight @ x as matrix times vector
    a few       weight @ x^T: the libraries multiply a left factor as it lies, but copy a right one into another order,
                and of few rows the weight is by far the larger one
    more        x @ weight^T

Small weights lie by columns, see `SMALL` in cpu_groups.py, and any number of rows is multiplied by those.

Microseconds of 7168x1024, one thread of an Intel with AMX, the weights not in its caches, x @ weight^T / weight @ x^T
and transposed: bfloat16, which one row reads in 1,200: 8 rows 1735 / 1348, 64 rows 2649 / 1977, 160 rows 3396 / 4482;
without transposing 160 rows take 2401, so `mlp_across` does not. float32, one row 1,950: 3 rows 2341 / 4061, 5 rows
4625 / 4264, 8 rows 6222 / 3995, 32 rows 6743 / 5360. In float16 it is no faster.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from minivlm.ops.cpu_shapes import of_rounded, padded

MANY = 64  # rows beyond which weights are multiplied layer by layer, and not all of a group at once
# Numbers of rows for which the weight is the left factor, in a product and in the gated MLP.
ACROSS = {torch.bfloat16: range(2, MANY + 1), torch.float32: range(5, 49)}
MLP_ACROSS = {torch.bfloat16: range(2, 513), torch.float32: range(5, 49)}
# Most rows that have a bag of the columns each. Microseconds of the products of a layer of width 256 in bfloat16, by
# bags / by oneDNN: 2 rows 143 / 235, 4 rows 191 / 224, 8 rows 288 / 227.
BAGS = 4


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., K] by a weight [N, K] -> [.., N]."""
    rows, (outputs, inputs) = x.numel() // x.shape[-1], weight.shape
    if rows > MANY:
        return many_rows(x, weight, bias)
    found = of_rows(weight, bias)(x.reshape(-1) if rows == 1 else x.reshape(rows, inputs))
    return found.view(*x.shape[:-1], outputs)


def many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as x @ weight^T."""
    out = linear(shaped(x), weight, bias)
    return out[: len(x)] if x.dim() == 2 else out


def of_rows(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The fastest product of few rows with a weight [N, K]: a function of [K] or [B, K]."""
    if bias is None and weight.t().is_contiguous():
        return partial(_by_columns, weight.t())
    if weight.dtype == torch.float16:  # as a vector it is slower
        return lambda x: many_rows(x, weight, bias)
    vector, across = torch.mv if bias is None else partial(torch.addmv, bias), ACROSS.get(weight.dtype, ())

    def multiplied(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return vector(weight, x)
        if len(x) not in across:
            return many_rows(x, weight, bias)
        columns = shaped(x).t()
        out = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
        return out[:, : len(x)].t().contiguous()

    return multiplied


def mlp_across(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down @ (silu(gate @ x^T) * (up @ x^T)) of normalised rows x [B, D] -> [B, D], not contiguous: what is between
    stays [F, B], and only the result is seen as rows again."""
    columns = shaped(x).t()
    gated = silu(torch.mm(gate, columns), inplace=True).mul_(torch.mm(up, columns))
    return torch.mm(down, gated).t()[: len(x)]


def shaped(x: Tensor) -> Tensor:
    """Rows x [S, K] as the library should get them: of 16 bits a rounded number, see cpu_shapes.py. In float32 plain
    products are not oneDNN's, and any number will do."""
    return x if x.dtype == torch.float32 else padded(x)


def _by_columns(columns: Tensor, x: Tensor) -> Tensor:
    """x [K] or [B, K] by columns [K, N]; `embedding_bag` has one bag for each row."""
    rows = x.numel() // len(columns)
    if columns.dtype.itemsize > 2:
        return torch.matmul(x, columns)
    if rows > BAGS:
        return of_rounded(lambda x: torch.matmul(x, columns), x)
    every, first = _bags(rows, len(columns))
    out = torch.embedding_bag(columns, every, first, mode=0, per_sample_weights=x.reshape(-1))[0]  # 0: their sum
    return out if x.dim() > 1 else out[0]


@cache
def _bags(count: int, size: int) -> tuple[Tensor, Tensor]:
    """embedding_bag's indices and offsets: `count` bags of all of `size` rows."""
    return torch.arange(size, device="cpu").repeat(count), torch.arange(0, count * size, size, device="cpu")
