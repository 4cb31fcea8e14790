"""An engine that runs for a test, jobs for it, and what each gets alone."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import tiny

import minivlm
from minivlm.answer import Options, Token
from minivlm.processor import Inputs
from minivlm.sampler import Sampling
from minivlm.serve.engine import Answer, Engine, Job

LIMITS = {
    "max_batch": 4,
    "max_queue": 100,
    "max_total_tokens": 500,
    "cache_bytes": 2**30,
    "picture_bytes": 2**24,
    "prefill_chunk": 100,
}
QUESTIONS = ("What is shown?", "Is there a red circle?", "Describe the picture.", "How many shapes are there?")


@asynccontextmanager
async def running(vlm: minivlm.Pipeline, **limits: Any) -> AsyncIterator[Engine]:
    """An engine that runs; afterwards no thread and no task is left of it."""
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()
    engine = Engine(vlm, **{**LIMITS, **limits})
    engine.start()
    try:
        yield engine
    finally:
        await engine.close(30)
        assert set(threading.enumerate()) <= threads and asyncio.all_tasks() == tasks
        assert not engine.state().alive


def run(test: Callable[[], Coroutine]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def tokens_of(answer: Answer) -> list[Token]:
    return [token async for token in answer]


def job(inputs: Inputs, limit: int | None = 8, sampling: Sampling | None = None, **more: Any) -> Job:
    return Job(inputs, Options(sampling or Sampling(top_logprobs=2), limit), **more)


def asked(vlm: minivlm.Pipeline, picture: int | None, question: str = QUESTIONS[0]) -> Inputs:
    images = [] if picture is None else [tiny.picture(90 + 20 * picture, 150, seed=picture)]
    return vlm.inputs(question, images)


def alone(vlm: minivlm.Pipeline, given: Job) -> list[Token]:
    settings = {**dataclasses.asdict(given.options.sampling), "max_new_tokens": given.options.max_new_tokens}
    return list(vlm.generate(given.inputs, **settings).tokens)


def assert_same(found: list[Token], expected: list[Token]) -> None:
    """The same ids and numbers, up to where the best two are too close for float32 to tell."""
    for one, two in zip(found, expected, strict=False):
        if one.id != two.id:
            best, second = two.alternatives[:2]
            assert best.logprob - second.logprob < 1e-4
            return
        assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
        assert (one.text, one.finish_reason) == (two.text, two.finish_reason)
    assert len(found) == len(expected)
