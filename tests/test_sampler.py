"""The sampler against transformers' processors and exact probabilities."""

import dataclasses
import math
import random

import pytest
import torch
from warpers import transformers_warpers

from minivlm.errors import InputError, NumericError
from minivlm.sampler import RANGES, Choice, Sampling, sample, warp


def draw(logits: torch.Tensor, sampling: Sampling, position: int = 0, seen: tuple[int, ...] = ()) -> Choice:
    return sample(logits[None], [sampling], [position], [seen])[0]


def random_sampling(rng: random.Random) -> Sampling:
    return Sampling(
        temperature=rng.choice([None, 0.01, 0.3, 0.7, 1.0, 1.7, 30.0]),
        top_k=rng.choice([None, 1, 2, 7, 50, 10_000]),
        top_p=rng.choice([None, 1e-9, 0.05, 0.5, 0.9, 0.999, 1.0]),
        min_p=rng.choice([None, 0.0, 0.02, 0.3, 1.0]),
        typical_p=rng.choice([None, None, 1e-9, 0.2, 0.9, 0.999, 1.0]),
        repetition_penalty=rng.choice([1.0, 0.5, 1.1, 2.0]),
        seed=0,
    )


def test_scores_equal_transformers_on_random_rows():
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(300):
        sampling = random_sampling(rng)
        vocabulary = rng.choice([5, 64, 1000])
        logits = torch.randn(8, vocabulary, generator=generator) * rng.choice([0.5, 3.0, 12.0])
        seen = torch.randint(vocabulary, (8, 12), generator=generator)
        expected = transformers_warpers(sampling)(seen, logits.clone())
        for row in range(8):
            ours = warp(logits[row], seen[row].tolist(), sampling)
            assert torch.equal(ours, expected[row]), sampling


def test_scores_equal_transformers_at_a_real_vocabulary():
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    for _ in range(40):
        sampling = random_sampling(rng)
        logits = torch.randn(1, 32_064, generator=generator) * 4
        seen = torch.randint(32_064, (1, 300), generator=generator)
        expected = transformers_warpers(sampling)(seen, logits.clone())[0]
        ours = warp(logits[0], seen[0].tolist(), sampling)
        # A float32 row this long may hold two equal scores at the boundary; nothing but those may be added.
        extra = ours.isfinite() & ~expected.isfinite()
        assert torch.equal(ours[~extra], expected[~extra]), sampling
        assert not extra.any() or set(ours[extra].tolist()) == {float(expected[expected.isfinite()].min())}


def test_order_is_top_k_then_top_p_then_min_p_then_typical_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two that top-k keeps, .4 is 4/7 = 57 %: enough for 0.55. Of all four it would not be.
    assert warp(logits, (), Sampling(top_k=2, top_p=0.55)).isfinite().tolist() == [True, False, False, False]
    assert warp(logits, (), Sampling(top_p=0.55)).isfinite().tolist() == [True, True, False, False]
    # min-p comes after the temperature: .1 is 25 % of .4 at temperature 1, 50 % at temperature 2.
    assert warp(logits, (), Sampling(min_p=0.4)).isfinite().tolist() == [True, True, True, False]
    assert warp(logits, (), Sampling(temperature=2.0, min_p=0.4)).isfinite().all()
    # Of all four .3 is the most typical; of the .4 and .3 that min-p keeps, .4.
    assert warp(logits, (), Sampling(typical_p=0.1)).isfinite().tolist() == [False, True, False, False]
    assert warp(logits, (), Sampling(min_p=0.7, typical_p=0.1)).isfinite().tolist() == [True, False, False, False]


def test_boundary_ties_are_all_kept_wherever_they_stand():
    for turn in range(4):
        logits = torch.tensor([0.4, 0.2, 0.2, 0.2]).roll(turn).log()
        assert warp(logits, (), Sampling(top_p=0.5)).isfinite().all()
        assert warp(logits, (), Sampling(top_k=2)).isfinite().all()
        assert warp(logits, (), Sampling(typical_p=0.3)).isfinite().tolist() == (logits < math.log(0.3)).tolist()
        assert int(warp(logits, (), Sampling(top_k=1)).isfinite().sum()) == 1


