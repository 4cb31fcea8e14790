"""The fused sampler against the plain one, transformers' processors, float64 and exact probabilities."""

import math
import os
import random
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from problems import poisoned_memory
from torch import Tensor
from warpers import transformers_warpers

from minivlm import sampler
from minivlm.kernels import sampling, sampling_stages
from minivlm.noise import WORD, gumbel_noise, gumbel_of_bits, philox4x32
from minivlm.sampler import Sampling

EDGE = 2.0**-18  # the stated rounding of a boundary, as a share of what is compared
KERNEL_AND_TWIN = pytest.mark.parametrize("function", ["sample", "plain_sample"])


def arguments(
    logits: Tensor,
    samplings: list[Sampling],
    positions: list[int],
    seen: list[list[int]] | None = None,
    allowed: Tensor | None = None,
    count: int = 0,
) -> tuple:
    """The plain sampler's arguments as the kernel takes them; seeds and positions as the int64 of the same 64 bits."""

    def signed(values: list[int]) -> Tensor:
        return torch.tensor([value - 2**64 if value >= 2**63 else value for value in values])

    def floats(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    rows, vocabulary = logits.shape
    known = None
    if seen is not None:
        known = torch.zeros(rows, vocabulary, dtype=torch.bool)
        for row, ids in enumerate(seen):
            known[row, ids] = True
    return (
        logits,
        signed([s.seed or 0 for s in samplings]),
        signed(positions),
        floats([0.0 if s.greedy else 1.0 if s.temperature is None else s.temperature for s in samplings]),
        torch.tensor([min(s.top_k or 0, vocabulary) for s in samplings], dtype=torch.int32),
        floats([s.top_p or 1.0 for s in samplings]),
        floats([s.min_p or 0.0 for s in samplings]),
        floats([s.repetition_penalty for s in samplings]),
        known,
        None if allowed is None else bits(allowed),
        count,
    )


def bits(mask: Tensor) -> Tensor:
    """bool [B, V] -> int32 [B, ceil(V / 32)], written with Python's integers."""
    rows = [[bool(x) for x in row] + [False] * (-len(row) % 32) for row in mask.tolist()]
    words = [[sum(row[i + j] << j for j in range(32)) for i in range(0, len(row), 32)] for row in rows]
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in words], dtype=torch.int32)


def run(device: torch.device, given: tuple, function: str = "sample") -> tuple[Tensor, ...]:
    """ids, logprobs, sampled_logprobs, top_ids, top_logprobs, errors, on the CPU."""
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in given]
    with poisoned_memory():
        results = getattr(sampling, function)(*moved)
    return tuple(result.cpu() for result in results)


def some_sampling(rng: random.Random, seed: int) -> Sampling:
    return Sampling(
        temperature=rng.choice([None, 0.01, 0.3, 0.7, 1.0, 1.7, 30.0]),
        top_k=rng.choice([None, None, 1, 2, 7, 50, 10_000]),
        top_p=rng.choice([None, None, 1e-9, 0.05, 0.5, 0.9, 0.999, 1.0]),
        min_p=rng.choice([None, None, 0.0, 0.02, 0.3, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.0, 0.5, 1.1, 2.0]),
        seed=seed,
    )


def at_an_edge(logits: Tensor, s: Sampling, seen: list[int]) -> bool:
    """Whether float32 may decide the fate of a score either way, in the kernel or in transformers."""
    whole = Sampling(s.temperature, s.top_k, repetition_penalty=s.repetition_penalty, seed=0)
    scores = sampler.warp(logits, seen, whole).double()
    below = scores[scores < scores.max()].sort().values
    near = False
    if s.top_p is not None and s.top_p < 1:
        mass = scores.softmax(0).sort().values.cumsum(0)[: len(below)]
        near |= bool(((mass / (1 - s.top_p) - 1).abs() < EDGE).any())
    if s.min_p:
        near |= bool((((below - scores.max()).exp() / s.min_p - 1).abs() < EDGE).any())
    return near


