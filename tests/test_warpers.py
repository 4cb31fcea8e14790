"""Typical-p against transformers; bias and penalties against sums written out in Python; what a bias may be."""

import dataclasses
import math
import random

import pytest
import torch
from warpers import shifted_by_hand, transformers_warpers

from minivlm.errors import InputError
from minivlm.sampler import Sampling, sample, warp

NONE_SEEN = torch.zeros(1, 1, dtype=torch.long)


# ---- typical-p


def kept_of(probabilities: list[float], typical_p: float) -> list[int]:
    return (
        warp(torch.tensor(probabilities).log(), (), Sampling(typical_p=typical_p)).isfinite().nonzero()[:, 0].tolist()
    )


def test_typical_ids_are_those_of_the_expected_surprise():
    """Surprises of 1, 2, 3 and 3 bits, an entropy of 1.75."""
    probabilities = [0.5, 0.25, 0.125, 0.125]
    assert kept_of(probabilities, 0.2) == [1]  # the best goes
    assert kept_of(probabilities, 0.3) == kept_of(probabilities, 0.7) == [0, 1]
    assert kept_of(probabilities, 0.8) == kept_of(probabilities, 1.0) == [0, 1, 2, 3]
    assert kept_of([0.9, 0.1, 0.0], 0.9999) == [0, 1]  # what has no probability has no surprise
    assert kept_of([0.25] * 4, 0.01) == [0, 1, 2, 3]


@pytest.mark.parametrize("vocabulary", [7, 700, 32_064])
def test_typical_p_equals_transformers(vocabulary):
    generator, rng = torch.Generator().manual_seed(vocabulary), random.Random(vocabulary)
    for _ in range(40):
        mass, width = rng.choice([1e-9, 0.05, 0.2, 0.5, 0.9, 0.95, 0.999]), rng.choice([0.3, 2.0, 6.0])
        logits = torch.randn(2, vocabulary, generator=generator) * width
        logits[torch.rand(logits.shape, generator=generator) < 0.2] = -math.inf
        logits[:, 3] = 0.0
        sampling = Sampling(typical_p=mass)
        expected = transformers_warpers(sampling)(NONE_SEEN, logits.clone())
        assert torch.equal(torch.stack([warp(row, (), sampling) for row in logits]), expected), (mass, width)


def test_equal_scores_share_one_fate_wherever_they_stand():
    generator, rng = torch.Generator().manual_seed(1), random.Random(1)
    for _ in range(200):
        logits = torch.randint(-3, 4, (40,), generator=generator).float()
        sampling = Sampling(typical_p=rng.choice([0.1, 0.4, 0.7, 0.95]))
        ours = warp(logits, (), sampling)
        theirs = transformers_warpers(sampling)(NONE_SEEN, logits[None].clone())[0]
        assert not (theirs.isfinite() & ~ours.isfinite()).any()
        kept, gone = set(ours[ours.isfinite()].tolist()), set(logits[~ours.isfinite()].tolist())
        assert not kept & gone
        order = torch.randperm(40, generator=generator)
        assert torch.equal(warp(logits[order], (), sampling), ours[order])


# ---- bias and penalties


def test_bias_and_penalties_equal_sums_by_hand():
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(200):
        vocabulary = rng.choice([5, 50])
        logits = torch.randn(vocabulary, generator=generator) * 3
        seen = [rng.randrange(vocabulary + 2) for _ in range(rng.randrange(30))]  # two ids that the head lacks
        start = rng.randint(0, len(seen))
        sampling = Sampling(
            temperature=rng.choice([None, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.7]),
            frequency_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
            presence_penalty=rng.choice([0, rng.uniform(-2, 2)]),
            logit_bias={rng.randrange(vocabulary): rng.uniform(-100, 100) for _ in range(rng.randrange(4))},
        )
        expected = shifted_by_hand(logits.tolist(), seen, start, sampling)
        assert warp(logits, seen, sampling, start=start).tolist() == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_the_prompt_does_not_count_and_a_row_without_one_is_all_answer():
    logits, seen = torch.tensor([2.0, 2.0, 2.0, 2.0]), (0, 0, 1, 1, 1, 2)
    asked = Sampling(frequency_penalty=0.5, presence_penalty=1.0)
    assert warp(logits, seen, asked, start=3).tolist() == [2.0, 0.0, 0.5, 2.0]
    assert warp(logits, seen, asked).tolist() == [0.0, -0.5, 0.5, 2.0]
    assert warp(logits, seen, asked, start=6).tolist() == logits.tolist()
    rows = [sample(logits[None], [asked], [6], [seen], None, starts)[0] for starts in ([3], None, [6])]
    assert [row.id for row in rows] == [0, 3, 0]
    assert warp(logits, (1, 1), Sampling(frequency_penalty=-2.0)).tolist() == [2.0, 6.0, 2.0, 2.0]


