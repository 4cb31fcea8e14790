"""Products with a weight that is kept in few bits, on a CPU, with what surrounds them in a decoder's layer. Reading the
weight is what takes the time of a few rows; many are multiplied by AMX, see tiles.py.

Shapes:     x [B, K], weight [N, K] -> [B, N]; with swiglu the weight is [gate | up], and the result [B, N / 2].
Weights:    Compact, of compact.py; int8 [N, K] with scale float32 [N]; int4 as of quantise.py, uint8 [N, K / 2] with
            scale float32 [N, K / 128].
Dtypes:     float32, bfloat16; float16 with int8 and int4. By int8 x is quantised too, each row of it to steps of
            1 / 127 of its largest value, and the sums are of integers, exact. Other sums are in float32; what the plain
            forms round on the way is rounded. By AMX a product in float32 is six in bfloat16, three if the weight was
            published as such; more than 16 rows of bfloat16 meet int4 weights that are rounded to it.
Limits:     AVX-512, with int8 VNNI; K a multiple of 128 with int8 and int4; an int8 weight of at most 133,144 inputs;
            16 rows without AMX. A row with an infinite number is not a number by AMX, numbers below 2^-126 are 0, and
            of a float32 below 2^-110 not all bits are left; few rows by int4 are summed before they are scaled, so
            numbers beyond 2^117 may be infinite.
Bytes:      3 / 2, 1 or 17 / 32 N K, 7 / 2 N K of a float32 weight.
Operations: 2 B N K.

The compiled forms are in few_rows_numba.py, and by AMX some_rows_numba.py and many_rows_numba.py.
"""

import math
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from minivlm.kernels.cpu import compact, single_row
from minivlm.kernels.cpu.compact import BLOCK, Compact
from minivlm.kernels.cpu.single_row import (
    LEAST_STEP,
    MOST_INPUTS,
    difference,
    finished,
    normalised,
    reason_of,
    require,
    require_like,
)
from minivlm.kernels.quantise import dequantise_int4

AT_ONCE = 8  # rows by which a weight is multiplied when it is read
MOST_ROWS = 16  # without AMX
INT8, INT4 = "int8", "int4"
# Most rows that are multiplied without AMX where there is AMX, by form and type. Microseconds of 5632x1024, one thread,
# with / without: bfloat16 in 12 bits 4 rows 1120 / 1210, 8 rows 1140 / 2370; float32 in 28 bits 4 rows 2690 / 1630, 8
# rows 3470 / 2740, 9 rows 3380 / 4130; int8 4 rows 565 / 500, 5 rows 695 / 730, 9 rows 590 / 1060; int4 in
# bfloat16 3 rows 700 / 810, in float32, whose products float16 has, 4 rows 1190 / 970, 5 rows 960 / 2120.
WITHOUT_TILES = {
    "compact": {torch.bfloat16: 4, torch.float32: 8},
    INT8: dict.fromkeys(single_row.DTYPES, 4),
    INT4: {torch.bfloat16: 2, torch.float16: 4, torch.float32: 4},
}


@cache
def few_rows() -> ModuleType:
    """The compiled forms for a few rows, which take a third of a second to import."""
    from minivlm.kernels.cpu import few_rows_numba

    return few_rows_numba


@cache
def many_rows() -> ModuleType:
    """Those for more, by AMX."""
    from minivlm.kernels.cpu import many_rows_numba

    return many_rows_numba


@cache
def missing(dtype: torch.dtype, form: str) -> str | None:
    """Why there are no such products here of a type with "compact", "int8" or "int4" weights; None if small ones are
    right."""

    def trial() -> str | None:
        from minivlm.kernels.cpu.compiling import compiles_for

        needed = {"AVX-512": "avx512bw"} | ({"AVX-512 VNNI": "avx512vnni"} if form == INT8 else {})
        for name, feature in needed.items():
            if not compiles_for(feature):  # without it LLVM would end the process
                return f"the processor has no {name}, or Numba does not use it"
        return _tried(dtype, form, rows=3)

    if dtype not in (compact.DTYPES if form == "compact" else single_row.DTYPES):
        return f"there is none for {dtype}"
    return single_row.missing() or reason_of(trial)


@cache
def missing_tiles(dtype: torch.dtype, form: str) -> str | None:
    """Why they do without AMX; None if a small product by it is right."""
    return single_row.missing_tiles() or reason_of(lambda: _tried(dtype, form, rows=17))


def _tried(dtype: torch.dtype, form: str, rows: int) -> str | None:
    """What is wrong with a small product."""
    numbers = torch.arange(20 * BLOCK, dtype=torch.int32, device="cpu").view(20, BLOCK) % 977
    scale = None
    if form == "compact":
        weight = (numbers * 2.0**-12 * (-1.0) ** numbers).to(dtype)
        weight[3, 5] = 2.0**-90  # which is kept whole
        if dtype == torch.float32:
            weight[4, 7] += 2.0**-20  # a rest
        stored, weight = weight, Compact.of(weight)
        if weight is None or not torch.equal(weight.expanded(), stored) or not torch.equal(weight.plain(), stored):
            return "its weights are not what they were"
    elif form == INT8:
        weight, scale = (numbers % 255 - 127).to(torch.int8), torch.ones(20, device="cpu")
    else:
        weight, scale = (numbers % 256).to(torch.uint8)[:, ::2].contiguous(), torch.ones(20, 1, device="cpu")
    product = FewBitsLinear(weight, scale, None, 0, False, dtype)
    x = (numbers[:rows] % 31 - 15).to(dtype)
    return difference(product(x, by_tiles=rows > MOST_ROWS), product.plain(x))


