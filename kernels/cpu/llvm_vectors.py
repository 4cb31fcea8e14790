"""What loops in vectors of LLVM are written with, for functions that Numba compiles others around.

Numba vectorises a loop by its widest type, and gives up on some. Where that costs, a function here emits LLVM's
instructions: it is called while the caller is compiled, with a builder and values that will be numbers when it runs.
Addresses are integers.
"""

import math
from collections.abc import Callable

from llvmlite import binding, ir

binding.initialize_native_asmparser()  # for `add_fours`; Numba does without

LANES = 16  # float32 of a vector
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR, NUMBERS, HALVES = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
FLOAT32, FLOAT16, BFLOAT16 = range(3)  # kinds of numbers, in the order of FLOATS in compiling.py
ADDED = ("reassoc", "contract", "nsz")  # what LLVM may do to a sum
SERIES = [math.log(2) ** n / math.factorial(n) for n in range(7)]  # of e^(r ln 2)
LOG2_E = (1.4426950216293335, 1.92596299e-08)  # 1 / ln 2 to 24 bits, and what that lacks


def all_of(kind: ir.VectorType, value: float) -> ir.Constant:
    """A vector of one number."""
    return ir.Constant(kind, [value] * kind.count)


def broadcast(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """A float32 in every place of a vector."""
    first = builder.insert_element(all_of(VECTOR, 0.0), number, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, all_of(NUMBERS, 0))


def at_address(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    """The pointer to what lies so many bytes behind an address."""
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def load(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    """What lies so many bytes behind an address, anywhere in a line of the caches."""
    return builder.load(at_address(builder, address, offset, kind), align=1)


def times(builder: ir.IRBuilder, value: ir.Value, factor: int) -> ir.Value:
    """An integer so many times."""
    return builder.mul(value, ir.Constant(I64, factor))


def prefetch(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value, near: int = 3) -> None:
    """Have the line so many bytes behind an address brought to the caches; any address will do."""
    pointer = I8.as_pointer()
    function = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], function)
    to_read, keep, data = (ir.Constant(I32, value) for value in (0, near, 1))
    builder.call(fetch, [at_address(builder, address, offset, I8), to_read, keep, data])


def loop(builder: ir.IRBuilder, count: ir.Value, begin: list, step: Callable, block: int) -> list[ir.Value]:
    """What `step` makes of values, first of `begin`, for every block of so many: (values, number) -> values."""
    before, body = builder.block, builder.append_basic_block("block")
    end = builder.append_basic_block("end")
    builder.branch(body)
    builder.position_at_end(body)
    at = builder.phi(I64)
    carried = [builder.phi(value.type) for value in begin]
    values = step(carried, at)
    following = builder.add(at, ir.Constant(I64, block))
    for phi, first, then in zip([at, *carried], [ir.Constant(I64, 0), *begin], [following, *values], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), body, end)
    builder.position_at_end(end)
    return values


def reduced(builder: ir.IRBuilder, how: str, vector: ir.Value) -> ir.Value:
    """Of a vector's numbers the sum (fadd, of integers add) or the largest (fmax)."""
    kind = vector.type.element
    first = [ir.Constant(kind, 0.0)] if how == "fadd" else []
    name = f"llvm.vector.reduce.{how}.v{vector.type.count}{'f' if kind == F32 else 'i'}32"
    signature = ir.FunctionType(kind, [*[kind] * len(first), vector.type])
    function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    return builder.call(function, [*first, vector], fastmath={"add": (), "fadd": ("reassoc",), "fmax": ("nnan",)}[how])


