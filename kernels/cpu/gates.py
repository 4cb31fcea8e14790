"""SwiGLU of rows of float32, 16 numbers at a time, as a function for what Numba compiles others around."""

from numba import types
from numba.extending import intrinsic

from minivlm.kernels.cpu.llvm_vectors import (
    LANES,
    VECTOR,
    all_of,
    at_address,
    at_least,
    exp,
    load,
    loop,
    rounded_to,
    times,
)

LOWEST = -87.0  # of what e^x is a normal number of


@intrinsic(prefer_literal=True)
def gate_numbers(context, kind, gate, up, count):
    """silu(gate) * up in place of gate, of so many float32 at two addresses, with the roundings of a kind of numbers,
    which is a constant: before silu, behind it, and of up. Where count is no multiple of 16, more than that is changed.

    silu(x) = x / (1 + e^-x) = x s / (1 + e^-|x|), where s is 1 of a positive x, e^x of a negative one, and 0 below
    LOWEST.
    """
    number = kind.literal_value

    def generate(context, builder, signature, arguments):
        _, gate, up, count = arguments
        one, zero = all_of(VECTOR, 1.0), all_of(VECTOR, 0.0)

        def step(_, at):
            offset = times(builder, at, 4)
            x = rounded_to(builder, number, load(builder, gate, offset, VECTOR))
            negative = builder.fcmp_ordered("<", x, zero)
            below = builder.select(negative, x, builder.fneg(x))  # -|x|
            power = exp(builder, at_least(builder, below, LOWEST))
            share = builder.select(negative, power, one)
            share = builder.select(builder.fcmp_ordered("<", x, all_of(VECTOR, LOWEST)), zero, share)
            silu = builder.fdiv(builder.fmul(x, share), builder.fadd(one, power))
            factors = [rounded_to(builder, number, y) for y in (silu, load(builder, up, offset, VECTOR))]
            builder.store(builder.fmul(*factors), at_address(builder, gate, offset, VECTOR), align=4)
            return []

        loop(builder, count, [], step, LANES)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 3), generate
