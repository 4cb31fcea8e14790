"""The held-out table: what is asked, how answers are scored, and what counts as reached."""

from dataclasses import dataclass

import pytest

from minivlm.answer import Reply, Token
from minivlm.errors import InputError
from minivlm.evaluate import heldout
from minivlm.evaluate.heldout import REQUIRED, SCENE, Answer, Report, Row, drawn, evaluate, rows
from minivlm.train import questions
from minivlm.train.questions import KINDS


@dataclass
class Scripted:
    """Stands for a pipeline: gives the listed answers in turn, and keeps what it was asked."""

    answers: list[str]

    def __post_init__(self):
        self.requests, self.sizes, self.settings = [], [], []

    def generate_batch(self, requests, **settings):
        self.requests += requests
        self.sizes.append(len(requests))
        self.settings.append(settings)
        texts = [self.answers.pop(0) for _ in requests]
        return [Reply((Token(5, text, -0.1, -0.1, (), "stop"),), 10, None, 0.1, 0.1) for text in texts]


def truth(kind: str, index: int, seed: int = 0) -> str:
    return questions.heldout(kind, index, seed)[1].answer


@pytest.mark.parametrize("kind", KINDS)
def test_true_answers_score_1_and_others_less(kind):
    scripted = Scripted([truth(kind, 0), "?", truth(kind, 2)])
    answers = evaluate(scripted, [kind], 3, batch=2)
    assert [answer.score for answer in answers] == [1.0, 0.0, 1.0]
    assert answers[1].answer == "?" and answers[1].expected == truth(kind, 1)
    assert scripted.sizes == [2, 1]
    assert all(settings == {"max_new_tokens": heldout.MAX_NEW_TOKENS} for settings in scripted.settings)  # greedy


def test_the_pictures_are_those_of_the_questions():
    scripted = Scripted(["?"] * 2)
    answers = evaluate(scripted, ["count"], 2, seed=3)
    for index, ((question, (picture,)), answer) in enumerate(zip(scripted.requests, answers, strict=True)):
        scene, qa = questions.heldout("count", index, 3)
        assert (question, answer.question, answer.expected, answer.group) == (
            qa.question,
            question,
            qa.answer,
            qa.extra,
        )
        assert (picture == drawn(scene, SCENE)).all()


def test_another_renderer_draws_the_same_questions():
    scripted = Scripted(["?"] * 4)
    evaluate(scripted, ["shape"], 2)
    evaluate(scripted, ["shape"], 2, "outline")
    (first, second), (third, fourth) = scripted.requests[:2], scripted.requests[2:]
    assert (first[0], second[0]) == (third[0], fourth[0])
    assert max(third[1][0].shape) == 480 and first[1][0].shape != third[1][0].shape


def test_a_model_is_asked_what_a_user_would_ask(tiny_of):
    vlm = tiny_of("next-mistral").vlm
    (found,) = evaluate(vlm, ["position"], 1)
    scene, qa = questions.heldout("position", 0, 0)
    assert found.answer == vlm.generate(qa.question, [drawn(scene, SCENE)], max_new_tokens=heldout.MAX_NEW_TOKENS).text


def test_no_true_answer_is_cut_off(tiny_of):
    # A token of the tiny vocabulary is at most a word; the shipped one has a token for every word of the world.
    longest = max((truth("describe", index) for index in range(60)), key=len)
    assert len(longest.replace(",", " ,").split()) < heldout.MAX_NEW_TOKENS


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["smell"], 1), "unknown kind of question 'smell'"),
        ((["shape"], 1, "crayon"), "unknown renderer 'crayon'"),
        ((["shape"], 0), "count: found 0, expected at least 1"),
        ((["shape"], 1, SCENE, -1), "seed: found -1, expected at least 0"),
        ((["shape"], 1, SCENE, 0, 0), "batch: found 0, expected at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(Scripted(["?"]), *arguments)


def answers_of(kind: str, *scored: tuple[str, float]) -> tuple[Answer, ...]:
    return tuple(Answer(kind, group, "?", "", "", score) for group, score in scored)


def test_rows_are_means_of_kinds_and_their_groups():
    presence = answers_of("presence", ("yes", 1.0), ("no", 0.0), ("yes", 0.0), ("no", 0.0))
    box = answers_of("box", ("2 objects", 0.5), ("3 objects", 0.4))
    text = answers_of("text", ("3 characters", 1.0), ("2 characters", 0.0))
    assert rows((*presence, *box, *text)) == [
        Row("presence", "", 4, 0.25),
        Row("presence", "yes", 2, 0.5),
        Row("presence", "no", 2, 0.0),
        Row("box", "", 2, 0.45),
        Row("box", "IoU >= 0.5", 2, 0.5),
        Row("text", "", 2, 0.5),
        Row("text", "2 characters", 1, 0.0),
        Row("text", "3 characters", 1, 1.0),
    ]


def at_threshold(change: float) -> tuple[Answer, ...]:
    """Answers that meet every requirement exactly, but for shape, which is off by `change`."""
    scores = dict(REQUIRED) | {("shape", ""): REQUIRED["shape", ""] + change}
    return tuple(Answer(kind, group, "?", "", "", score) for (kind, group), score in scores.items())


def test_a_required_score_is_reached_at_the_threshold_and_missed_below():
    reached, missed = Report("m", 0, {SCENE: at_threshold(0.0)}), Report("m", 0, {SCENE: at_threshold(-0.01)})
    assert reached.ok and not missed.ok
    assert [row.kind for row in missed.short] == ["shape"]
    assert reached.lines()[-1] == "8 of 8 required scores reached"
    assert missed.lines()[-1] == "7 of 8 required scores reached"
    assert next(line for line in missed.lines() if line.startswith("shape")).endswith("89.0   90 FAIL")


def test_each_answer_of_presence_is_required_by_itself():
    always_yes = answers_of("presence", *[("yes", 1.0)] * 99, ("no", 0.0))
    assert [row.group for row in Report("m", 0, {SCENE: always_yes}).short] == ["no"]


def test_only_the_training_renderer_is_required():
    good, bad = at_threshold(0.0), at_threshold(-0.5)
    assert Report("m", 0, {"jpeg": bad, SCENE: good}).ok
    assert not Report("m", 0, {"jpeg": good}).ok  # nothing required was measured
    table = Report("m", 0, {"jpeg": bad, SCENE: good}).to_json()["scores"]
    assert [row["required"] for row in table["jpeg"]] == [None] * len(table["jpeg"])
    assert {row["required"] for row in table[SCENE]} == {None, 0.7, 0.8, 0.9}
