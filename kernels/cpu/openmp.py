"""PyTorch's own threads, for functions that Numba compiled.

Two sets of threads on the same cores would wait for one another: OpenMP's go on looking for work for a while when they
have done theirs. So a kernel is a C function of one argument, and `GOMP_parallel`, by which compilers begin a
parallel region, of the OpenMP library that PyTorch brought, calls it once in each thread.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence

import torch
from llvmlite import binding
from numba import types
from torch import Tensor

_LIBRARY = ctypes.CDLL(torch._C.__file__)  # finds what the libraries have that this one was linked with
for _name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
    binding.add_symbol(_name, ctypes.cast(getattr(_LIBRARY, _name), ctypes.c_void_p).value)
thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())
LINE = 64  # bytes of a line of the caches
KERNEL = types.void(types.CPointer(types.int64))  # the argument: where integers and addresses lie
_parallel = _LIBRARY.GOMP_parallel
_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_parallel.restype = None


def run(kernel: int, *arguments: int | Tensor | None) -> None:
    """Call the kernel at an address once in each thread. Of tensors it gets the addresses, 0 for None."""
    call = Call(kernel, arguments)
    if _noting.calls is None:
        _parallel(kernel, ctypes.addressof(call.packed), torch.get_num_threads(), 0)
    else:
        _noting.calls.append(call)


class Call:
    """A kernel and its arguments, whose tensors it keeps."""

    def __init__(self, kernel: int, arguments: Sequence[int | Tensor | None]):
        self.kernel, self.arguments = kernel, arguments
        numbers = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        self.packed = (ctypes.c_int64 * len(numbers))(*numbers)


class _Noting(threading.local):
    calls: list[Call] | None = None


_noting = _Noting()


def note(function: Callable[[], Tensor]) -> tuple[Tensor, list[Call]]:
    """What a function returns, and the calls that it would have made in this thread, which are not made."""
    calls: list[Call] = []
    try:  # no context manager, which an interrupt could leave between its beginning and its block
        _noting.calls = calls
        return function(), calls
    finally:
        _noting.calls = None


def scratch(size: int) -> Tensor:
    """So many bytes for what a kernel has in between, from the beginning of a line of the caches."""
    space = torch.empty(size + LINE, dtype=torch.uint8, device="cpu")
    return space[-space.data_ptr() % LINE :][:size]
