"""The engine: what it refuses, the memory that it takes, and its end."""

import asyncio
import threading
import time

import pytest
from engines import LIMITS, alone, asked, assert_same, job, run, running, tokens_of

import minivlm
from minivlm.answer import Options
from minivlm.errors import InputError
from minivlm.sampler import Sampling
from minivlm.serve.engine import Answer, Closed, Engine, Job, Overloaded
from minivlm.serve.grammar import compile_grammar


@pytest.fixture(scope="module")
def vlm() -> minivlm.Pipeline:
    return minivlm.load(device="cpu", dtype="float32")


# ---- limits


def test_a_full_queue_says_when_to_come_back(vlm):
    async def test() -> None:
        async with running(vlm, max_batch=2, max_queue=3) as engine:
            for _ in range(2):
                answers = [engine.submit(job(asked(vlm, None), 60)) for _ in range(5)]
                with pytest.raises(Overloaded) as caught:
                    engine.submit(job(asked(vlm, None)))
                assert 0 < caught.value.retry_after < 60
                answers[4].cancel()  # from the line
                answers[0].cancel()  # from the batch
                while engine.state().queued + engine.state().running > 3:
                    await asyncio.sleep(0.001)
                more = engine.submit(job(asked(vlm, None), 1))
                for answer in (*answers[1:4], more):
                    assert await tokens_of(answer)

    run(test)


def test_what_can_never_be_answered_is_refused_at_once(vlm):
    grammar = compile_grammar("regex", "[ab]{20}", vlm.processor.tokenizer, vlm.vocabulary)
    short = asked(vlm, None)
    room = 500 - len(short.ids)

    async def test() -> None:
        async with running(vlm) as engine:
            engine.submit(job(short, room)).cancel()
            with pytest.raises(InputError, match=f"max_new_tokens: found {room + 1}"):
                engine.submit(job(short, room + 1))
            with pytest.raises(InputError, match=rf"found room for 5 tokens, expected at least {grammar.minimum}"):
                engine.submit(job(short, 5, grammar=grammar))
            with pytest.raises(InputError, match=r"stop: found .* beside a grammar"):
                engine.submit(Job(short, Options(stop=["a"]), grammar))

    run(test)


def test_the_cache_is_as_large_as_it_may_be(vlm):
    slot = vlm.model.language_model.new_cache(1, 500).nbytes

    def engine(cache_bytes: int, **more: int) -> Engine:
        return Engine(vlm, **{**LIMITS, "cache_bytes": cache_bytes, **more})

    assert engine(10 * slot).state().cache_bytes == 4 * slot
    assert engine(3 * slot - 1).max_batch == 2 and engine(3 * slot - 1).state().cache_bytes == 2 * slot
    with pytest.raises(InputError, match=f"--cache-bytes: found {slot - 1}, expected at least {slot}"):
        engine(slot - 1)
    with pytest.raises(InputError, match="--prefill-chunk: found 0"):
        engine(slot, prefill_chunk=0)
    assert engine(2**30, max_total_tokens=10**6).max_total_tokens == vlm.context


def test_memory_does_not_grow_with_the_jobs_answered(vlm):
    """The cache stays the tensor that it was, pictures stay below their bound, and nobody holds what is over."""

    async def test() -> None:
        async with running(vlm, picture_bytes=10**5) as engine:
            keys = engine.slots.cache.keys.data_ptr()
            for i in range(12):
                await tokens_of(engine.submit(job(asked(vlm, i % 6), 2)))
                assert engine.state().picture_bytes <= 10**5 and engine.slots.cache.keys.data_ptr() == keys
            assert engine.state().batch_tokens == 0 and 0 < engine.state().kept_tokens <= 4 * 500
            assert not engine._works and not engine._gone and not engine.batch.members and not engine.pictures.busy

    run(test)


# ---- the end


@pytest.mark.parametrize("apart", [False, True])
def test_closing_finishes_what_was_accepted(vlm, apart):
    async def test() -> None:
        async with running(vlm, max_batch=2, apart=apart) as engine:
            answers = [asyncio.ensure_future(tokens_of(engine.submit(job(asked(vlm, i), 10)))) for i in range(6)]
            await asyncio.sleep(0)
            await engine.close(30)
            assert all([await answer for answer in answers])
            with pytest.raises(Closed):
                engine.submit(job(asked(vlm, None)))

    run(test)


def test_closing_does_not_wait_longer_than_it_should(vlm):
    async def test() -> None:
        async with running(vlm, max_batch=2) as engine:
            answers = [engine.submit(job(asked(vlm, None), 400, Sampling(temperature=50.0))) for _ in range(5)]
            await anext(answers[0])
            began = time.monotonic()
            await engine.close(0.05)
            assert time.monotonic() - began < 5
            ends = [asyncio.ensure_future(tokens_of(answer)) for answer in answers]
            results = await asyncio.gather(*ends, return_exceptions=True)
            assert sum(isinstance(result, Closed) for result in results) >= 3

    run(test)


def test_jobs_come_from_any_thread_and_before_the_start_from_none(vlm):
    async def test() -> None:
        with pytest.raises(Closed):
            Engine(vlm, **LIMITS).submit(job(asked(vlm, None)))
        async with running(vlm) as engine:
            given = job(asked(vlm, None), 3)
            found: list[Answer] = []
            threads = [threading.Thread(target=lambda: found.append(engine.submit(given))) for _ in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            expected = alone(vlm, given)
            for answer in found:
                assert_same(await tokens_of(answer), expected)

    run(test)