def compare(device: torch.device, rows: int, vocabulary: int, seed: int) -> tuple[int, int]:
    """Random rows against the plain sampler (ids) and transformers (kept sets).

    What a row keeps shows in the log-probability of the chosen id: it is upward closed, so any difference adds or drops
    the worst id kept or the best dropped. Returns how many rows differ by one such id in a way that shows, and how many
    are at an edge.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    samplings = [some_sampling(rng, rng.getrandbits(64)) for _ in range(rows)]
    scale = torch.tensor([rng.choice([0.5, 2.0, 4.0]) for _ in range(rows)])
    logits = torch.randn(rows, vocabulary, generator=generator) * scale[:, None]
    positions = [rng.choice([rng.randrange(5000), rng.getrandbits(64)]) for _ in range(rows)]
    seen = [[rng.randrange(vocabulary) for _ in range(12)] for _ in range(rows)]
    found = run(device, arguments(logits, samplings, positions, seen))
    expected = sampler.sample(logits, samplings, positions, seen)
    told, edges = 0, 0
    for row, (s, choice) in enumerate(zip(samplings, expected, strict=True)):
        assert found[5][row] == 0
        if at_an_edge(logits[row], s, seen[row]):
            edges += 1
            continue
        assert found[0][row] == choice.id, (row, s)
        kept = transformers_warpers(s)(torch.tensor([seen[row]]), logits[row][None].clone())[0].double()
        exact = kept.log_softmax(0)
        assert float(found[2][row]) == pytest.approx(float(exact[choice.id]), abs=4e-6, rel=3e-7), (row, s)
        whole = Sampling(s.temperature, repetition_penalty=s.repetition_penalty, seed=0)
        dropped = sampler.warp(logits[row], seen[row], whole).double()[~kept.isfinite()]
        shares = [exact[kept.isfinite()].min().exp(), (dropped.max() - kept.logsumexp(0)).exp() if len(dropped) else 1]
        told += all(share > 3e-5 for share in shares)
    return told, edges


@pytest.mark.parametrize(("vocabulary", "rows"), [(5, 40), (64, 60), (300, 50), (1000, 40)])
def test_ids_are_the_plain_samplers_and_kept_sets_transformers(device: torch.device, vocabulary: int, rows: int):
    rows = rows if device.type == "cpu" else 20 * rows
    told, edges = compare(device, rows, vocabulary, seed=vocabulary)
    assert edges <= rows // 25
    assert told >= rows // 2


@pytest.mark.parametrize("vocabulary", [32_064, 64_064])
def test_ids_and_kept_sets_at_real_vocabularies(device: torch.device, vocabulary: int):
    _, edges = compare(device, 6, vocabulary, seed=vocabulary)
    assert edges <= 2


def test_twin_keeps_what_transformers_keeps_in_thousands_of_rows():
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(500):
        s = some_sampling(rng, 0)
        logits = torch.randn(8, rng.choice([5, 64, 300]), generator=generator) * rng.choice([0.5, 3.0, 12.0])
        chain = transformers_warpers(Sampling(s.temperature, s.top_k, s.top_p, s.min_p))
        expected = chain(torch.zeros(8, 1).long(), logits.clone())
        for row in range(8):
            scores = logits[row] / (s.temperature or 1.0)
            ours = sampling._warp(scores, s.top_k or 0, s.top_p or 1.0, s.min_p or 0.0)
            assert torch.equal(ours, expected[row]), s


@KERNEL_AND_TWIN
def test_outputs_are_the_plain_samplers(device: torch.device, function: str):
    """Penalty, mask, alternatives and greedy rows together, in a vocabulary that fills no block."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    samplings = [Sampling(), Sampling(repetition_penalty=1.4)] + [some_sampling(rng, seed) for seed in range(10)]
    logits = torch.randn(12, 5003, generator=generator) * 3
    seen = [[rng.randrange(5003) for _ in range(400)] for _ in range(12)]
    allowed = torch.rand(12, 5003, generator=generator) < 0.7
    positions = list(range(40, 52))
    found = run(device, arguments(logits, samplings, positions, seen, allowed, count=5), function)
    asked = [Sampling(**{**vars(s), "top_logprobs": 5}) for s in samplings]
    for row, choice in enumerate(sampler.sample(logits, asked, positions, seen, allowed)):
        assert found[0][row] == choice.id
        assert float(found[1][row]) == pytest.approx(choice.logprob, abs=4e-6)
        assert float(found[2][row]) == pytest.approx(choice.sampled_logprob, abs=4e-6)
        assert found[3][row].tolist() == [token_id for token_id, _ in choice.alternatives]
        assert found[4][row].tolist() == pytest.approx([value for _, value in choice.alternatives], abs=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_log_probabilities_against_float64_and_strides(device: torch.device, dtype: torch.dtype):
    """Rows cut out of a longer buffer whose other numbers are NaN; a mask that all rows share."""
    vocabulary = 32_064
    buffer = torch.full((3, vocabulary + 77), torch.nan, dtype=dtype)
    logits = buffer[:, 5 : 5 + vocabulary]
    logits.copy_(torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(1)) * 5)
    allowed = torch.arange(vocabulary)[None] % 3 != 1
    samplings = [Sampling(), Sampling(seed=4, top_k=40), Sampling(seed=5, temperature=0.6)]
    given = list(arguments(logits, samplings, [1, 2, 3], count=3))
    given[0] = buffer.to(device)[:, 5 : 5 + vocabulary]
    given[9] = bits(allowed).to(device).expand(3, -1)
    found = run(device, tuple(given))
    exact = logits.double()
    raw = exact.log_softmax(1)
    masked = exact.masked_fill(~allowed, -torch.inf)
    masked[1] = masked[1].masked_fill(masked[1] < masked[1].topk(40).values[-1], -torch.inf)
    masked[2] = masked[2] / 0.6
    rows = torch.arange(3)
    assert (found[1] - raw[rows, found[0]]).abs().max() < 4e-6
    assert (found[2] - masked.log_softmax(1)[rows, found[0]]).abs().max() < 4e-6
    best = raw.masked_fill(~allowed, -torch.inf).sort(descending=True, stable=True)
    assert torch.equal(found[3], best.indices[:, :3])
    assert (found[4] - best.values[:, :3]).abs().max() < 4e-6