class FewBitsLinear:
    """The product of rows with a weight, perhaps of their RMSNorm, perhaps through SwiGLU.

    Args:
        weight: [N, K], in one of the forms above; with swiglu [gate | up] one above the other.
        scale: of an int8 or int4 weight, None otherwise.
        norm: the weight [K] of an RMSNorm, or None; eps is its epsilon.
        swiglu: the result is silu(gate x) * (up x), [.., N / 2].
        dtype: of x, norm and the result; a Compact weight's own.
    """

    def __init__(
        self,
        weight: Compact | Tensor,
        scale: Tensor | None,
        norm: Tensor | None,
        eps: float,
        swiglu: bool,
        dtype: torch.dtype,
    ):
        if isinstance(weight, Compact):
            self.form, rows, self.inputs = "compact", *weight.shape
            require(weight.dtype == dtype and scale is None, f"a compact weight of {weight.dtype} for {dtype}")
        else:
            self.form, per_byte = (INT4, 2) if weight.dtype == torch.uint8 else (INT8, 1)
            rows, self.inputs = len(weight), weight.shape[1] * per_byte
            require_like(weight, weight.shape, torch.uint8 if self.form == INT4 else torch.int8)
            require(scale is not None and dtype in single_row.DTYPES, f"{self.form}, scale {scale}, for {dtype}")
            require_like(scale, (rows, self.inputs // BLOCK) if self.form == INT4 else (rows,), torch.float32)
            require(self.inputs % BLOCK == 0, f"{self.form} of {self.inputs} inputs, expected a multiple of {BLOCK}")
            require(self.form == INT4 or self.inputs <= MOST_INPUTS, f"int8 of {self.inputs} inputs")
        if norm is not None:
            require_like(norm, (self.inputs,), dtype)
        require(not swiglu or rows % 2 == 0, f"swiglu of {rows} rows")
        self.weight, self.scale, self.norm, self.eps, self.swiglu, self.dtype = weight, scale, norm, eps, swiglu, dtype
        self.outputs = rows // (1 + swiglu)

    @property
    def most_rows(self) -> float:
        """How many rows it takes at most."""
        return MOST_ROWS if missing_tiles(self.dtype, self.form) else math.inf

    def __call__(self, x: Tensor, residual: Tensor | None = None, by_tiles: bool | None = None) -> Tensor:
        """x [K] or [B, K], and what the result is added to, or None -> [N] or [B, N]. by_tiles: whether by AMX; the
        number of rows decides where it is None."""
        shape = (*x.shape[:-1], self.inputs)
        require_like(x, shape, self.dtype)
        rows = x.numel() // self.inputs
        if by_tiles is None:
            by_tiles = rows > WITHOUT_TILES[self.form][self.dtype] and missing_tiles(self.dtype, self.form) is None
        most = "1 or more" if by_tiles else f"1 to {MOST_ROWS}"
        require(x.dim() <= 2 and rows > 0 and (by_tiles or rows <= MOST_ROWS), f"{list(x.shape)}, expected {most} rows")
        out = x.new_empty(*shape[:-1], self.outputs)
        if residual is not None:
            require_like(residual, out.shape, self.dtype)
        return (many_rows() if by_tiles else few_rows()).multiply(self, x, rows, residual, out)

    def plain(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same in PyTorch."""
        x = normalised(x, self.norm, self.eps)
        if self.form == "compact":
            product = linear(x, self.weight.plain())
        elif self.form == INT4:
            weight = dequantise_int4(self.weight, self.scale)
            if x.dim() > 1 and len(x) > MOST_ROWS and x.dtype == torch.bfloat16:
                weight = weight.to(x.dtype).float()
            product = linear(x.float(), weight).to(x.dtype)
        else:
            step = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=LEAST_STEP)
            sums = linear((x.float() / step).round().double(), self.weight.double())  # of integers, exact
            product = (sums.float() * self.scale * step).to(x.dtype)
        return finished(product, self.swiglu, residual)


def widened_int4(weight: Tensor, scale: Tensor, first: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows of an int4 weight as numbers of a type, [end - first, K]: `dequantise_int4`, rounded."""
    require_like(weight, weight.shape, torch.uint8)
    require_like(scale, (len(weight), 2 * weight.shape[1] // BLOCK), torch.float32)
    require(0 <= first <= end <= len(weight) and dtype in single_row.DTYPES, f"rows {first} to {end} of {dtype}")
    return compact.compiled().expand_int4(weight, scale, first, end, dtype)
