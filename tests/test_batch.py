"""Continuous batching: whoever joins, leaves or fails, and whenever, each row gets the answer that it gets alone."""

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch

import minivlm
from minivlm import batch as batching
from minivlm.answer import Options, Token
from minivlm.batch import Batch, Member
from minivlm.errors import GenerationError, NumericError
from minivlm.row import Row
from minivlm.sampler import Sampling

SLOTS, CAPACITY = 4, 120


@pytest.fixture
def vlm(tiny_of) -> minivlm.Pipeline:
    return tiny_of("next-mistral").vlm


def batch_of(vlm: minivlm.Pipeline, chunk: int) -> Batch:
    cache = vlm.model.language_model.new_cache(SLOTS, CAPACITY)
    return Batch(vlm.model, vlm.vocabulary.allowed, cache, chunk, independent=True)


def row_of(vlm: minivlm.Pipeline, text: str, limit: int, sampling: Sampling | None = None) -> Row:
    images = [tiny.picture(9 + 7 * i, 30 - 5 * i, seed=i) for i in range(text.count("<image>"))]
    options = Options(sampling or Sampling(), limit)
    return Row(vlm.inputs(text, images, raw=True), options, vlm.vocabulary, vlm.context)


def join(batch: Batch, row: Row, slot: int, **settings) -> Member:
    with torch.no_grad():
        return batch.join(row, slot, batch.model.embed([row.inputs]), **settings)


def alone(vlm: minivlm.Pipeline, row: Row) -> list[Token]:
    settings = dataclasses.asdict(row.sampling)
    return list(vlm.generate(row.inputs, max_new_tokens=row.options.max_new_tokens, **settings).tokens)


def finished(batch: Batch) -> dict[int, list]:
    """What each slot's row got to the end."""
    got: dict[int, list] = {}
    while batch.members:
        for member, result in batch.step():
            got.setdefault(member.slot, []).append(result)
    return got


def assert_same(found: list[Token], expected: list[Token]) -> None:
    assert [token.id for token in found] == [token.id for token in expected]
    assert "".join(token.text for token in found) == "".join(token.text for token in expected)
    assert [t.logprob for t in found] == pytest.approx([t.logprob for t in expected], abs=1e-5)
    assert found[-1].finish_reason == expected[-1].finish_reason


@contextmanager
def widths(module: torch.nn.Module) -> Iterator[list[int]]:
    """How many rows each call of a module gets."""
    found: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[0]))
    try:
        yield found
    finally:
        hook.remove()


@pytest.mark.parametrize("chunk", [3, 17, 1000])
@pytest.mark.parametrize("kind", ["next-mistral", "llava"])
def test_rows_that_join_and_leave_at_any_time_get_their_own_answers(tiny_of, kind, chunk):
    vlm, rng = tiny_of(kind).vlm, random.Random(chunk)
    batch = batch_of(vlm, chunk)
    words = ["the", "cat", "is", "red", "what", "colour", "a", "picture", "of", "two", "blue", "shapes"]
    waiting = []
    for i in range(14):
        text = "<image>" * rng.randint(0, 2) + " ".join(rng.choices(words, k=rng.randint(1, 9)))
        drawn = Sampling(temperature=1.5, seed=i) if i % 2 else Sampling()
        waiting.append(row_of(vlm, text, rng.randint(1, 12), drawn))
    expected = [(row, alone(vlm, row)) for row in waiting]
    free, found, given_up = list(range(SLOTS)), {}, set()
    while waiting or batch.members:
        while waiting and free and rng.random() < 0.6:
            row = waiting.pop(0)
            join(batch, row, free.pop(rng.randrange(len(free))))
        for member, token in batch.step() if batch.members else ():
            found.setdefault(id(member.row), []).append(token)
            if token.finish_reason is not None:
                free.append(member.slot)
        if batch.members and rng.random() < 0.05:
            member = rng.choice(batch.members)
            batch.leave(member)
            given_up.add(id(member.row))
            free.append(member.slot)
    assert given_up
    for row, tokens in expected:
        if id(row) not in given_up:
            assert_same(found[id(row)], tokens)
        else:
            part = found.get(id(row), [])
            assert [token.id for token in part] == [token.id for token in tokens][: len(part)]


