"""The work of a decoding step on a CPU: the product of a row with a weight as stored, with what surrounds it; and the
attention of one row or more to a cache. Weights, keys and values are read once, which is what takes the time.

Shapes:     product: x [K], weight [N, K] -> [N]; with swiglu the weight is [gate | up], and the result [N / 2].
            attention: q, k and v of one position [H + 2 K, C], keys and values [K, T, C] of a slot -> [H, C].
Dtypes:     float32, float16, bfloat16. A weight of the same, or int8 with scale float32 [N]: then x is quantised too,
            to steps of 1 / 127 of its largest value, and the sums are of integers, exact. Other sums are in float32;
            what the plain forms round on the way is rounded.
Limits:     everything contiguous; N even with swiglu; C even, H a multiple of K; an int8 weight of at most 133,144
            inputs. No more threads attend than the rows have key heads.
Bytes:      N K weights of 4, 2 or 1 bytes; 2 C numbers of the cache for each visible position and key head.
Operations: 2 N K; 4 C for each visible position and query head.

The compiled forms are in single_row_numba.py. What is the same in every call is looked up once, when a layer or a
cache is prepared for them.
"""

import struct
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pickle import UnpicklingError
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_INPUTS = 2**31 // 127**2  # of an int8 product, so that its sums fit in 32 bits
LEAST_STEP = 1e-30  # of a quantised row, whose numbers may all be 0


@cache
def compiled() -> ModuleType:
    """The compiled forms, which take a third of a second to import."""
    from minivlm.kernels.cpu import single_row_numba

    return single_row_numba


def run(kernel: int, *arguments: int | Tensor | None) -> None:
    """openmp.py's, which needs Numba."""
    from minivlm.kernels.cpu import openmp

    openmp.run(kernel, *arguments)


def reason_of(trial: Callable[[], str | None]) -> str | None:
    """What a trial of compiled forms says, or what kept it from happening."""
    if find_spec("numba") is None:
        return "Numba is not installed, expected `pip install 'minivlm[cpu]'`"
    try:
        from numba.core.errors import NumbaError
    except ImportError as error:  # other versions of what it needs
        return " ".join(str(error).split())
    # No OpenMP; no place to keep code, or no room; what was kept there is damaged; what cannot be compiled.
    failures = (ImportError, AttributeError, OSError, RuntimeError, EOFError, UnpicklingError, NumbaError)
    try:
        return trial()
    except failures as error:
        return " ".join(f"{type(error).__name__}: {error}".split())


@cache
def missing() -> str | None:
    """Why no compiled form can run here; None if PyTorch's threads answer."""

    def trial() -> str | None:
        from minivlm.kernels.cpu.compiling import answering_threads

        found, expected = answering_threads(), torch.get_num_threads()
        return None if found == expected else f"{found} threads answer, expected {expected}"

    return reason_of(trial)


@cache
def missing_tiles() -> str | None:
    """Why no form by AMX can run here, see tiles.py; None if the processor, Numba and the system let it."""

    def trial() -> str | None:
        from minivlm.kernels.cpu.compiling import compiles_for
        from minivlm.kernels.cpu.tiles import allowed

        if not all(map(compiles_for, ("avx512bw", "amx-tile", "amx-bf16", "amx-int8"))):
            return "the processor has no AMX, or Numba does not use it"
        return None if allowed() else "the system does not let this process use AMX"

    return missing() or reason_of(trial)


@cache
def missing_linear(dtype: torch.dtype, quantised: bool) -> str | None:
    """Why `RowLinear` cannot run here for a type; None if a small product is right."""

    def trial() -> str | None:
        weight = torch.arange(-60, 60, device="cpu").view(20, 6)
        scale = torch.ones(20, device="cpu") if quantised else None
        product = RowLinear(weight.to(torch.int8 if quantised else dtype), scale, None, 0, False, dtype)
        x = torch.tensor([1, -2, 127, 3, 0, 5], dtype=dtype, device="cpu")
        return difference(product(x), product.plain(x))

    if dtype not in DTYPES:
        return f"there is none for {dtype}"
    return missing() or reason_of(trial)


