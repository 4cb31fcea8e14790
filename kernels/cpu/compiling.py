"""What the kernels of a CPU are made of that Numba compiles: their addresses, numbers of 16 bits, threads.

A number of 16 bits lies in memory as an integer, and is float32 as soon as it is read; `wide` and `narrow` are the ways
there and back. Such a function, that only raises, is a name: Numba compiles what stands below it, under `overload`, for
the types it is called with.

Numba keeps what it compiled on the disk, in `__pycache__` or else in the user's cache: it takes one to six seconds a
kernel and type.
"""

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from minivlm.kernels.cpu.openmp import KERNEL, LINE, barrier, run, thread_count, thread_number

# What stands for each type; of 16 bits one is signed and one is not, only to tell them apart in `wide` and `narrow`.
FLOATS = {torch.float32: np.float32, torch.float16: np.int16, torch.bfloat16: np.uint16}
KINDS = {dtype: number for number, dtype in enumerate(FLOATS)}  # as llvm_vectors.py counts them


def compiles_for(feature: str) -> bool:
    """Whether Numba compiles for a processor with this feature: it has one, and no variable of Numba's hides it."""
    *_, features = cpu_target.target_context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",")


@cache
def _sources() -> str:
    """A name for the state of the files that compiled code is made of."""
    files = Path(__file__).parent.glob("*.py")
    return sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


class _Kept(FunctionCache):
    """Compiled code on the disk, found by a kernel's name and the processor alone. Numba would look at what the closure
    holds, too, but takes a function there for another one in every process; name and sources tell all of it."""

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple()


class _Kernel(CFunc):
    def enable_caching(self):
        self._cache = _Kept(self._pyfunc)


def address_of(kernel: Callable, name: str) -> int:
    """Compile a kernel, or find it on the disk, by a name of its own, which has all that its closure depends on: by one
    name two processes could mix up two, and Numba looks for changes only in the file where the kernel is."""
    kernel.__qualname__ = f"{name}_{_sources()}"
    made = _Kernel(kernel, (KERNEL.args, KERNEL.return_type), locals={}, options={"error_model": "numpy"})
    made.enable_caching()
    made.compile()
    return made.address


def variant(*values: object) -> Callable:
    """What compiles a function for kernels to call that is another one for each of these values, which its name gets.
    Numba tells functions of one name apart by a number that begins anew in every process, and in one that finds code of
    two others on the disk it would take one of theirs for the other."""

    def compiled(function: Callable) -> Callable:
        function.__qualname__ = "_".join(map(str, (function.__qualname__, *values)))
        return njit(error_model="numpy")(function)

    return compiled


# ---- what the language lacks


def _instruction(result: types.Type, argument: types.Type, emit: Callable) -> Callable:
    """A function of one number that is one instruction of LLVM."""

    @intrinsic
    def instruction(context, value):
        return result(argument), lambda context, builder, signature, arguments: emit(builder, *arguments)

    return instruction


BYTE, NUMBER, FLOAT, HALF = ir.IntType(8).as_pointer(), ir.IntType(32), ir.FloatType(), ir.HalfType()
pointer = _instruction(types.voidptr, types.int64, lambda builder, address: builder.inttoptr(address, BYTE))
float_of_bits = _instruction(types.float32, types.uint32, lambda builder, bits: builder.bitcast(bits, FLOAT))
bits_of_float = _instruction(types.uint32, types.float32, lambda builder, value: builder.bitcast(value, NUMBER))
float_of_half = _instruction(
    types.float32, types.int16, lambda builder, bits: builder.fpext(builder.bitcast(bits, HALF), FLOAT)
)
half_of_float = _instruction(
    types.int16, types.float32, lambda builder, value: builder.bitcast(builder.fptrunc(value, HALF), ir.IntType(16))
)


def wide(number):
    """float32 of a number as it is stored."""
    raise NotImplementedError


@overload(wide)
def _wide(number):
    if number == types.float32:
        return lambda number: number
    if number == types.int16:
        return lambda number: float_of_half(number)
    return lambda number: float_of_bits(np.uint32(number) << np.uint32(16))  # a bfloat16 is the upper half of a float32


def narrow(value, like):
    """A float32 as it is stored in an array like this one, rounded to the nearest, of two as near to the even one."""
    raise NotImplementedError


@overload(narrow)
def _narrow(value, like):
    if like.dtype == types.float32:
        return lambda value, like: value
    if like.dtype == types.int16:
        return lambda value, like: half_of_float(value)

    def bfloat16(value, like):
        bits = bits_of_float(value)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        return np.uint16(0x7FC0) if value != value else np.uint16(rounded >> np.uint32(16))  # a NaN stays one

    return bfloat16


@njit
def rounded(value, like):
    """A float32 to the nearest of a type."""
    return wide(narrow(value, like))


@njit
def lines(rows, width):
    """Zeros, float32 [rows, width], from the beginning of a line of the caches: a vector across two takes twice as
    long."""
    space = np.zeros(rows * width + LINE // 4, np.float32)
    space = space[-np.int64(space.ctypes.data) // 4 % (LINE // 4) :]
    return space[: rows * width].reshape(rows, width)


@njit
def aligned(size):
    """So many float32, whatever they are, from the beginning of a line of the caches."""
    space = np.empty(size + LINE // 4, np.float32)
    return space[-np.int64(space.ctypes.data) // 4 % (LINE // 4) :][:size]


@njit
def address(array):
    """Where an array's first number lies."""
    return np.int64(array.ctypes.data)


@njit
def unowned(array):
    """The same numbers, without what counts who uses them: that takes atomic instructions, for each part of an array
    that is given away, which wait for all that was begun. The array itself has to be kept."""
    return carray(pointer(address(array)), array.shape, array.dtype)


@njit
def keep(array):
    """Called behind the last use of an array's address: Numba frees an array behind the last use of itself."""


# ---- threads


@njit
def share(total):
    """This thread's part of so many: its first, and the one behind its last."""
    return total * thread_number() // thread_count(), total * (thread_number() + 1) // thread_count()


@cfunc(KERNEL, cache=True)
def _count_threads(arguments):
    carray(pointer(arguments[1]), (arguments[0],), np.int64)[thread_number()] += 1


def answering_threads() -> int:
    """How many threads run a kernel."""
    answers = torch.zeros(torch.get_num_threads(), dtype=torch.int64, device="cpu")
    run(_count_threads.address, len(answers), answers)
    return int(answers.sum())


@intrinsic
def call(context, kernel, arguments):
    """A kernel, by its address, with the address of its arguments."""

    def generate(context, builder, signature, values):
        function = ir.FunctionType(ir.VoidType(), [BYTE]).as_pointer()
        builder.call(builder.inttoptr(values[0], function), [builder.inttoptr(values[1], BYTE)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@cache
def sequence_kernel() -> int:
    """The address of a kernel that calls others, each when all threads are through with the one before. Its arguments:
    how many, and of each its address and that of its arguments."""

    def kernel(arguments):
        for i in range(arguments[0]):
            call(arguments[1 + 2 * i], arguments[2 + 2 * i])
            barrier()

    return address_of(kernel, "sequence")