SHIFTED = (
    Sampling(frequency_penalty=1.5),
    Sampling(),
    Sampling(presence_penalty=2, frequency_penalty=-0.3, temperature=1.5, seed=1),
    Sampling(logit_bias={9: 3, 40: -100, 41: 2.5}),
    Sampling(typical_p=0.4, temperature=1.5, seed=2),
    Sampling(temperature=1.5, seed=3),
    Sampling(typical_p=0.9, top_k=40, repetition_penalty=1.3, presence_penalty=1, logit_bias={7: 1}, seed=4),
)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_rows_with_penalties_biases_and_typical_p_beside_rows_without(vlm, chunk):
    """Of different lengths, and in the batch at different times: each row's answer begins behind its own prompt."""
    batch, found = batch_of(vlm, chunk), {}
    texts = ["the cat is", "<image> what colour", "a", "is it a red cat, is it <image>"]
    waiting = [row_of(vlm, texts[i % 4], 4 + i, sampling) for i, sampling in enumerate(SHIFTED)]
    expected = [(row, alone(vlm, row)) for row in waiting]
    free = list(range(SLOTS))
    while waiting or batch.members:
        if waiting and free:
            join(batch, waiting.pop(0), free.pop())
        for member, token in batch.step():
            found.setdefault(id(member.row), []).append(token)
            if token.finish_reason is not None:
                free.append(member.slot)
    for row, tokens in expected:
        assert_same(found[id(row)], tokens)
        sampled = [token.sampled_logprob for token in tokens]
        assert [token.sampled_logprob for token in found[id(row)]] == pytest.approx(sampled, abs=1e-5)