def add_fours(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """A vector of int32 plus the products of the four uint8 in each place of a and the four int8 there of b, modulo
    2^32. By its instruction, as what LLVM's function for it takes is another type in every few versions."""
    kind = ir.FunctionType(NUMBERS, [NUMBERS] * 3)
    return builder.asm(kind, "vpdpbusd $3, $2, $0", "=v,0,v,v", [total, a, b], side_effect=False)


def exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2^x of a vector of float32 of at most 0, relative error below 2e-7; of less than -100 as of that."""
    x = at_least(
        builder, x, -100.0
    )  # below 2^-126, with its parts, a number takes the processor a hundred times as long
    whole = _unary(builder, "rint", x)
    return _power(builder, whole, builder.fsub(x, whole))


def exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x of a vector of float32 from -87 to 0, relative error below 3e-7. 1 / ln 2 is the sum of two float32."""
    high, low = (all_of(VECTOR, value) for value in LOG2_E)
    whole = _unary(builder, "rint", builder.fmul(x, high))
    rest = _fma(builder, x, high, builder.fneg(whole))
    return _power(builder, whole, _fma(builder, x, low, rest))


def _power(builder: ir.IRBuilder, whole: ir.Value, rest: ir.Value) -> ir.Value:
    """2^(n + r) with |r| <= 1/2; 2^r = e^(r ln 2) by its series, and AVX-512 multiplies by 2^n."""
    series = all_of(VECTOR, SERIES[-1])
    for factor in reversed(SERIES[:-1]):
        series = builder.fadd(builder.fmul(series, rest, flags=ADDED), all_of(VECTOR, factor), flags=ADDED)
    kind = ir.FunctionType(VECTOR, [VECTOR, VECTOR, VECTOR, ir.IntType(16), I32])
    scaled = builder.module.declare_intrinsic("llvm.x86.avx512.mask.scalef.ps.512", (), kind)
    return builder.call(scaled, [series, whole, series, ir.Constant(ir.IntType(16), -1), ir.Constant(I32, 4)])


def at_least(builder: ir.IRBuilder, x: ir.Value, least: float) -> ir.Value:
    """Of a vector the numbers that are less than one replaced by it."""
    least = all_of(VECTOR, least)
    return builder.select(builder.fcmp_ordered("<", x, least), least, x)


def _unary(builder: ir.IRBuilder, name: str, x: ir.Value) -> ir.Value:
    function = builder.module.declare_intrinsic(f"llvm.{name}.v16f32", (), ir.FunctionType(VECTOR, [VECTOR]))
    return builder.call(function, [x])


def _fma(builder: ir.IRBuilder, *factors: ir.Value) -> ir.Value:
    """a b + c, rounded once."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return builder.call(builder.module.declare_intrinsic("llvm.fma.v16f32", (), kind), factors)


def nearest(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """float32 whose first 16 bits are the nearest bfloat16; what is below is left as it comes. Of finite numbers."""
    bits = builder.bitcast(vector, NUMBERS)
    even = builder.and_(builder.lshr(bits, all_of(NUMBERS, 16)), all_of(NUMBERS, 1))
    return builder.bitcast(builder.add(builder.add(bits, all_of(NUMBERS, 0x7FFF)), even), VECTOR)


def rounded_to(builder: ir.IRBuilder, kind: int, vector: ir.Value) -> ir.Value:
    """float32 to the nearest that numbers of a kind can be; what is no number stays so."""
    if kind == FLOAT32:
        return vector
    if kind == FLOAT16:
        return builder.fpext(builder.fptrunc(vector, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
    bits = builder.and_(builder.bitcast(nearest(builder, vector), NUMBERS), all_of(NUMBERS, 0xFFFF0000))
    return builder.select(builder.fcmp_unordered("uno", vector, vector), vector, builder.bitcast(bits, VECTOR))


def load_numbers(builder: ir.IRBuilder, kind: int, address: ir.Value, at: ir.Value) -> ir.Value:
    """float32 of 16 numbers of a kind, from number `at` behind an address on."""
    if kind == FLOAT32:
        return load(builder, address, times(builder, at, 4), VECTOR)
    bits = load(builder, address, times(builder, at, 2), HALVES)
    if kind == FLOAT16:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
    return builder.bitcast(builder.shl(builder.zext(bits, NUMBERS), all_of(NUMBERS, 16)), VECTOR)


def store_rounded(builder: ir.IRBuilder, kind: int, vector: ir.Value, address: ir.Value, at: ir.Value) -> None:
    """float32 as 16 numbers of a kind, to number `at` behind an address and what follows."""
    if kind == FLOAT16:
        vector = builder.fptrunc(vector, ir.VectorType(ir.HalfType(), LANES))
    elif kind == BFLOAT16:
        bits = builder.lshr(builder.bitcast(rounded_to(builder, kind, vector), NUMBERS), all_of(NUMBERS, 16))
        vector = builder.trunc(bits, HALVES)
    offset = times(builder, at, 4 if kind == FLOAT32 else 2)
    builder.store(vector, at_address(builder, address, offset, vector.type), align=1)
