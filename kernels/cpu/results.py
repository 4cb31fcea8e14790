"""What follows the sums of a product, 16 numbers at a time, as functions for what Numba compiles others around."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minivlm.kernels.cpu.llvm_vectors import (
    LANES,
    NUMBERS,
    VECTOR,
    all_of,
    at_address,
    at_least,
    broadcast,
    exp,
    load,
    load_numbers,
    loop,
    rounded_to,
    store_rounded,
    times,
)

LOWEST = -87.0  # of what e^x is a normal number of


def gated(builder: ir.IRBuilder, kind: int, gate: ir.Value, up: ir.Value) -> ir.Value:
    """silu(gate) * up of two vectors, with the roundings of a kind of numbers: before silu, behind it, and of up.

    silu(x) = x / (1 + e^-x) = x s / (1 + e^-|x|), where s is 1 of a positive x, e^x of a negative one, and 0 below
    LOWEST.
    """
    one, zero = all_of(VECTOR, 1.0), all_of(VECTOR, 0.0)
    x = rounded_to(builder, kind, gate)
    negative = builder.fcmp_ordered("<", x, zero)
    below = builder.select(negative, x, builder.fneg(x))  # -|x|
    power = exp(builder, at_least(builder, below, LOWEST))
    share = builder.select(negative, power, one)
    share = builder.select(builder.fcmp_ordered("<", x, all_of(VECTOR, LOWEST)), zero, share)
    silu = builder.fdiv(builder.fmul(x, share), builder.fadd(one, power))
    return builder.fmul(rounded_to(builder, kind, silu), rounded_to(builder, kind, up))


@intrinsic(prefer_literal=True)
def gate_numbers(context, kind, gate, up, count):
    """`gated` in place of gate, of so many float32 at two addresses; the kind is a constant. Where count is no multiple
    of 16, more than that is changed."""
    number = kind.literal_value

    def generate(context, builder, signature, arguments):
        _, gate, up, count = arguments

        def step(_, at):
            offset = times(builder, at, 4)
            value = gated(builder, number, *(load(builder, address, offset, VECTOR) for address in (gate, up)))
            builder.store(value, at_address(builder, gate, offset, VECTOR), align=4)
            return []

        loop(builder, count, [], step, LANES)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 3), generate


@intrinsic
def scale_numbers(context, sums, scale, size, count):
    """int32 sums at an address times a float32 each at another one and one for all, to float32 in their place; so
    many, a multiple of 16."""

    def generate(context, builder, signature, arguments):
        sums, scale, size, count = arguments
        size = broadcast(builder, size)

        def step(_, at):
            offset = times(builder, at, 4)
            number = builder.sitofp(load(builder, sums, offset, NUMBERS), VECTOR)
            number = builder.fmul(builder.fmul(number, load(builder, scale, offset, VECTOR)), size)
            builder.store(number, at_address(builder, sums, offset, VECTOR), align=4)
            return []

        loop(builder, count, [], step, LANES)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), generate


def store_result(
    builder: ir.IRBuilder, kind: int, value: ir.Value, residual: ir.Value | None, out: ir.Value, at: ir.Value
) -> None:
    """A vector, rounded to a kind of numbers, to number `at` behind an address and what follows; or, if there is a
    residual, rounded, added to what is there behind its address, and rounded again."""
    if residual is not None:
        value = builder.fadd(rounded_to(builder, kind, value), load_numbers(builder, kind, residual, at))
    store_rounded(builder, kind, value, out, at)


@intrinsic(prefer_literal=True)
def store_numbers(context, kind, added, found, residual, out, count):
    """`store_result` of so many float32 at an address, a multiple of 16; kind, and whether there is a residual, are
    constants."""
    number = kind.literal_value

    def generate(context, builder, signature, arguments):
        _, _, found, residual, out, count = arguments

        def step(_, at):
            value = load(builder, found, times(builder, at, 4), VECTOR)
            store_result(builder, number, value, residual if added.literal_value else None, out, at)
            return []

        loop(builder, count, [], step, LANES)
        return context.get_dummy_value()

    return types.void(kind, added, *[types.int64] * 4), generate
