"""What goes into the engine and what comes out: jobs, answers on the asyncio side, and numbers about both.

It knows nothing of models' computation.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from minivlm.answer import Options, Token
from minivlm.batch import Guide
from minivlm.processor import Inputs
from minivlm.row import Row
from minivlm.serve.pictures import picture_keys


class Overloaded(RuntimeError):
    """The queue is full. retry_after: seconds until there is likely to be room, from measured throughput."""

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full, expected to have room in {retry_after:.1f} s")
        self.retry_after = retry_after


class Closed(RuntimeError):
    """The engine shuts down and takes or continues no work."""


class Grammar(Protocol):
    """What an answer must match; see grammar.py."""

    @property
    def minimum(self) -> int:
        """Tokens of the shortest valid answer that was found."""

    def guide(self) -> Guide:
        """What leads one answer through the grammar."""


@dataclass(frozen=True)
class Job:
    """One answer that is asked for. Made in a worker thread: it takes the digests of its pictures.

    inputs           what Pipeline.inputs returned
    grammar          what compile_grammar returned, or None
    prompt_logprobs  whether the prompt's log-probabilities are wanted; then all of the prompt is computed
    """

    inputs: Inputs
    options: Options
    grammar: Grammar | None = None
    prompt_logprobs: bool = False
    pictures: tuple[bytes, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", picture_keys(self.inputs))


@dataclass
class Timings:
    """Seconds: in line; from there to the first token; from there to the last."""

    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


class Answer:
    """The tokens of a job as they come; the last has a finish_reason. Belongs to the engine's event loop.

    The iteration raises NumericError, InputError or GenerationError if the answer fails, Closed if the engine shuts
    down before its end, Failed for whatever else went wrong in a step with this row alone.
    prompt_logprobs: of each prompt id, None for the first and for placeholders; known when the first token is.
    """

    def __init__(self, row: Row, give_up: Callable[["Answer"], None]):
        self.row, self.timings = row, Timings()
        self.prompt_logprobs: list[float | None] | None = None
        self._give_up, self._over = give_up, False
        self._items: deque[Token | Exception] = deque()
        self._arrived = asyncio.Event()

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Token:
        while not self._items:
            if self._over:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        """The client has gone: the row leaves before the next step, its slot is free, and no token is told any more."""
        self._items.clear()
        if not self._over:
            self._over = True
            self._arrived.set()
            self._give_up(self)

    def deliver(self, item: Token | Exception) -> None:
        """Called in the event loop by the engine."""
        if not self._over:
            self._items.append(item)
            self._over = isinstance(item, Exception) or item.finish_reason is not None
            self._arrived.set()


@dataclass(frozen=True)
class Step:
    """One step of the batch: how long it took, prompt positions computed, tokens chosen, and rows in the batch."""

    seconds: float
    positions: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class EngineState:
    """Numbers for /metrics and /info; the counts are since the start.

    queued, running            jobs in line; jobs in a slot
    batch_tokens               positions of the cache that the running rows fill
    max_batch, max_queue, max_total_tokens, cache_bytes  the limits; cache_bytes is what is allocated
    kept_tokens                positions in free slots that a later prompt may begin with
    prefix_hits, prefix_tokens, copied_tokens  prompts that found a prefix, positions of them, of these copied
    pictures, picture_bytes    kept encoded; picture_hits found so, pictures_encoded not
    prompt_tokens, generated_tokens, steps     computed: positions of prompts, tokens, steps
    answers, failures, cancelled               jobs by how they ended
    alive                      whether the model's thread runs
    """

    queued: int
    running: int
    batch_tokens: int
    max_batch: int
    max_queue: int
    max_total_tokens: int
    cache_bytes: int
    kept_tokens: int
    prefix_hits: int
    prefix_tokens: int
    copied_tokens: int
    pictures: int
    picture_bytes: int
    picture_hits: int
    pictures_encoded: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    answers: int
    failures: int
    cancelled: int
    alive: bool


class Pace:
    """How fast answers come, measured, the past fading: what a client that is sent away is told."""

    FADING = 0.995  # a step
    FIRST = 1.0  # seconds to wait while nothing was measured

    def __init__(self) -> None:
        self.seconds = self.ended = 0.0

    def step(self, seconds: float, ended: int) -> None:
        """A step was made, and so many answers ended with it."""
        self.seconds = self.seconds * self.FADING + seconds
        self.ended = self.ended * self.FADING + ended

    def wait(self, queued: int) -> float:
        """Seconds until half of those in line have got a slot."""
        if self.ended < 0.5:
            return max(self.FIRST, self.seconds)
        return (queued / 2 + 1) * self.seconds / self.ended
