"""The engine: each answer equals the one that its job gets alone, whatever happens to the others."""

import asyncio
import dataclasses
import json
import random
import threading

import jsonschema
import pytest
import tiny
import torch
from engines import QUESTIONS, alone, asked, assert_same, job, run, running, tokens_of

import minivlm
from minivlm.errors import InputError, NumericError
from minivlm.sampler import Sampling
from minivlm.serve.engine import Closed, Engine, Failed, Step
from minivlm.serve.grammar import compile_grammar


@pytest.fixture(scope="module")
def vlm() -> minivlm.Pipeline:
    return minivlm.load(device="cpu", dtype="float32")


# ---- answers


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("chunk", [30, 1000])
def test_answers_of_a_busy_engine_are_those_of_each_job_alone(vlm, chunk, apart):
    """Greedy and drawn, with few pictures and many questions, joining at random times, some given up on the way."""
    rng = random.Random(chunk)
    jobs = []
    for i in range(16):
        inputs = asked(vlm, rng.choice([None, 0, 1, 2]), rng.choice(QUESTIONS))
        sampling = Sampling(top_logprobs=2) if i % 2 else Sampling(temperature=0.9, top_p=0.9, seed=i, top_logprobs=2)
        jobs.append(job(inputs, rng.randint(1, 20), sampling))
    expected = [alone(vlm, each) for each in jobs]

    async def client(engine: Engine, i: int) -> None:
        await asyncio.sleep(rng.random() * 0.3)
        answer = engine.submit(jobs[i])
        if i % 5 == 3:  # hangs up after some tokens, or none
            wanted, got = rng.randint(0, 3), []
            if wanted:
                async for token in answer:
                    got.append(token.id)
                    if len(got) == wanted:
                        break
            answer.cancel()
            answer.cancel()
            assert await tokens_of(answer) == []
            return
        assert_same(await tokens_of(answer), expected[i])
        assert min(dataclasses.astuple(answer.timings)) >= 0 and answer.row.prompt_tokens == len(jobs[i].inputs.ids)

    async def test() -> None:
        async with running(vlm, prefill_chunk=chunk, apart=apart) as engine:
            await asyncio.gather(*(client(engine, i) for i in range(len(jobs))))
            state = engine.state()
            assert (state.queued, state.running, state.failures) == (0, 0, 0)
            assert state.prefix_hits > 0 and state.pictures == 3 == state.pictures_encoded
            assert state.answers + state.cancelled >= len(jobs)

    run(test)


def test_what_was_not_read_when_an_answer_is_given_up_is_not_told(vlm):
    async def test() -> None:
        async with running(vlm) as engine:
            answer = engine.submit(job(asked(vlm, None), 1))
            while not engine.state().answers:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            answer.cancel()
            assert await tokens_of(answer) == []

    run(test)


def test_a_dialogue_continues_in_its_slot_and_a_picture_is_encoded_once(vlm):
    """What is computed is only what is new, and gives the logits of computing all of it to rounding."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]
    images, calls = [tiny.picture(100, 150)], []

    async def test() -> None:
        async with running(vlm) as engine:
            for turn in range(3):
                given = job(vlm.inputs(chat, images), 6, Sampling(top_logprobs=20))
                before = engine.state()
                tokens = await tokens_of(engine.submit(given))
                computed = engine.state().prompt_tokens - before.prompt_tokens
                for one, two in zip(tokens, alone(vlm, given), strict=True):
                    assert [a.id for a in one.alternatives] == [a.id for a in two.alternatives]
                    expected = pytest.approx([a.logprob for a in two.alternatives], abs=1e-4)
                    assert [a.logprob for a in one.alternatives] == expected
                new = given.inputs.ids
                assert computed == len(new) if turn == 0 else computed < 30 < len(new)
                answer = "".join(token.text for token in tokens)
                chat.append({"role": "assistant", "content": answer})
                chat.append({"role": "user", "content": QUESTIONS[1 + turn]})
            other = vlm.inputs("Another question before the picture? <image>", images, raw=True)
            await tokens_of(engine.submit(job(other)))
            assert engine.state().picture_hits == 1 and engine.state().copied_tokens < 5

    hook = vlm.model.vision_tower.register_forward_pre_hook(
        lambda _, args: calls.append((len(args[0]), threading.current_thread() is threading.main_thread()))
    )
    try:
        run(test)
    finally:
        hook.remove()
    tiles = vlm.inputs("<image>", images, raw=True).tile_counts[0]
    assert sum(count for count, ours in calls if not ours) == tiles  # in the engine's thread, for four prompts


def test_the_same_prompt_at_once_is_computed_once(vlm):
    """As for best_of: all begin with the first one's keys, copied while it runs."""
    given = job(asked(vlm, 1), 6)
    expected = alone(vlm, given)

    async def test() -> None:
        async with running(vlm) as engine:
            first = engine.submit(given)
            head = await anext(first)
            others = [engine.submit(given) for _ in range(3)]
            assert_same([head, *await tokens_of(first)], expected)
            for other in others:
                assert_same(await tokens_of(other), expected)
            assert engine.state().prompt_tokens == len(given.inputs.ids) + 3

    run(test)


