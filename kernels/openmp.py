"""PyTorch's own threads, for functions that Numba compiled.

Two sets of threads on the same cores would wait for one another: OpenMP's go on looking for work for a while when they
have done theirs. So a kernel is a C function of one argument, and `GOMP_parallel`, by which compilers begin a
parallel region, of the OpenMP library that PyTorch brought, calls it once in each thread.
"""

import ctypes

import torch
from llvmlite import binding
from numba import types

_LIBRARY = ctypes.CDLL(torch._C.__file__)  # finds what the libraries have that this one was linked with
for _name in ("omp_get_thread_num", "omp_get_num_threads"):
    binding.add_symbol(_name, ctypes.cast(getattr(_LIBRARY, _name), ctypes.c_void_p).value)
thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
KERNEL = types.void(types.CPointer(types.int64))  # the argument: where integers and addresses lie
_parallel = _LIBRARY.GOMP_parallel
_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_parallel.restype = None


def run(kernel: int, *arguments: int) -> None:
    """Call the kernel at an address once in each thread."""
    packed = (ctypes.c_int64 * len(arguments))(*arguments)
    _parallel(kernel, ctypes.addressof(packed), torch.get_num_threads(), 0)