def test_tie_closure_contains_transformers_and_adds_only_equals():
    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    grown = 0
    for _ in range(300):
        sampling = Sampling(top_k=rng.choice([None, 5, 20]), top_p=rng.choice([0.3, 0.6, 0.9]))
        logits = torch.randint(-3, 4, (1, 40), generator=generator).float()
        theirs = transformers_warpers(sampling)(torch.zeros(1, 1, dtype=torch.long), logits)[0].isfinite()
        ours = warp(logits[0], (), sampling).isfinite()
        assert not (theirs & ~ours).any()
        extra = logits[0][ours & ~theirs]
        assert set(extra.tolist()) <= {float(logits[0][theirs].min())}
        grown += len(extra) > 0
    assert grown > 100


def test_repetition_penalty_counts_an_id_once_and_ignores_ids_the_head_lacks():
    logits = torch.tensor([3.0, -3.0, 3.0, -3.0])
    warped = warp(logits, (0, 0, 0, 1, 4, 32_000), Sampling(repetition_penalty=2.0))
    assert warped.tolist() == [1.5, -6.0, 3.0, -3.0]
    with pytest.raises(InputError, match="seen: found id -1"):
        warp(logits, (2, -1), Sampling(repetition_penalty=2.0))


def test_allowed_comes_before_every_other_warper():
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    allowed = torch.tensor([False, True, True, True])
    assert warp(logits, (), Sampling(top_k=2), allowed).isfinite().tolist() == [False, True, True, False]
    assert sample(logits[None], [Sampling()], [0], [()], allowed)[0].id == 1
    for seed in range(50):
        assert sample(logits[None], [Sampling(seed=seed)], [0], [()], allowed[None])[0].id != 0


def test_arguments_are_not_written_to():
    logits = torch.tensor([5.0, 4.0, -3.0, 2.0])
    before = logits.clone()
    everything = {"top_k": 2, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.3}
    everything |= {"frequency_penalty": 1.0, "presence_penalty": 1.0, "logit_bias": {1: 2.0}}
    warp(logits, (0, 2), Sampling(0.5, **everything), logits > 0)
    assert torch.equal(logits, before)


CHI_SQUARE = {3: 16.27, 4: 18.47, 5: 20.52, 7: 24.32, 11: 31.26}  # 0.1 % critical values by degrees of freedom


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(seed=1), 12),
        (Sampling(top_p=0.85, seed=4), 8),
        (Sampling(min_p=0.45, seed=5), 5),
        (Sampling(typical_p=0.6, seed=3), 6),
        (Sampling(temperature=0.8, top_k=6, top_p=0.8, repetition_penalty=1.2, seed=6), 4),
    ],
)
def test_frequencies_follow_the_exact_probabilities(sampling: Sampling, kept: int):
    logits = torch.linspace(1.0, -1.0, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(4))]
    n, seen = 3000, (3, 5)
    choices = sample(logits.expand(n, 12), [sampling] * n, range(n), [seen] * n)
    counts = torch.bincount(torch.tensor([choice.id for choice in choices]), minlength=12)
    warped = transformers_warpers(sampling)(torch.tensor([seen]), logits[None].clone())[0]
    expected = n * warped.double().softmax(dim=-1)
    possible = expected > 0
    assert int(possible.sum()) == kept
    assert int(counts[~possible].sum()) == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert float(statistic) < CHI_SQUARE[kept - 1]