@cache
def missing_attention(dtype: torch.dtype, channels: int) -> str | None:
    """Why `RowAttention` cannot run here for a type and width of heads; None if a small one is right."""

    def trial() -> str | None:
        keys = torch.linspace(-1, 1, 10 * channels, device="cpu").view(1, 1, 2, 5, channels).to(dtype)
        table = torch.ones(5, 1, channels, dtype=dtype, device="cpu")
        attention = RowAttention(2, keys, -keys, table, table, None)
        qkv = torch.linspace(2, -2, 6 * channels, device="cpu").to(dtype)
        return difference(attention(0, qkv, 0, 4), attention.plain(0, qkv, 0, 4))

    return missing() or reason_of(trial)


def difference(found: Tensor, expected: Tensor) -> str | None:
    """Of two forms of a result, in words; None if it is of rounding."""
    error = (found.float() - expected.float()).abs().max()
    right = error <= 16 * torch.finfo(found.dtype).eps * expected.float().abs().max()
    return None if right else f"its result is wrong by {error:g}"


class RowLinear:
    """The product of a row with a weight, perhaps of the row's RMSNorm, perhaps through SwiGLU.

    Args:
        weight: [N, K] of `dtype`, or int8; with swiglu [gate | up] one above the other.
        scale: of an int8 weight [N], None otherwise.
        norm: the weight [K] of an RMSNorm, or None; eps is its epsilon.
        swiglu: the result is silu(gate x) * (up x), [N / 2].
        dtype: of x, norm and the result.
    """

    most_rows = 1

    def __init__(
        self, weight: Tensor, scale: Tensor | None, norm: Tensor | None, eps: float, swiglu: bool, dtype: torch.dtype
    ):
        quantised = weight.dtype == torch.int8
        require(weight.dtype in (dtype, torch.int8) and dtype in DTYPES, f"a weight of {weight.dtype} for {dtype}")
        require(quantised == (scale is not None), f"a weight of {weight.dtype} and a scale of {scale}")
        require(not quantised or weight.shape[1] <= MOST_INPUTS, f"int8 of {weight.shape[1]} inputs")
        for tensor, shape, kind in (
            (weight, weight.shape, weight.dtype),
            (scale, weight.shape[:1], torch.float32),
            (norm, weight.shape[1:], dtype),
        ):
            if tensor is not None:
                require_like(tensor, shape, kind)
        require(not swiglu or len(weight) % 2 == 0, f"swiglu of {len(weight)} rows")
        self.weight, self.scale, self.norm, self.eps, self.swiglu, self.dtype = weight, scale, norm, eps, swiglu, dtype
        self.outputs, self.inputs = len(weight) // (1 + swiglu), weight.shape[1]
        self._kind, self._sizes = (dtype, quantised), (self.outputs, self.inputs, int(swiglu))
        (self._eps,) = struct.unpack("i", struct.pack("f", eps))
        compiled().linear_kernel(*self._kind)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [K] or [1, K], and what the result is added to, or None -> [N] or [1, N]."""
        rows = (1,) * (x.dim() == 2)
        require_like(x, (*rows, self.inputs), self.dtype)
        out = x.new_empty(*rows, self.outputs)
        if residual is not None:
            require_like(residual, out.shape, self.dtype)
        kernel = compiled().linear_kernel(*self._kind)
        run(kernel, *self._sizes, x, self.norm, self.weight, self.scale, residual, out, self._eps)
        return out

    def plain(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same in PyTorch."""
        x = normalised(x, self.norm, self.eps)
        if self.scale is None:
            product = linear(x, self.weight)
        else:
            step = (x.float().abs().max() / 127).clamp(min=LEAST_STEP)
            sums = self.weight.double() @ (x.float() / step).round().double()  # of integers, exact
            product = (sums.float() * self.scale * step).to(x.dtype)
        return finished(product, self.swiglu, residual)