def test_prompt_log_probabilities_are_there_with_the_first_token(vlm):
    given = job(asked(vlm, 0), 2, prompt_logprobs=True)
    with torch.no_grad():
        logprobs = vlm.model([given.inputs]).log_softmax(-1)

    async def test() -> None:
        async with running(vlm) as engine:
            for _ in range(2):  # a second time, when its keys are there
                answer = engine.submit(given)
                await anext(answer)
                assert len(answer.prompt_logprobs) == len(given.inputs.ids)
                for i, value in enumerate(answer.prompt_logprobs[1:]):
                    token_id = given.inputs.ids[i + 1]
                    if token_id != vlm.model.config.image_token_id:
                        assert value == pytest.approx(float(logprobs[i, token_id]), abs=1e-4)
                await tokens_of(answer)
            plain = engine.submit(job(given.inputs, 1))
            await tokens_of(plain)
            assert plain.prompt_logprobs is None

    run(test)


def test_a_step_computes_no_more_than_a_chunk(vlm):
    steps: list[Step] = []

    async def test() -> None:
        async with running(vlm, prefill_chunk=40, observe=steps.append) as engine:
            await asyncio.gather(*(tokens_of(engine.submit(job(asked(vlm, i % 3), 5))) for i in range(6)))

    run(test)
    assert max(step.positions for step in steps) <= 40 and max(step.rows for step in steps) == 4
    assert any(step.positions and step.tokens for step in steps)  # prompts are computed beside running rows