@KERNEL_AND_TWIN
def test_equal_scores_share_one_fate(device: torch.device, function: str):
    """bfloat16 logits: what is kept is a superset of transformers', closed under equality, and the plain sampler's."""
    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    logits = (torch.randint(-6, 7, (40, 90), generator=generator) / 2).bfloat16()
    logits[:, ::2] *= -1  # 0 and -0 are equal
    choices = [(rng.choice([None, 5, 20]), rng.choice([0.3, 0.6, 0.9])) for _ in range(40)]
    samplings = [Sampling(top_k=k, top_p=p, seed=n) for n, (k, p) in enumerate(choices)]
    found = run(device, arguments(logits, samplings, [9] * 40), function)
    expected = sampler.sample(logits, samplings, [9] * 40, [()] * 40)
    grown = 0
    for row, (s, choice) in enumerate(zip(samplings, expected, strict=True)):
        assert found[0][row] == choice.id
        assert float(found[2][row]) == pytest.approx(choice.sampled_logprob, abs=4e-6)
        scores = logits[row].double()
        theirs = transformers_warpers(s)(torch.zeros(1, 1).long(), logits[row][None].float())[0].isfinite()
        closed = scores >= scores[theirs].min()
        exact = scores.masked_fill(~closed, -torch.inf).log_softmax(0)
        assert float(found[2][row]) == pytest.approx(float(exact[choice.id]), abs=4e-6)
        grown += bool((closed & ~theirs).any())
    assert grown > 10


def test_greedy_and_alternatives_take_equals_by_id(device: torch.device):
    logits = torch.zeros(2, 3000)
    logits[1, 7:] = 1.0
    logits[1, 2500:] = 2.0
    found = run(device, arguments(logits, [Sampling(), Sampling()], [0, 0], count=4))
    assert found[0].tolist() == [0, 2500]
    assert found[3].tolist() == [[0, 1, 2, 3], [2500, 2501, 2502, 2503]]