def test_a_choice_is_replayed_and_every_argument_matters():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(5))
    seen = [tuple(range(0, 500, 2))] * 40

    def ids(sampling: Sampling, first: int = 0, scale: float = 1.0) -> list[int]:
        rows = (logits * scale).expand(40, 500)
        return [c.id for c in sample(rows, [sampling] * 40, range(first, first + 40), seen)]

    base = ids(Sampling(seed=8))
    assert base == ids(Sampling(seed=8)) == ids(Sampling(temperature=1.0, seed=8))
    others = [ids(Sampling(seed=9)), ids(Sampling(seed=8), first=1000), ids(Sampling(seed=8), scale=2.0)]
    options = {"temperature": 0.3, "top_k": 20, "top_p": 0.3, "min_p": 0.3, "typical_p": 0.3, "repetition_penalty": 3.0}
    options |= {"frequency_penalty": 2.0, "presence_penalty": 2.0, "logit_bias": {7: 5.0}}
    others += [ids(Sampling(seed=8, **{name: value})) for name, value in options.items()]
    assert all(other != base for other in others)
    assert ids(Sampling(seed=8), first=1)[:39] == base[1:]  # the noise hangs on the position, not on the row


def test_a_row_does_not_depend_on_its_neighbours():
    generator, rng = torch.Generator().manual_seed(6), random.Random(6)
    logits = torch.randn(20, 300, generator=generator)
    samplings = [Sampling(), Sampling(logit_bias={5: 3.0}), *(random_sampling(rng) for _ in range(18))]
    for row in range(2, 20, 3):
        added = {"frequency_penalty": rng.uniform(-2, 2), "presence_penalty": rng.uniform(-2, 2)}
        samplings[row] = dataclasses.replace(samplings[row], **added, logit_bias={rng.randrange(300): 4.0})
    positions = [rng.randrange(4000) for _ in range(20)]
    seen = [tuple(rng.randrange(300) for _ in range(30)) for _ in range(20)]
    starts = [rng.randrange(31) for _ in range(20)]
    allowed = torch.rand(20, 300, generator=generator) < 0.9
    together = sample(logits, samplings, positions, seen, allowed, starts)
    turned = sample(logits.flip(0), samplings[::-1], positions[::-1], seen[::-1], allowed.flip(0), starts[::-1])
    for row in range(20):
        alone = sample(logits[[row]], [samplings[row]], [positions[row]], [seen[row]], allowed[row], [starts[row]])
        assert together[row] == alone[0] == turned[19 - row]


def test_greedy_takes_the_lowest_id_of_equals():
    generator = torch.Generator().manual_seed(7)
    for vocabulary in (7, 100, 32_064):
        logits = torch.randint(0, 3, (vocabulary,), generator=generator).float()
        assert draw(logits, Sampling()).id == logits.tolist().index(float(logits.max()))
    assert draw(torch.zeros(32_064), Sampling(temperature=0)).id == 0


def test_log_probabilities_raw_and_warped():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    raw = logits.double().log_softmax(dim=-1)
    greedy = draw(logits, Sampling())
    assert greedy.logprob == greedy.sampled_logprob == pytest.approx(float(raw[0]), abs=1e-6)
    penalised = draw(logits, Sampling(repetition_penalty=4.0), seen=(0,))  # 2 becomes 0.5
    expected = torch.tensor([0.5, 1.0, 0.0, -1.0], dtype=torch.float64).log_softmax(dim=-1)
    assert penalised.id == 1
    assert penalised.logprob == pytest.approx(float(raw[1]), abs=1e-6)
    assert penalised.sampled_logprob == pytest.approx(float(expected[1]), abs=1e-6)
    drawn = draw(logits, Sampling(temperature=0.5, top_k=2, seed=0))
    expected = (logits[:2].double() / 0.5).log_softmax(dim=-1)
    assert drawn.logprob == pytest.approx(float(raw[drawn.id]), abs=1e-6)
    assert drawn.sampled_logprob == pytest.approx(float(expected[drawn.id]), abs=1e-6)
    assert draw(logits, Sampling(top_k=1, seed=0)).sampled_logprob == 0.0