def test_they_come_before_temperature_and_top_k_and_behind_what_is_allowed():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    allowed = torch.tensor([False, True, True, True])
    asked = Sampling(temperature=0.5, top_k=1, logit_bias={0: 100, 3: 5}, frequency_penalty=1.0)
    assert warp(logits, (3, 3), asked, allowed).tolist() == [-math.inf, -math.inf, -math.inf, 6.0]
    # The bias comes before the repetition penalty, which then divides 4 and not 2.
    asked = Sampling(repetition_penalty=2.0, logit_bias={1: 2}, presence_penalty=1.0)
    assert warp(logits, (1,), asked).tolist() == [3.0, 1.0, 1.0, 0.0]


def test_log_probabilities_of_shifted_scores():
    logits = torch.tensor([2.0, 1.0, 0.0])
    raw, forced = logits.log_softmax(0).tolist(), torch.tensor([2.0, 1.0, 4.0]).log_softmax(0).tolist()
    (choice,) = sample(logits[None], [Sampling(logit_bias={2: 4}, top_logprobs=1)], [0], [()])
    assert (choice.id, choice.alternatives) == (2, ((0, raw[0]),))
    assert (choice.logprob, choice.sampled_logprob) == pytest.approx((raw[2], forced[2]))


# ---- what a bias may be


def test_equal_biases_are_equal_settings():
    one, other = Sampling(logit_bias={7: 1, 3: -5.5, 4: 0}), Sampling(logit_bias={3: -5.5, 7: 1.0})
    assert one == other and hash(one) == hash(other) and one.logit_bias == ((3, -5.5), (7, 1.0))
    assert dataclasses.replace(one, top_logprobs=2).logit_bias == one.logit_bias
    assert Sampling(logit_bias={4: 0}) == Sampling() != one and Sampling(logit_bias={}).plain
    given = {1: 2}
    kept = Sampling(logit_bias=given)
    given[1] = 5
    assert kept.logit_bias == ((1, 2.0),)
    for asked in ({"logit_bias": {0: 1}}, {"frequency_penalty": 1}, {"presence_penalty": -1}):
        assert Sampling(**asked).greedy and not Sampling(**asked).plain


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({5: 100.5}, "logit_bias of id 5: found 100.5, expected a number from -100 to 100"),
        ({5: math.nan}, "logit_bias of id 5: found nan, expected"),
        ({5: True}, "logit_bias of id 5: found True, expected"),
        ({5: "1"}, "logit_bias of id 5: found '1', expected"),
        ({-1: 1}, "logit_bias: found id -1, expected an integer of at least 0"),
        ({"5": 1}, "logit_bias: found id '5', expected an integer of at least 0"),
        ({True: 1}, "logit_bias: found id True, expected"),
        (None, "logit_bias: found None, expected a mapping of ids to numbers"),
        ([(5, 1)], r"logit_bias: found \[\(5, 1\)\], expected a mapping"),
        ((5, 1), r"logit_bias: found \(5, 1\), expected a mapping"),
        (((5, 1), (5, 2)), "logit_bias: found an id twice, expected each once"),
    ],
)
def test_what_is_no_bias_is_named(bias, message):
    with pytest.raises(InputError, match=f"^{message}"):
        Sampling(logit_bias=bias)


def test_an_id_without_a_score_gets_no_bias():
    with pytest.raises(InputError, match="logit_bias: found id 4, expected ids below 4, the vocabulary's size"):
        warp(torch.zeros(4), (), Sampling(logit_bias={0: 1, 4: 1}))
    for asked in (Sampling(frequency_penalty=1), Sampling(presence_penalty=1)):
        with pytest.raises(InputError, match="seen: found id -1, expected ids of at least 0"):
            warp(torch.zeros(4), (2, -1), asked)