def test_zero_and_minus_zero_are_equal(device: torch.device):
    logits = torch.tensor([[-1.0, -0.0, 0.0, -2.0], [-1.0, 0.0, -0.0, -2.0]]).repeat(2, 1)
    samplings = [Sampling(top_k=1, seed=0)] * 2 + [Sampling(top_p=0.3, seed=0)] * 2
    found = run(device, arguments(logits, samplings, [0] * 4))
    assert found[2].tolist() == pytest.approx([-math.log(2)] * 4, abs=1e-6)


def test_alternatives_end_where_probability_does(device: torch.device):
    logits = torch.tensor([[0.0, -torch.inf, 2.0, 3.0]])
    found = run(device, arguments(logits, [Sampling()], [0], None, torch.tensor([[True, True, True, False]]), count=4))
    assert found[3].tolist() == [[2, 0, -1, -1]]
    assert found[4][0, 2:].tolist() == [-torch.inf, -torch.inf]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which is numpy
@KERNEL_AND_TWIN
def test_rows_without_a_choice_are_reported_and_never_drawn(device: torch.device, function: str):
    logits = torch.randn(12, 700, generator=torch.Generator().manual_seed(3))
    samplings = [Sampling(temperature=0.7, top_p=0.9, top_k=50, seed=n) for n in range(12)]
    allowed = torch.ones(12, 700, dtype=torch.bool)
    clean = run(device, arguments(logits, samplings, [5] * 12, [[3]] * 12, allowed, count=2), function)
    logits[1, 699] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    logits[4, 8] = torch.nan
    allowed[4, 8] = False  # a model that makes NaN is broken wherever it makes it
    allowed[5] = False
    allowed[6, :] = False
    allowed[6, 8] = True
    logits[6, 8] = -torch.inf
    samplings[7] = Sampling(temperature=1e-40, seed=1)
    samplings[8] = Sampling(repetition_penalty=1e-300)
    logits[8, 3] = 1.0
    found = run(device, arguments(logits, samplings, [5] * 12, [[3]] * 12, allowed, count=2), function)
    assert found[5].tolist() == [0, 1, 1, 1, 1, 2, 2, 3, 3, 0, 0, 0]
    wrong = found[5] != 0
    assert (found[0][wrong] == 0).all() and (found[3][wrong] == -1).all()
    assert found[1][wrong].isnan().all() and found[2][wrong].isnan().all() and found[4][wrong].isnan().all()
    for before, after in zip(clean, found, strict=True):
        assert torch.equal(before[~wrong], after[~wrong])


@KERNEL_AND_TWIN
def test_scores_so_large_that_a_step_of_float32_is_thousands(device: torch.device, function: str):
    logits = torch.full((3, 40), -1e12)
    logits[:, 17] = 1e12
    logits[2, 30] = 1e12
    both = Sampling(top_k=5, top_p=0.5, min_p=0.1, seed=2)
    samplings = [Sampling(top_p=0.9, seed=1), both, Sampling(top_p=0.6, seed=3)]
    found = run(device, arguments(logits, samplings, [0] * 3), function)
    assert found[0][:2].tolist() == [17, 17] and found[0][2] in (17, 30)
    assert found[2].tolist() == pytest.approx([0, 0, -math.log(2)], abs=1e-6)


def test_a_row_does_not_depend_on_its_place(device: torch.device):
    generator, rng = torch.Generator().manual_seed(6), random.Random(6)
    logits = torch.randn(9, 600, generator=generator) * 2
    samplings = [Sampling(), *(some_sampling(rng, rng.getrandbits(64)) for _ in range(8))]
    given = arguments(logits, samplings, list(range(9)), [[n] for n in range(9)], count=2)
    together = run(device, given)
    order = torch.tensor([4, 8, 0, 2, 6, 1, 3, 5, 7])
    turned = run(device, tuple(x[order] if isinstance(x, Tensor) else x for x in given))
    alone = [run(device, tuple(x[[row]] if isinstance(x, Tensor) else x for x in given)) for row in range(9)]
    for n, result in enumerate(together):
        assert torch.equal(result[order], turned[n])
        assert torch.equal(result, torch.cat([one[n] for one in alone]))


