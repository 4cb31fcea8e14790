"""The world's scenes and questions: repeatable, split by the printed string, every answer true."""

import re
from collections import Counter
from zlib import crc32

import numpy as np
import pytest

from minivlm.errors import InputError
from minivlm.train.answers import CELLS, box_text, cell, parsed_box, score
from minivlm.train.questions import KINDS, heldout, question_of_kind, questions
from minivlm.train.styles import COLOURS, SHAPES, colour_rgb
from minivlm.train.words import WORDS
from minivlm.train.world import scene

TRAIN = [scene("train", index, 11) for index in range(300)]
TEST = [scene("test", index, 11) for index in range(300)]


def asked(scenes):
    return [(drawn, qa) for i, drawn in enumerate(scenes) for qa in questions(drawn, np.random.default_rng(i))]


def test_a_scene_is_a_pure_function_of_split_index_and_seed():
    assert scene("train", 7, 11) == TRAIN[7]
    assert scene("train", 7, 12) != TRAIN[7] and scene("test", 7, 11) != TRAIN[7]
    assert questions(TRAIN[7], np.random.default_rng(1)) == questions(TRAIN[7], np.random.default_rng(1))


@pytest.mark.parametrize("split, scenes", [("train", TRAIN), ("test", TEST)])
def test_printed_strings_stay_on_their_side_of_the_held_out_rule(split, scenes):
    strings = [drawn.text.string for drawn in scenes if drawn.text is not None]
    assert len(strings) > 100
    for string in strings:
        assert re.fullmatch("[A-Z]{1,4}|[1-9][0-9]{0,3}", string) and string not in ("O", "I", "1")
        assert (len(string) >= 2 and crc32(string.encode()) % 5 == 0) == (split == "test")


def test_word_list_is_short_capital_words_without_repeats():
    assert len(WORDS) == len(set(WORDS)) >= 250
    assert all(re.fullmatch("[A-Z]{2,4}", word) for word in WORDS)


def test_mix_of_scenes():
    shapes = sum(drawn.text is None for drawn in TRAIN) / len(TRAIN)
    alone = sum(not drawn.objects for drawn in TRAIN) / len(TRAIN)
    assert abs(shapes - 0.55) < 0.1 and abs(alone - 0.25) < 0.1
    counts = Counter(len(drawn.objects) for drawn in TRAIN if drawn.text is None)
    assert sorted(counts) == [1, 2, 3, 4, 5] and min(counts.values()) > 15


def test_things_lie_inside_the_picture_and_apart():
    for drawn in TRAIN:
        boxes = [item.box for item in drawn.objects] + ([drawn.text.box] if drawn.text else [])
        for i, (x1, y1, x2, y2) in enumerate(boxes):
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            for u1, v1, u2, v2 in boxes[:i]:
                assert x2 < u1 or u2 < x1 or y2 < v1 or v2 < y1


def matching(drawn, phrase):
    """The shapes that a phrase such as "red star", "star" or "red shape" is true of."""
    words = set(re.sub(r"(cross)es$|([^s])s$", r"\1\2", phrase).split())
    return [item for item in drawn.objects if words <= {item.colour, item.shape, "shape"}]


def phrase_in(question):
    colours, shapes = "|".join(COLOURS), "|".join((*SHAPES, "shape", "object"))
    found = re.search(rf"\b((?:{colours}) )?(?:{shapes})(?:e?s)?\b", question)
    return found.group(0).replace("object", "shape") if found else None


@pytest.mark.parametrize("scenes", [TRAIN, TEST])
def test_every_answer_is_true(scenes):
    checked = Counter()
    for drawn, qa in asked(scenes):
        phrase = phrase_in(qa.question)
        found = matching(drawn, phrase) if phrase else []
        if qa.kind == "presence" and phrase:
            assert qa.answer == ("yes" if found else "no"), qa
        elif qa.kind == "count":
            assert qa.answer == str(len(drawn.objects)), qa
        elif qa.kind == "count_of":
            assert qa.answer == str(len(found)), qa
        elif qa.kind in ("box", "position", "colour") and phrase:
            (only,) = found
            truth = {"box": box_text(only.box), "position": cell(only.box, 0.0), "colour": only.colour}
            assert qa.answer == truth[qa.kind], qa
        elif qa.kind == "shape":
            (colour,) = (name for name in COLOURS if name in qa.question)
            assert [item.shape for item in drawn.objects if item.colour == colour] == [qa.answer], qa
        elif qa.kind == "region":
            where = re.search(r"\[.*\]", qa.question).group(0)
            items = [f"{i.colour} {i.shape}" for i in drawn.objects if box_text(i.box) == where]
            assert [qa.answer] == (items or [f"text {drawn.text.string}"]), qa
        elif qa.kind == "text":
            assert qa.answer == (drawn.text.string if drawn.text else "nothing"), qa
        elif qa.kind == "describe":
            names = [f"{i.colour} {i.shape}" for i in sorted(drawn.objects, key=lambda i: i.box[0] + i.box[2])]
            assert re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", qa.answer) == [
                tuple(name.split()) for name in names
            ], qa
        else:
            continue
        checked[qa.kind] += 1
    assert set(checked) == set(KINDS) - {"cell"}