def test_alternatives_are_the_best_allowed_ids_by_raw_probability():
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, -math.inf, 2.0])
    raw = logits.log_softmax(dim=-1).tolist()
    chosen = draw(logits, Sampling(temperature=9.0, top_logprobs=3, seed=0))
    assert chosen.alternatives == ((1, raw[1]), (3, raw[3]), (5, raw[5]))
    everything = draw(logits, Sampling(top_logprobs=20)).alternatives
    assert [token_id for token_id, _ in everything] == [1, 3, 5, 2, 0]  # id 4 has probability zero
    masked = sample(logits[None], [Sampling(top_logprobs=2)], [0], [()], torch.arange(6) != 1)[0]
    assert masked.alternatives == ((3, raw[3]), (5, raw[5]))  # still of the raw distribution
    assert draw(logits, Sampling()).alternatives == ()


def test_half_precision_logits_are_read_as_float32():
    logits = torch.randn(64, generator=torch.Generator().manual_seed(8)).bfloat16()
    assert draw(logits, Sampling(top_p=0.8, seed=3)) == draw(logits.float(), Sampling(top_p=0.8, seed=3))


def test_what_asks_for_sampling():
    for options in (
        {},
        {"temperature": 0},
        {"temperature": 0.0, "repetition_penalty": 1.1, "top_logprobs": 5},
        {"temperature": 0, "frequency_penalty": 1, "presence_penalty": -1, "logit_bias": {3: 1}},
    ):
        assert Sampling(**options).greedy and Sampling(**options).seeded().seed is None
    for options in ({"temperature": 1.0}, {"top_k": 1}, {"top_p": 1.0}, {"min_p": 0.0}, {"typical_p": 1}, {"seed": 0}):
        assert not Sampling(**options).greedy
    assert Sampling(seed=0).seeded().seed == 0


def test_seeded_draws_a_fresh_64_bit_seed_and_nothing_else():
    sampling = Sampling(temperature=0.7, top_p=0.9)
    seeds = {sampling.seeded().seed for _ in range(64)}
    assert len(seeds) == 64
    assert max(seeds) >= 2**58  # a 32-bit seed would never get there
    assert dataclasses.replace(sampling.seeded(), seed=None) == sampling
    with pytest.raises(InputError, match="seed: found None"):
        draw(torch.zeros(4), sampling)


def test_temperature_zero_beside_a_sampling_option_is_an_error():
    for name, value in {"top_k": 5, "top_p": 1.0, "min_p": 0.1, "typical_p": 0.5, "seed": 3}.items():
        with pytest.raises(InputError, match=f"^temperature: found 0, which is greedy, beside {name}="):
            Sampling(temperature=0, **{name: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "0.7", True, 10**400]),
        ("top_k", [0, -1, 1.0, math.nan, True, "5"]),
        ("top_p", [0, -0.1, 1.01, math.nan, True, "0.9"]),
        ("min_p", [-0.1, 1.01, math.nan, False, "0"]),
        ("typical_p", [0, -0.1, 1.01, math.nan, True, "0.9"]),
        ("repetition_penalty", [0, -1.0, math.nan, math.inf, True, None, "1"]),
        ("frequency_penalty", [-2.01, 2.01, math.nan, True, None, "1"]),
        ("presence_penalty", [-2.01, 2.01, -math.inf, False, None, "1"]),
        ("seed", [-1, 2**64, 1.0, True, "7"]),
        ("top_logprobs", [-1, 21, 2.0, True, None]),
    ],
)
def test_values_out_of_range_are_named(field: str, values: list):
    for value in values:
        with pytest.raises(InputError) as caught:
            Sampling(**{field: value})
        assert str(caught.value) == f"{field}: found {value!r}, expected {RANGES[field][3]}"


