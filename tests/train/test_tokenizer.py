"""The shipped checkpoint's tokenizer: same bytes every time, lossless, one token per printed character."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from minivlm.train.questions import questions
from minivlm.train.tokenizer import COORDINATES, build_tokenizer, chained_merges, learned_merges
from minivlm.train.world import scene


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_tokenizer().save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def test_another_process_writes_the_same_bytes(path, tmp_path):
    code = "import sys; from minivlm.train.tokenizer import build_tokenizer; build_tokenizer().save(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again.json")], check=True)
    again = (tmp_path / "again.json").read_bytes()
    assert hashlib.sha256(again).digest() == hashlib.sha256(path.read_bytes()).digest()


def test_ids_are_laid_out_as_llamas(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and tokens[258] == "<0xFF>"
    assert tokens[-2:] == ["<image>", "<pad>"] and 600 <= len(tokens) <= 750


def test_a_text_begins_with_bos(tokenizer):
    assert tokenizer("What is written?").input_ids[0] == 1
    assert tokenizer.tokenize("What is written?") == ["▁What", "▁is", "▁written", "?"]


def test_each_coordinate_is_one_token(tokenizer):
    pieces = tokenizer.tokenize("[0.12, 0.34, 0.40, 1.00]")
    assert pieces == ["▁[", "0.12", ",▁", "0.34", ",▁", "0.40", ",▁", "1.00", "]"]
    assert all(tokenizer.tokenize(f"[{share}")[1:] == [share] for share in COORDINATES)


def test_printed_strings_are_one_token_per_character(tokenizer):
    for string in ("WHAT", "IS", "INST", "HOW", "RED", "9000", "100", "1002"):
        assert tokenizer.tokenize(string) == ["▁", *string]
        assert tokenizer.tokenize(f"the text {string}")[-len(string) :] == list(string)


def test_words_of_the_world_are_one_token(tokenizer):
    assert tokenizer.tokenize("a red circle at the bottom right") == [
        "▁a", "▁red", "▁circle", "▁at", "▁the", "▁bottom", "▁right",
    ]  # fmt: skip
    pieces = tokenizer.tokenize("[INST] <image>\nWhat color is the star? [/INST]")
    assert pieces[0] == "▁[INST]" and "<image>" in pieces and "What" in pieces and pieces[-1] == "▁[/INST]"


def test_the_worlds_texts_survive_encoding(tokenizer):
    for index in range(150):
        drawn, rng = scene("test", index, 31), np.random.default_rng(index)
        told = [text for qa in questions(drawn, rng) for text in (qa.question, qa.answer)]
        for text in told:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == text and 0 not in ids


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="▁<"), max_size=40))
def test_any_text_survives_encoding(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_merges_of_a_worked_example():
    """ab occurs 3 times, bc twice: ab first, then "abc" and "bc" each need one more."""
    assert learned_merges({"abc": 2, "ab": 1, "bc": 1}) == [("a", "b"), ("ab", "c"), ("b", "c")]
    assert chained_merges(["0.1", "0.2"]) == [("0", "."), ("0.", "1"), ("0.", "2")]