def test_six_to_twelve_different_questions():
    for i, drawn in enumerate(TRAIN):
        wording = [qa.question for qa in questions(drawn, np.random.default_rng(i))]
        assert 6 <= len(wording) <= 12 and len(wording) == len(set(wording))


def test_yes_and_no_are_equally_common_where_there_are_shapes():
    answers = Counter(qa.answer for drawn, qa in asked(TRAIN) if qa.kind == "presence" and drawn.objects)
    assert 0.42 < answers["yes"] / answers.total() < 0.58


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_questions_are_repeatable_and_of_their_kind(kind):
    assert heldout(kind, 3, 5) == heldout(kind, 3, 5)
    drawn, qa = heldout(kind, 4, 5)
    assert qa.kind == kind and score(kind, qa.answer, qa.answer) == 1.0
    if kind in ("colour", "shape"):
        assert 2 <= len(drawn.objects) <= 4


@pytest.mark.parametrize(
    "kind, answers",
    [("presence", ("yes", "no")), ("count", "012345"), ("count_of", "0123"), ("position", CELLS)],
)
def test_held_out_answers_are_balanced(kind, answers):
    given = Counter(heldout(kind, index, 5)[1].answer for index in range(4 * len(answers)))
    assert given == dict.fromkeys(answers, 4)


def test_cell_of_a_box():
    assert cell((0.0, 0.0, 0.2, 0.2), 0.04) == "top left"
    assert cell((0.4, 0.8, 0.6, 1.0), 0.04) == "bottom"
    assert cell((0.2, 0.4, 0.42, 0.6), 0.04) is None  # its centre, 0.31, is 0.023 from a third
    assert cell((0.2, 0.4, 0.42, 0.6), 0.02) == "left"


def test_a_box_is_told_in_steps_of_two_hundredths():
    assert box_text((0.1299, 0.0, 0.4101, 0.999)) == "[0.12, 0.00, 0.42, 1.00]"
    assert parsed_box(" [0.12, 0.00,0.42, 1.00]\n") == (0.12, 0.0, 0.42, 1.0)
    assert parsed_box("[0.12, 0.00, 0.42]") is None and parsed_box("at [0.1, 0.1, 0.2, 0.2]") is None


def test_score():
    assert score("colour", " Red\n", "red") == 1.0 and score("colour", "red star", "red") == 0.0
    assert score("text", "cab", "CAB") == 0.0
    whole = "[0.00, 0.00, 1.00, 1.00]"
    assert score("box", "[0.00, 0.00, 0.50, 0.50]", whole) == 0.25
    assert score("box", "[0.50, 0.00, 0.00, 0.50]", whole) == 0.0 and score("box", "left", whole) == 0.0
    with pytest.raises(InputError, match="not a box"):
        score("box", whole, "left")


def test_shades_of_different_names_never_meet():
    rng = np.random.default_rng(0)
    shades = {name: np.array([colour_rgb(rng, name) for _ in range(300)], float) for name in COLOURS}
    for a in COLOURS:
        for b in COLOURS:
            if a < b:
                apart = np.abs(shades[a][:, None] - shades[b][None]).sum(-1).min()
                assert apart > 25, (a, b, apart)


def test_unknown_names_are_errors():
    with pytest.raises(InputError, match="unknown split 'val': expected train or test"):
        scene("val", 0, 0)
    with pytest.raises(InputError, match="unknown kind of question 'mood'"):
        question_of_kind(TRAIN[0], "mood", np.random.default_rng(0))
    with pytest.raises(InputError, match="unknown kind of question 'mood'"):
        heldout("mood", 0, 0)
