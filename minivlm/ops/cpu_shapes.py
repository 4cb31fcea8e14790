"""Few shapes on a CPU: oneDNN, and PyTorch's attention with it, compile code for every shape they meet and keep it.

Prompts come in every length. In bfloat16 a product keeps 0.3 to 1 MB for each number of rows, up to a thousand of them,
and attention with a mask some kilobytes for each pair of numbers of queries and keys, without end. So both are given
numbers that are rounded up, and the rows that were added are cut off: a server's memory stays flat, and a row's result
is what it was.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad

from minivlm.ops.attention import Visible, fused

FEW, STEP, STRIDE = 64, 8, 32  # up to FEW rows the next multiple of STEP, beyond of STRIDE


def rounded_up(rows: int) -> int:
    """The number that stands for this one: 1 -> 1, 2 -> 8, 65 -> 96."""
    step = 1 if rows == 1 else STEP if rows <= FEW else STRIDE
    return -(-rows // step) * step


def padded(x: Tensor) -> Tensor:
    """Rows x [S, K] with rows of zeros up to a rounded number; other tensors as they are."""
    more = rounded_up(len(x)) - len(x) if x.dim() == 2 else 0
    if not more:
        return x
    out = x.new_empty(len(x) + more, x.shape[1])  # `pad` would fill all of it with zeros first
    out[: len(x)] = x
    out[len(x) :] = 0
    return out


def of_rounded(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) of rows x [S, K] -> [S, N], computed for a rounded number of rows."""
    out = product(padded(x))
    return out[: len(x)] if x.dim() == 2 else out


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """`fused`, where there is a mask with rounded numbers of queries and keys: what is added is not seen."""
    if isinstance(visible, str):
        return fused(q, k, v, visible)
    n, t = visible.shape
    rows, keys = rounded_up(n) - n, rounded_up(t) - t
    visible = pad(visible, (0, keys, 0, rows))
    visible[n:, 0] = True  # a query that sees nothing is not a number
    k, v = pad(k, (0, 0, 0, keys)), pad(v, (0, 0, 0, keys))
    return fused(pad(q, (0, 0, 0, rows)), k, v, visible)[:, :, :n]
