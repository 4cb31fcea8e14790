"""What kernels demand of their arguments before they launch: a wrong call is an error, never a wrong result."""

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256  # channels of a head


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def interpreted() -> bool:
    """Whether Triton interprets its kernels: TRITON_INTERPRET=1 was set before Python started."""
    return triton.knobs.runtime.interpret


def require_device(tensor: Tensor) -> None:
    """Kernels run on a GPU, or under Triton's interpreter, which reads the memory of a CPU."""
    require(
        tensor.is_cuda or interpreted(),
        f"Triton kernels: tensors are on {tensor.device}, expected cuda (or TRITON_INTERPRET=1 before Python starts)",
    )


def require_attention(
    q: Tensor, k: Tensor, v: Tensor, per_query: tuple[Tensor, ...], per_row: tuple[Tensor, ...]
) -> None:
    """The arguments that both forms of attention share."""
    require_device(q)
    require(q.dim() == 3 and k.dim() == 4, f"attention: q {list(q.shape)}, k {list(k.shape)}, expected 3 and 4 axes")
    queries, heads, channels = q.shape
    require(
        k.shape == v.shape and k.shape[1] > 0 and heads % k.shape[1] == 0 and k.shape[3] == channels,
        f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, expected [S, H, C] and twice "
        "[slots, K, T, C], H a multiple of K",
    )
    require(0 < channels <= WIDEST, f"attention: {channels} channels per head, expected 1 to {WIDEST}")
    require(
        q.dtype in DTYPES and q.dtype == k.dtype == v.dtype,
        f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}, expected one of float32, float16 and bfloat16",
    )
    for integers in (*per_query, *per_row):
        require(
            integers.dtype == torch.int32 and integers.dim() == 1 and integers.is_contiguous(),
            f"attention: an index is {integers.dtype} {list(integers.shape)}, expected contiguous int32 of one axis",
        )
    for interval in per_query:
        require(
            interval.shape[0] == queries,
            f"attention: an interval for {interval.shape[0]} queries, expected one for each of {queries}",
        )
    for tensor in (k, v, *per_query, *per_row):
        require(tensor.device == q.device, f"attention: tensors on {q.device} and {tensor.device}, expected one device")