def test_frequencies_follow_the_exact_probabilities(device: torch.device):
    """Many positions of one seed; of 12 ids 8 can be drawn. 24.32: chi-square, 7 degrees of freedom, 0.1 %."""
    n = 200 if device.type == "cpu" else 20_000
    logits = torch.linspace(1.0, -1.0, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(4))].expand(n, 12)
    found = run(device, arguments(logits, [Sampling(temperature=1.3, min_p=0.35, seed=6)] * n, list(range(n))))
    kept = logits[0].double() / 1.3
    expected = n * kept.masked_fill((kept - kept.max()).exp() < 0.35, -torch.inf).softmax(0)
    counts = torch.bincount(found[0], minlength=12)
    possible = expected > 0
    assert int(possible.sum()) == 8 and int(counts[~possible].sum()) == 0
    assert float(((counts - expected)[possible] ** 2 / expected[possible]).sum()) < 24.32


def test_scores_closer_than_float32_noise_are_told_apart(device: torch.device):
    """Two ids whose perturbed scores differ by the rounding of one logit, up to 1e-7, on either side."""
    rows = 48
    logits = torch.zeros(rows, 2)
    for row in range(rows):
        noise = gumbel_noise(1, row, torch.arange(2))
        logits[row, row % 2] = float(noise[1 - row % 2] - noise[row % 2])
    samplings = [Sampling(seed=1)] * rows
    found = run(device, arguments(logits, samplings, list(range(rows))))
    expected = sampler.sample(logits, samplings, range(rows), [()] * rows)
    assert found[0].tolist() == [choice.id for choice in expected]


@triton.jit
def _noises(HIGH, LOW, NARROW, WIDE, SEED, POSITION, RANDOM, N: tl.constexpr):
    at = tl.arange(0, N)
    high = tl.load(HIGH + at).to(tl.uint32)
    low = tl.load(LOW + at).to(tl.uint32)
    tl.store(NARROW + at, sampling_stages._gumbel(high, low, False))
    tl.store(WIDE + at, sampling_stages._gumbel(high, low, True))
    high, low = sampling_stages._bits_of(tl.load(SEED), tl.load(POSITION), at)
    tl.store(RANDOM + at, high.to(tl.int64) * 4294967296 + low.to(tl.int64))


def test_noise_is_the_plain_samplers_to_both_ends_of_64_bits(device: torch.device):
    n, seed, position = 1024, -3, -(2**62) - 5  # as int64; as uint64 above 2**63
    generator = torch.Generator().manual_seed(8)
    high, low = (torch.randint(2**32, (n,), generator=generator) for _ in range(2))
    high[:200] >>= torch.arange(200) % 33  # v as small as 2**-64
    high[200:400] = 2**32 - 1 - (high[200:400] >> (torch.arange(200) % 33))  # and as near to 1
    high[400:402], low[400:402] = torch.tensor([0, 2**32 - 1]), torch.tensor([0, 2**32 - 1])
    narrow, wide = torch.full((n,), torch.nan), torch.full((n,), torch.nan, dtype=torch.float64)
    words = torch.zeros(n, dtype=torch.int64)
    key = torch.tensor([seed]), torch.tensor([position])
    moved = [x.to(device) for x in (high, low, narrow, wide, *key, words)]
    _noises[(1,)](*moved, N=n)
    narrow, wide, words = (moved[i].cpu() for i in (2, 3, 6))
    exact = gumbel_of_bits(high, low)
    assert exact.max() > 45 and exact.min() < -3.5
    assert (wide - exact).abs().max() < 1e-11
    sound = exact > -2.9  # below, float64 itself has lost the bits of 1 - v
    assert ((narrow - exact).abs() < 2.0**-21 * exact.abs().clamp(min=2))[sound].all()
    assert (narrow - exact).abs().max() < 0.2 and narrow.isfinite().all()
    c0, c1, _, _ = philox4x32(
        (torch.arange(n), *(torch.full((n,), x) for x in (position & WORD, position >> 32 & WORD, 0))),
        (seed & WORD, seed >> 32 & WORD),
    )
    assert torch.equal(words, c0 * 2**32 + c1)


