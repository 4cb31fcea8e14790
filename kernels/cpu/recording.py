"""Kernels of a CPU one behind the other with nothing between them, as a CUDA graph is on a GPU.

While a weight is read, what Python needs leaves the processor's caches; so the calls between two kernels take as long
as some of the kernels. In a recording they were made before. What differs from run to run lies in tensors.
"""

import ctypes
from collections.abc import Callable

from torch import Tensor


class Recording:
    """The kernels that a function called, which must have called nothing else."""

    def __init__(self, function: Callable[[], Tensor]):
        """function: is called now, while no kernel runs; what it returns is where the result will be."""
        from minivlm.kernels.cpu.openmp import note  # which needs Numba

        self.result, calls = note(function)
        self._calls = calls  # their tensors are read and written
        pairs = [number for call in calls for number in (call.kernel, ctypes.addressof(call.packed))]
        self._arguments = len(calls), *pairs

    def __call__(self) -> Tensor:
        """Run them; the result is overwritten by the next run."""
        from minivlm.kernels.cpu import compiling, openmp

        openmp.run(compiling.sequence_kernel(), *self._arguments)
        return self.result