def test_guided_answers_of_random_weights_validate_at_every_length(tiny_of):
    """Beside rows without a grammar, which are not touched by it."""
    random_vlm = tiny_of("next-mistral").vlm
    schema = {
        "properties": {"n": {"type": "integer", "minimum": 1}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["n", "tags"],
    }
    grammar = compile_grammar("json", schema, random_vlm.processor.tokenizer, random_vlm.vocabulary)
    plain = job(random_vlm.inputs("the cat", raw=True), 30)
    expected = alone(random_vlm, plain)

    async def guided(engine: Engine, limit: int) -> None:
        sampling = Sampling(temperature=1.5, seed=limit) if limit % 2 else Sampling()
        answer = engine.submit(job(random_vlm.inputs("a red", raw=True), limit, sampling, grammar=grammar))
        tokens = await tokens_of(answer)
        text = "".join(token.text for token in tokens)
        jsonschema.validate(json.loads(text), schema)
        assert len(tokens) <= limit and tokens[-1].finish_reason == "stop"

    async def test() -> None:
        async with running(random_vlm, max_total_tokens=120, max_batch=6) as engine:
            free = [tokens_of(engine.submit(plain)) for _ in range(3)]
            await asyncio.gather(*(guided(engine, grammar.minimum + i) for i in range(20)))
            for tokens in free:
                assert_same(await tokens, expected)
            whole = engine.submit(job(plain.inputs, None, grammar=grammar))  # as much as fits
            jsonschema.validate(json.loads("".join([token.text async for token in whole])), schema)

    run(test)


# ---- faults


@pytest.mark.parametrize("apart", [False, True])
def test_a_job_that_fails_fails_alone(vlm, apart):
    """Pixels that are not numbers; tiles of another size; a prompt with a picture too many."""
    good = job(asked(vlm, 1), 12)
    expected = alone(vlm, good)
    nan = dataclasses.replace(asked(vlm, 0), tiles=asked(vlm, 0).tiles * torch.nan)
    odd = dataclasses.replace(asked(vlm, 0), tiles=asked(vlm, 0).tiles[:, :, :-3])
    many = dataclasses.replace(asked(vlm, 0), ids=(*asked(vlm, 0).ids, vlm.model.config.image_token_id))

    async def test() -> None:
        async with running(vlm, apart=apart) as engine:
            with pytest.raises(InputError, match="image placeholders"):
                engine.submit(job(many))
            for _ in range(2):
                answers = [engine.submit(each) for each in (good, job(nan), job(odd), good)]
                assert_same(await tokens_of(answers[0]), expected)
                with pytest.raises(NumericError, match="position"):
                    await tokens_of(answers[1])
                with pytest.raises((RuntimeError, InputError, ValueError)):
                    await tokens_of(answers[2])
                assert_same(await tokens_of(answers[3]), expected)
            assert engine.state().failures == 4 and engine.state().running == 0

    run(test)


def test_a_step_that_fails_is_made_again_for_each_row_alone(vlm, caplog):
    """As when memory is short; and if a row fails even then, it alone fails."""
    jobs = [job(asked(vlm, i, QUESTIONS[i]), 8) for i in range(3)]
    expected = [alone(vlm, each) for each in jobs]
    poisoned = len(jobs[2].inputs.ids) + 3

    async def test() -> None:
        async with running(vlm) as engine:
            forward = engine.batch._forward

            def short_of_memory(members):
                if len(members) > 2 or poisoned in [member.row.cached for member in members]:
                    raise RuntimeError("out of memory")
                return forward(members)

            engine.batch._forward = short_of_memory
            answers = [engine.submit(each) for each in jobs]
            for answer, tokens in zip(answers[:2], expected, strict=False):
                assert_same(await tokens_of(answer), tokens)
            with pytest.raises(Failed, match="out of memory"):
                await tokens_of(answers[2])
            engine.batch._forward = forward
            traced = [record.levelname for record in caplog.records if record.exc_info]
            assert traced.count("ERROR") == 1  # each once, and joint steps as warnings
            assert engine.state().alive
            assert_same(await tokens_of(engine.submit(jobs[2])), expected[2])

    assert len({len(each.inputs.ids) for each in jobs}) == 3
    run(test)


def test_who_leaves_while_its_picture_is_encoded_leaves_nothing(vlm):
    """With a thread of its own for pictures: the slot is free at once, and nobody waits for the picture."""
    given, encoding, left = job(asked(vlm, 2), 4), threading.Event(), threading.Event()

    def slow(*_) -> None:
        encoding.set()
        assert left.wait(30)

    async def test() -> None:
        async with running(vlm, apart=True) as engine:
            answer = engine.submit(given)
            while not encoding.is_set():
                await asyncio.sleep(0.001)
            answer.cancel()
            while engine.state().running:
                await asyncio.sleep(0.001)
            left.set()
            other = await tokens_of(engine.submit(job(asked(vlm, None), 4)))
            assert len(other) and engine.state().pictures == 0 == engine.state().failures

    hook = vlm.model.vision_tower.register_forward_pre_hook(slow)
    try:
        run(test)
    finally:
        hook.remove()


def test_an_encoder_that_dies_ends_the_engine(vlm, monkeypatch):
    """Nothing hangs, whatever happens to its thread."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    async def test() -> None:
        async with running(vlm, apart=True) as engine:
            engine.pictures.encode = lambda most: 1 / 0
            with pytest.raises(Closed):
                await tokens_of(engine.submit(job(asked(vlm, 1))))
            with pytest.raises(Closed):
                engine.submit(job(asked(vlm, None)))

    run(test)