def test_the_operator_is_registered_as_torch_demands(device: torch.device):
    logits = torch.randn(2, 100)
    given = arguments(logits, [Sampling(seed=1, top_k=3), Sampling()], [0, 1], [[1], [2]], logits > -9, count=2)
    moved = tuple(x.to(device) if isinstance(x, Tensor) else x for x in given)
    torch.library.opcheck(sampling.sample, moved)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x.double(), "logits torch.float64"),
        (0, lambda x: x.T.contiguous().T, "strides"),
        (1, lambda x: x.int(), "seeds is not torch.int64"),
        (3, lambda x: x.float(), "temperature is not torch.float64"),
        (4, lambda x: x[:1], "top_k is not torch.int32"),
        (8, lambda x: x[:, :-1], "seen is not torch.bool"),
        (9, lambda x: x[:, 1:], "allowed is not torch.int32"),
        (10, lambda x: -1, "count -1"),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(device: torch.device, place: int, change, message: str):
    logits = torch.zeros(2, 100)
    given = list(arguments(logits, [Sampling()] * 2, [0, 0], [[1], [2]], logits > -9))
    given[place] = change(given[place])
    with pytest.raises(ValueError, match=message):
        run(device, tuple(given))


COMPILE = """
import pathlib, re, subprocess, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minivlm.kernels.sampling import BLOCK, CHUNK, WARPS, _sample

TYPES = dict(SEEDS="*i64", POSITIONS="*i64", IDS="*i64", TOP_IDS="*i64", TEMPERATURE="*fp64", TOP_P="*fp64",
             MIN_P="*fp64", PENALTY="*fp64", TOP_K="*i32", ALLOWED="*i32", ERRORS="*i32", PLACES="*i32", SEEN="*u8",
             LOGPROBS="*fp32", SAMPLED="*fp32", TOP_LOGPROBS="*fp32", SCRATCH="*fp32")

def compile(arch, dtype, vocabulary, penalised, masked, count):
    constants = dict(PENALISED=penalised, MASKED=masked, COUNT=count, BLOCK=BLOCK, CHUNK=CHUNK)
    types = {**TYPES, "LOGITS": f"*{dtype}", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in _sample.arg_names}
    known = dict(V=vocabulary, stride_logits=vocabulary, stride_seen=vocabulary, stride_allowed=vocabulary // 32,
                 stride_scratch=-(-vocabulary // BLOCK) * BLOCK)  # as a launch specialises: what 16 divides
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or known.get(name, 1) % 16 == 0]
    source = ASTSource(_sample, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, GPUTarget("cuda", arch, 32), dict(num_warps=WARPS))

usual = ("bf16", True, True, 5)
for arch, other in ((80, ("fp16", False, False, 0)), (90, ("fp32", True, True, 20))):
    for vocabulary in (32064, 64064):
        for case in (usual, other):
            kernel = compile(arch, case[0], vocabulary, *case[1:])
            with tempfile.TemporaryDirectory() as folder:
                cubin = pathlib.Path(folder, "cubin")
                cubin.write_bytes(kernel.asm["cubin"])
                command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
                usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
            print(f"sm_{arch} V={vocabulary}", *case, registers, stack, kernel.metadata.shared)
"""


def test_compiles_for_gpus_that_are_not_here():
    """Registers of a thread, bytes of stack (which is what spills), bytes of shared memory: a block of 512 threads may
    have 128 registers each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    for line in lines:
        registers, stack, shared = map(int, line.split()[-3:])
        assert registers <= 128 and stack <= 16 and shared <= 48 * 1024, line