def test_values_at_the_ends_of_their_ranges_are_taken():
    logits = torch.tensor([1.0, 0.0, -1.0])
    ends = [
        Sampling(seed=2**64 - 1),
        Sampling(top_k=10**30, top_p=1, min_p=0, seed=0, top_logprobs=20),
        Sampling(temperature=10**300, seed=0),
        Sampling(temperature=1e-30, seed=0),
        Sampling(top_p=5e-324, min_p=1.0, seed=0),
        Sampling(typical_p=5e-324, top_k=1, frequency_penalty=-2, presence_penalty=2, logit_bias={0: 100}, seed=0),
    ]
    chosen = [draw(logits, sampling, position=2**64 - 1).id for sampling in ends]
    assert chosen[3:] == [0, 0, 0]


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9, seed=0)])
def test_logits_of_a_broken_model_name_row_and_position(fault: float, sampling: Sampling):
    logits = torch.zeros(3, 8)
    logits[1, 6] = fault
    with pytest.raises(NumericError, match=rf"row 1, position 42: the largest is {fault}"):
        sample(logits, [sampling] * 3, [41, 42, 43], [()] * 3)
    logits[1] = -math.inf
    with pytest.raises(NumericError, match=r"row 1, position 42: the largest is -inf"):
        sample(logits, [sampling] * 3, [41, 42, 43], [()] * 3)


def test_minus_infinity_is_never_chosen():
    logits = torch.full((9,), -math.inf)
    logits[4] = -80.0
    for sampling in (Sampling(), Sampling(temperature=5.0, seed=1), Sampling(top_k=9, min_p=0.0, seed=1)):
        assert draw(logits, sampling) == Choice(4, 0.0, 0.0, ())


def test_settings_that_overflow_float32_are_an_error():
    logits = torch.tensor([90.0, 1.0])
    for sampling in (Sampling(temperature=1e-40, seed=0), Sampling(repetition_penalty=1e-300)):
        with pytest.raises(InputError, match=r"temperature=.*repetition_penalty=.*float32"):
            draw(logits, sampling, seen=(0,))


def test_arguments_that_do_not_fit_are_an_error():
    logits, two = torch.zeros(2, 8), [Sampling(), Sampling()]
    with pytest.raises(InputError, match=r"found \(1, 2, 2\) rows, expected 2"):
        sample(logits, two[:1], [0, 0], [(), ()])
    with pytest.raises(InputError, match=r"allowed: found torch.bool \[7\]"):
        sample(logits, two, [0, 0], [(), ()], torch.ones(7, dtype=torch.bool))
    with pytest.raises(InputError, match=r"allowed: found torch.float32"):
        sample(logits, two, [0, 0], [(), ()], torch.ones(8))
    with pytest.raises(InputError, match="allowed: found no id"):
        sample(logits, two, [0, 0], [(), ()], torch.zeros(8, dtype=torch.bool))
    for starts in ([0], [0, 4], [-1, 0]):
        with pytest.raises(InputError, match=r"starts: found \[.*\], expected 2 numbers of prompt ids, .* \[3, 3\]"):
            sample(logits, two, [3, 3], [(1, 2, 3)] * 2, None, starts)
    with pytest.raises(InputError, match="position: found -1"):
        draw(logits[0], Sampling(seed=0), position=-1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_plain_greedy_rows_together_are_as_one_by_one(dtype):
    """Rows that ask for nothing else take a shorter way to the same choices, ties included."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 300, generator=generator).mul(4).to(dtype)
    logits[1, 7:40] = logits.max() + 1
    allowed = torch.rand(5, 300, generator=generator) < 0.5
    for mask in (None, allowed[0], allowed):
        together = sample(logits, [Sampling()] * 5, [9] * 5, [()] * 5, mask)
        with_more = sample(logits, [Sampling(top_logprobs=1)] * 5, [9] * 5, [()] * 5, mask)
        assert together == tuple(dataclasses.replace(choice, alternatives=()) for choice in with_more)