def normalised(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of rows [.., K], where there is one."""
    if norm is None:
        return x
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * norm


def finished(product: Tensor, swiglu: bool, residual: Tensor | None) -> Tensor:
    """A product [.., N] with what follows it."""
    if swiglu:
        gate, up = product.chunk(2, dim=-1)
        product = silu(gate) * up
    return product if residual is None else residual + product


class RowAttention:
    """The attention of rows, each to its slot of a cache, to which the row's own key and value are added.

    Args:
        heads: query heads, H.
        keys, values: the cache, [layers, slots, K, T, C] of one type.
        cos, sin: of each position's angles, [T or more, 1, C]; sin negative in its first half.
        window: how many positions a query sees, its own included; None for all.
    """

    def __init__(self, heads: int, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, window: int | None):
        self.heads, self.keys, self.values, self.cos, self.sin, self.window = heads, keys, values, cos, sin, window
        self.dtype, (_, _, kv_heads, self.capacity, channels) = keys.dtype, keys.shape
        require(self.dtype in DTYPES and channels % 2 == 0, f"a cache of {self.dtype} and {channels} channels")
        require(heads % kv_heads == 0, f"{heads} query heads for {kv_heads} key heads")
        require(len(cos) >= self.capacity, f"angles of {len(cos)} positions for {self.capacity}")
        require_like(keys, keys.shape, self.dtype)
        require_like(values, keys.shape, self.dtype)
        for table in (cos, sin):
            require_like(table, (len(cos), 1, channels), self.dtype)
        self.shape = heads + 2 * kv_heads, channels
        compiled().attention_kernel(self.dtype, channels)
        self._sizes = kv_heads, heads // kv_heads, self.capacity

    def __call__(self, layer: int, qkv: Tensor, slot: int, position: int) -> Tensor:
        """qkv [(H + 2 K) C]: the position's queries and key before rotation, and its value -> [H * C]."""
        return self.at(layer, qkv[None], torch.tensor([self.place(slot, position)], device="cpu"))[0]

    def place(self, slot: int, position: int) -> tuple[int, int, int]:
        """A slot, a position and the first that it sees, for `at`; raises ValueError where there is no such place."""
        _, slots = self.keys.shape[:2]
        if not (0 <= slot < slots and 0 <= position < self.capacity):
            found = f"slot {slot}, position {position} in a cache of {[slots, self.capacity]} of them"
            raise ValueError(f"row kernels: found {found}")
        return slot, position, self._first(position)

    def at(self, layer: int, qkv: Tensor, places: Tensor) -> Tensor:
        """As `__call__`, of rows qkv [B, (H + 2 K) C] of different slots -> [B, H * C]. Their places, int64 [B, 3], are
        read when the kernel runs."""
        require_like(qkv, (len(qkv), self.shape[0] * self.shape[1]), self.dtype)
        require_like(places, (len(qkv), 3), torch.int64)
        require(0 <= layer < len(self.keys), f"layer {layer} of {len(self.keys)}")
        out = qkv.new_empty(len(qkv), self.heads * self.shape[1])
        kernel, cache = compiled().attention_kernel(self.dtype, self.shape[1]), (self.keys[layer], self.values[layer])
        run(kernel, len(qkv), *self._sizes, places, qkv, self.cos, self.sin, *cache, out)
        return out

    def plain(self, layer: int, qkv: Tensor, slot: int, position: int) -> Tensor:
        """The same in PyTorch."""
        keys, values, kv_heads = self.keys[layer, slot], self.values[layer, slot], self.keys.shape[2]
        qk, v = qkv.view(self.shape).split((self.heads + kv_heads, kv_heads))
        qk = qk * self.cos[position] + qk.roll(self.shape[1] // 2, -1) * self.sin[position]
        q, keys[:, position] = qk[: self.heads], qk[self.heads :]
        values[:, position] = v
        seen = slice(self._first(position), position + 1)
        k, v = keys[None, :, seen], values[None, :, seen]
        return scaled_dot_product_attention(q[None, :, None], k, v, enable_gqa=True).reshape(-1)

    def _first(self, position: int) -> int:
        """The first position that one sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window)


def require(condition: bool, found: str) -> None:
    """Raises ValueError with what was found, unless the condition holds."""
    if not condition:
        raise ValueError(f"row kernels: found {found}")


def require_like(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """A wrong argument is an error, never an address."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
        raise ValueError(f"row kernels: found {found}, expected contiguous {dtype} {list(shape)} on cpu")
