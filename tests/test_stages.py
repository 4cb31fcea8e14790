"""The comparison of two runs: what counts as equal, what a limit allows, how a failure is told."""

import json
import math

import pytest
import torch

from minivlm.stages import GREEDY_LOGITS, GREEDY_TOKENS, Report, Stages, compare, relative_differences

NAN, INF = math.nan, math.inf


def one(ours, theirs, limit: float = 0.0):
    (difference,) = compare(Stages({"stage": torch.as_tensor(ours)}), Stages({"stage": torch.as_tensor(theirs)}), limit)
    return difference


def test_the_largest_difference_is_measured_by_the_largest_value():
    difference = one([[1.0, 2.0], [3.0, -7.5]], [[1.0, 2.5], [3.0, -8.0]])
    assert (difference.absolute, difference.relative) == (0.5, 0.0625)
    assert difference.verdict == "departs" and difference.shape == (2, 2)
    assert difference.detail == "farthest at [0, 1]: 2 in minivlm, 2.5 in transformers"
    assert one([1.0, -7.5], [1.0, -8.0], 0.0625).verdict == "within"
    assert one([1.0, -7.5], [1.0, -8.0], 0.0624).verdict == "departs"


def test_the_last_bit_of_every_type_is_seen():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        value = torch.tensor([3.0, 1.0], dtype=dtype)
        following = torch.tensor([3.0, 1.0 + torch.finfo(dtype).eps], dtype=dtype)
        assert one(value, value.clone()).verdict == "equal"
        assert one(following, value).absolute == torch.finfo(dtype).eps
    assert one([2**40 + 1], [2**40]).absolute == 1


@pytest.mark.parametrize(
    "ours, theirs, absolute, verdict",
    [
        ([NAN, 1.0], [NAN, 1.0], 0.0, "equal"),
        ([INF, -INF], [INF, -INF], 0.0, "equal"),
        ([NAN, 1.0], [1.0, 1.0], NAN, "departs"),
        ([1.0, 1.0], [1.0, NAN], NAN, "departs"),
        ([INF, 1.0], [1.0, 1.0], INF, "departs"),
        ([INF, 1.0], [-INF, 1.0], INF, "departs"),
        ([0.0, 0.5], [0.0, 0.0], 0.5, "departs"),
    ],
)
def test_what_is_not_finite_must_be_the_same(ours, theirs, absolute, verdict):
    difference = one(ours, theirs, 0.1)
    assert difference.absolute == pytest.approx(absolute, nan_ok=True) and difference.verdict == verdict
    text = json.dumps(Report({"model": "m"}, (difference,)).to_json(), allow_nan=False)
    assert json.loads(text)["ok"] == (verdict == "equal")


@pytest.mark.parametrize("theirs", [torch.ones(3), torch.ones(1, 2), torch.ones(2, dtype=torch.bfloat16)])
def test_another_shape_or_type_departs_at_any_limit(theirs):
    difference = one(torch.ones(2), theirs, INF)
    assert difference.verdict == "departs" and difference.relative is None
    assert difference.detail.startswith("torch.float32 [2] in minivlm, torch.")


def test_a_stage_that_one_run_lacks_is_a_failure():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    differences = compare(Stages({"a": a, "b": b}), Stages({"a": a, "c": c}), INF)
    assert [(d.stage, d.shape, d.verdict) for d in differences] == [
        ("a", (1,), "equal"),
        ("b", (2,), "missing"),
        ("c", (3,), "missing"),
    ]
    report = Report({}, differences)
    assert not report.ok and report.lines()[-1] == "parity fails, first at b: transformers has no such stage"
    assert "minivlm has no such stage" in report.lines()[-2]


def test_each_stage_has_its_own_limit_and_none_is_zero():
    ours, theirs = Stages({"a": torch.tensor([1.01])}), Stages({"a": torch.tensor([1.0])})
    assert compare(ours, theirs, {"a": 0.02})[0].verdict == "within"
    assert compare(ours, theirs, {"b": 0.02})[0].verdict == "departs"
    assert relative_differences(ours, theirs) == {"a": pytest.approx(0.01, rel=1e-4)}


def greedy(tokens: list[int], logits: list[list[float]]) -> Stages:
    return Stages({GREEDY_LOGITS: torch.tensor(logits), GREEDY_TOKENS: torch.tensor(tokens)})


# At the second step the two best logits lie 0.25 apart in one run and 0.125 in the other, of at most 8.
OURS = greedy([0, 1, 2], [[8.0, 0.0, 1.0], [4.0, 4.25, 0.0], [0.0, 0.0, 9.0]])
THEIRS = greedy([0, 0, 1], [[8.0, 0.0, 1.0], [4.125, 4.0, 0.0], [0.0, 5.0, 0.0]])


def test_the_first_other_token_is_told_with_the_gap_of_the_best_logits():
    logits, tokens = compare(OURS, THEIRS, 0.0)
    assert (logits.absolute, logits.shape) == (0.25, (2, 3))  # the third step follows another text
    assert tokens.verdict == "departs"
    assert tokens.detail == ("token 1 is 1 in minivlm (its two best logits 0.25 apart), 0 in transformers (0.12 apart)")
    assert tokens.detail in "\n".join(Report({}, (logits, tokens)).lines())


@pytest.mark.parametrize("limit, verdict", [(0.125 / 16 - 1e-6, "departs"), (0.125 / 16, "within")])
def test_tokens_may_differ_only_where_the_limit_covers_the_gap(limit, verdict):
    assert compare(OURS, THEIRS, limit)[1].verdict == verdict


def test_an_answer_that_ends_early_departs():
    short = greedy([0, 1], [[8.0, 0.0, 1.0], [4.0, 4.25, 0.0]])
    tokens = compare(OURS, short, INF)[1]
    assert (tokens.verdict, tokens.detail) == ("departs", "3 tokens in minivlm, 2 in transformers")


def test_the_last_line_is_the_verdict():
    equal, near = one([1.0], [1.0]), one([1.0], [1.1], 0.2)
    assert Report({}, (equal,)).lines()[-1] == "parity: all 1 stages are equal bit for bit"
    expected = "parity: all 2 stages agree, 1 bit for bit and the rest within the limits"
    assert Report({}, (equal, near), ("careful",)).lines()[-2:] == ["note: careful", expected]
