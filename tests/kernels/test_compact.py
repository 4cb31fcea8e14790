"""Compact weights: bit for bit what they were, however their numbers lie, and when they are refused."""

import pytest
import torch
from test_single_row import threads  # noqa: F401  a fixture

from minivlm.kernels.cpu.compact import DTYPES, WHOLE, Compact
from minivlm.kernels.cpu.few_bits import missing

SIZES = [(1, 1), (3, 128), (5, 129), (70, 300), (2, 1000), (129, 256)]
pytestmark = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="compact weights need AVX-512")


def bits(weight: torch.Tensor) -> torch.Tensor:
    """One pattern for all NaN: a NaN stays one."""
    weight = weight.where(~weight.isnan(), torch.nan)
    return weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02).to(dtype)


def assert_kept(weight: torch.Tensor) -> Compact:
    compact = Compact.of(weight)
    assert compact.shape == weight.shape
    for found in (compact.expanded(), compact.plain()):
        assert torch.equal(bits(found), bits(weight))
    for first, end in ((0, 0), (len(weight) // 2, len(weight)), (0, len(weight) // 3)):
        assert torch.equal(bits(compact.expanded(first, end)), bits(weight[first:end]))
    return compact


def test_they_can_be_had_here():
    assert [missing(dtype, "compact") for dtype in DTYPES] == [None, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_normal_numbers(sizes, dtype, threads):  # noqa: F811
    assert_kept(normal(*sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_normal_weight_takes_12_bits_of_16_and_28_of_32(dtype):
    weight = normal(512, 2048, dtype=dtype)
    compact = assert_kept(weight)
    assert 8 * compact.nbytes / weight.numel() < {torch.float32: 28.05, torch.bfloat16: 12.05}[dtype]
    assert 0 < len(compact.values) < weight.numel() / 5000


def test_a_float32_that_was_a_bfloat16_takes_12_bits():
    weight = normal(512, 2048, dtype=torch.bfloat16).float()
    compact = assert_kept(weight)
    assert compact.rest is None and 8 * compact.nbytes / weight.numel() < 12.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_and_all_of_one_value(dtype):
    for value in (0.0, -0.0, 1.0, 2.0**-130):
        assert_kept(torch.full((4, 200), value, dtype=dtype))
    weight = normal(64, 512, dtype=dtype)
    weight[torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) < 0.9] = 0  # a pruned one
    weight[3], weight[5, ::2] = 0, -0.0
    assert_kept(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rare_numbers_anywhere_are_kept_whole(dtype, threads):  # noqa: F811
    """Infinite ones, NaN, subnormal and the largest, at the ends of rows, and many in one row."""
    weight = normal(300, 260, dtype=dtype)
    rare = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-39, -1e-45, 3e38, -3e38, 1e-20], dtype=dtype)
    places = (0, 0), (0, 259), (299, 0), (299, 259), (150, 127), (150, 128), (7, 64), (7, 63)
    for place, value in zip(places, rare, strict=True):
        weight[place] = value
    weight[9, 3:120] = rare[-1]
    compact = assert_kept(weight)
    assert compact.starts[10] - compact.starts[9] >= 117


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_16_bits(dtype):
    """Alone they would be refused: among enough others they are kept."""
    every = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    every = every[~every.isnan()].to(dtype)
    weight = normal(4608, 4096, dtype=dtype)
    weight.view(-1)[: len(every)] = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    assert_kept(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_too_many_rare_numbers_are_refused(dtype):
    weight = normal(64, 512, dtype=dtype)
    most = int(weight.numel() * WHOLE)
    large = torch.logspace(0, 30, 256, dtype=torch.float64).to(dtype)  # of ever other magnitudes
    few, many = weight.clone(), weight.clone()
    few.view(-1)[: most // 2] = large[torch.arange(most // 2) % 256]
    many.view(-1)[: 60 * most] = large[torch.arange(60 * most) % 256]
    assert_kept(few)
    assert Compact.of(many) is None


def test_what_is_no_such_weight_is_refused():
    weight = normal(8, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"a weight of torch.float16 \[8, 128\]"):
        Compact.of(weight.half())
    with pytest.raises(ValueError, match=r"a weight of torch.bfloat16 \[128\]"):
        Compact.of(weight[0])
    with pytest.raises(ValueError, match="expected contiguous"):
        Compact.of(weight.t())
    with pytest.raises(ValueError, match="rows 3 to 9 of 8"):
        Compact.of(weight).expanded(3, 9)