def test_a_long_prompt_delays_the_others_by_a_chunk_and_not_by_its_length(vlm):
    batch = batch_of(vlm, chunk=5)
    first, late = row_of(vlm, "the cat", 30), row_of(vlm, "<image><image> what colour is it", 3)
    expected = alone(vlm, first), alone(vlm, late)
    join(batch, first, 0)
    while batch.members[0].embeddings is not None:
        batch.step()
    got = len(first.ids) - first.prompt_tokens
    join(batch, late, 1)
    with widths(vlm.model.language_model) as sizes:
        steps = -(-late.prompt_tokens // 5)
        for step in range(1, steps + 1):
            batch.step()
            assert len(first.ids) - first.prompt_tokens == got + step  # a token in every step
    assert max(sizes) == 6 and len(sizes) == steps and len(late.ids) == late.prompt_tokens + 1
    finished(batch)
    for row, tokens in zip((first, late), expected, strict=True):
        assert row.ids[row.prompt_tokens :] == [token.id for token in tokens]


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_log_probabilities_of_the_prompt(vlm, chunk, monkeypatch):
    """Those of the whole prompt's logits, but never more than a few positions' logits at once."""
    monkeypatch.setattr(batching, "SCORED", 6)
    batch = batch_of(vlm, chunk)
    rows = [row_of(vlm, "<image> is it a red cat", 2), row_of(vlm, "what", 2), row_of(vlm, "a picture", 2)]
    members = [join(batch, row, i, prompt_logprobs=i < 2) for i, row in enumerate(rows)]
    with widths(vlm.model.language_model.lm_head) as sizes:
        finished(batch)
    assert max(sizes) <= 6
    for row, member in zip(rows[:2], members, strict=False):
        with torch.no_grad():
            logprobs = vlm.model([row.inputs]).log_softmax(-1)
        ids = row.inputs.ids
        expected = [None, *(float(logprobs[i, token_id]) for i, token_id in enumerate(ids[1:]))]
        image_id = vlm.model.config.image_token_id
        assert [value is None for value in member.prompt_logprobs] == [True, *(i == image_id for i in ids[1:])]
        pairs = zip(member.prompt_logprobs, expected, strict=True)
        assert all(one == pytest.approx(two, abs=1e-5) for one, two in pairs if one is not None)
    assert members[2].prompt_logprobs is None


def test_a_row_that_is_not_a_number_fails_alone(vlm):
    batch = batch_of(vlm, 1000)
    rows = [row_of(vlm, text, 6) for text in ("the cat", "what colour", "is it red")]
    expected = [alone(vlm, row) for row in rows]
    for slot, row in enumerate(rows):
        join(batch, row, slot)
    batch.members[1].embeddings = batch.members[1].embeddings * torch.nan
    got = finished(batch)
    assert len(got[1]) == 1 and isinstance(got[1][0], NumericError)
    assert_same(got[0], expected[0])
    assert_same(got[2], expected[2])


def test_a_step_that_fails_can_be_made_again(vlm):
    """Whatever it was that failed: in the decoder, the head, or the sampler."""
    rows = [row_of(vlm, "<image> the cat", 8), row_of(vlm, "what colour is it", 8)]
    expected = [alone(vlm, row) for row in rows]
    batch = batch_of(vlm, 7)
    for slot, row in enumerate(rows):
        join(batch, row, slot)
    rng, found, failures = random.Random(0), {0: [], 1: []}, 0
    choose, decoder = batch._choose, vlm.model.language_model

    def fail(*_):
        raise RuntimeError("out of memory")

    while batch.members:
        where = rng.choice(["decoder", "head", "sampler", None])
        hooks = [decoder.layers[1].register_forward_pre_hook(fail)] if where == "decoder" else []
        hooks += [decoder.lm_head.register_forward_hook(fail)] if where == "head" else []
        batch._choose = fail if where == "sampler" else choose
        try:
            for member, token in batch.step():
                found[member.slot].append(token)
        except RuntimeError:
            failures += 1
        finally:
            for hook in hooks:
                hook.remove()
    assert failures > 10
    for slot in (0, 1):
        assert_same(found[slot], expected[slot])


class Even:
    """A guide with whims: only even ids, and of these it takes an id only if it is a multiple of 4."""

    def __init__(self, size: int, stubborn: bool = False):
        self.size, self.only, self.refused, self.complete, self.stubborn = size, 0b0101, 0, False, stubborn

    def bitmask(self) -> torch.Tensor:
        nibbles = int(f"{self.only:x}" * 8, 16)
        return torch.full((-(-self.size // 32),), nibbles, dtype=torch.int64).to(torch.int32)

    def accept(self, token_id: int, left: int) -> bool:
        assert token_id % 2 == 0 and left >= 0
        if token_id % 4 or self.stubborn:
            self.refused, self.only = self.refused + 1, 0b0001
            return False
        self.only, self.complete = 0b0101, left == 2
        return True


def test_a_guide_says_what_may_come_and_when_it_is_whole(vlm):
    batch, guide = batch_of(vlm, 1000), Even(vlm.vocabulary.size)
    plain, guided = row_of(vlm, "the cat", 20), row_of(vlm, "the cat", 20, Sampling(temperature=3.0, seed=4))
    expected = alone(vlm, plain)
    join(batch, plain, 0)
    join(batch, guided, 1, guide=guide)
    got = finished(batch)
    assert_same(got[0], expected)
    assert all(token.id % 4 == 0 for token in got[1]) and guide.refused > 2
    assert len(got[1]) == 18 and got[1][-1].finish_reason == "stop"


def test_a_guide_that_refuses_what_it_allows_fails_its_row_alone(vlm):
    batch = batch_of(vlm, 1000)
    plain = row_of(vlm, "the cat", 5)
    expected = alone(vlm, plain)
    join(batch, row_of(vlm, "a", 5), 1, guide=Even(vlm.vocabulary.size, stubborn=True))
    join(batch, plain, 0)
    got = finished(batch)
    assert_same(got[0], expected)
    assert len(got[1]) == 1 and isinstance(got[1][0], GenerationError)
