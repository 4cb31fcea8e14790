"""bfloat16 in Triton's interpreter, as a GPU computes it.

The interpreter keeps bfloat16 as uint16. Converting to it truncates, and every product, sum and comparison takes the
bits for integers. Here conversions round to the nearest even, as torch's do, `tl.dot` multiplies the values, and all
other arithmetic is refused: a kernel converts to float32 when it has loaded and back when it stores.
"""

from functools import cache

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle


def is_bf16(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    """bfloat16 -> float32, exactly."""
    bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy().reshape(handle.data.shape), tl.float32)


def rounded(handle: TensorHandle) -> TensorHandle:
    """float32 -> bfloat16, to the nearest even."""
    values = torch.from_numpy(np.ascontiguousarray(handle.data))
    bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(bits.reshape(handle.data.shape), tl.bfloat16)


def refuse(handles) -> None:
    if any(is_bf16(handle) for handle in handles):
        raise TypeError("bfloat16 arithmetic in a kernel: convert to float32 after loading")


@cache
def install() -> None:
    """Replace the interpreter's operations by these, once."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    convert = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, source, target):
        if is_bf16(source) == (target.scalar == tl.bfloat16):
            return cast(self, source, target)
        if is_bf16(source):
            return cast(self, widened(source), target)
        return rounded(cast(self, source, tl.float32))

    def create_fp_to_fp(self, source, target, rounding):
        either = is_bf16(source) or target.scalar == tl.bfloat16
        return cast_impl(self, source, target) if either else convert(self, source, target, rounding)

    def create_dot(self, a, b, *others):
        return dot(self, *(widened(x) if is_bf16(x) else x for x in (a, b)), *others)

    def refusing(operation):
        def guarded(self, *operands):
            refuse(operands)
            return operation(self, *operands)

        return guarded

    def refusing_tensors(operation):
        def guarded(self, tensors):
            refuse([tensor.handle for tensor in tensors])
            return operation(self, tensors)

        return guarded

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(InterpreterBuilder, name, refusing(vars(InterpreterBuilder)[name]))
    for owner in (ReduceOps, ScanOps):
        owner.apply_impl = refusing_tensors(owner.apply_impl)
