"""The engine: one thread that owns the model. Jobs come in from an event loop, tokens go back to it.

Between any two steps of the batch, rows that were given up leave, jobs in line take the free slots, and a few tiles of
new pictures are encoded; or a second thread encodes them meanwhile. It knows nothing of HTTP.

The names, as a request meets them: a `Job` is what is asked for; `Work` is a job that was accepted, with what the
engine still lacks of it; its `Answer` carries the tokens to the event loop; its `Row` holds the ids and how they are
chosen; a `Slot` keeps the keys and values of one row, and of the prefix after it; a `Member` is the row in the batch.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic

import torch
from torch import Tensor

from minivlm.answer import Token
from minivlm.batch import Batch, Member
from minivlm.errors import InputError
from minivlm.pipeline import Pipeline
from minivlm.row import Row
from minivlm.serve.faults import Failed, final, log, tried
from minivlm.serve.jobs import Answer, Closed, EngineState, Job, Overloaded, Pace, Step
from minivlm.serve.pictures import Encoded, Pictures
from minivlm.serve.slots import Pictured, Slots

__all__ = ["Answer", "Closed", "Engine", "EngineState", "Failed", "Job", "Overloaded", "Step"]

TILES_AT_REST = 8  # encoded at once while no row waits for its next token: more than one picture has
TILES_APART = 16  # by a thread of its own: of the shipped checkpoint's, a tile takes 2.0 ms then, 2.3 of 8, 4.5 alone


class Work:
    """A job that was accepted, on its way through the engine."""

    def __init__(self, job: Job, row: Row, answer: Answer, pictures: Sequence[tuple[Pictured, int]]):
        """pictures: each with the number of its image tokens."""
        self.job, self.row, self.answer, self.pictures = job, row, answer, pictures
        self.guide = None if job.grammar is None else job.grammar.guide()
        self.tokens: dict[bytes, Tensor] = {}  # image tokens [I, D] of its pictures, as they come
        self.missing: set[bytes] = set()
        self.slot: int | None = None
        self.member: Member | None = None
        self.since = monotonic()  # when the present stage began: in line, prefill, decode


class Engine:
    """Answers jobs, many at a time; each gets the answer that it would get alone: its very ids in float32; in bfloat16
    and with quantised weights up to rounding, which depends on how many rows a step has."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        max_batch: int,
        max_queue: int,
        max_total_tokens: int,
        cache_bytes: int,
        picture_bytes: int,
        prefill_chunk: int,
        apart: bool = False,
        observe: Callable[[Step], None] | None = None,
    ):
        """
        max_batch         rows that run together; fewer if their slots do not fit in cache_bytes
        max_queue         jobs that wait beyond those that run
        max_total_tokens  prompt and answer of a job; at most the model's context
        picture_bytes     encoded pictures to keep
        prefill_chunk     prompt positions that a step computes, and patches of pictures between two steps
        apart             pictures are encoded by a thread of their own, beside the steps
        observe           told of every step, in the model's thread
        """
        limits = {"max_batch": max_batch, "max_total_tokens": max_total_tokens, "prefill_chunk": prefill_chunk}
        for name, value in limits.items():
            if value < 1:
                raise InputError(f"--{name.replace('_', '-')}: found {value}, expected at least 1")
        self.pipeline, self.max_queue, self._observe = pipeline, max_queue, observe
        self.max_total_tokens = min(max_total_tokens, pipeline.context)
        model = pipeline.model
        slot_bytes = model.language_model.new_cache(1, 1).nbytes * self.max_total_tokens
        self.max_batch = min(max_batch, cache_bytes // slot_bytes)
        if self.max_batch < 1:
            raise InputError(
                f"--cache-bytes: found {cache_bytes}, expected at least {slot_bytes}, the keys and values of "
                f"{self.max_total_tokens} tokens"
            )
        cache = model.language_model.new_cache(self.max_batch, self.max_total_tokens)
        self.slots, self.pictures = Slots(cache, self.max_batch), Pictures(model, picture_bytes)
        self.batch = Batch(model, pipeline.vocabulary.allowed, cache, prefill_chunk, independent=True)
        self.tiles = max(1, prefill_chunk // (model.config.vision.image_size // model.config.vision.patch_size) ** 2)
        self._pace = Pace()
        self._counts = dict.fromkeys(("prompt_tokens", "generated_tokens", "steps", "answers", "failures", "gone"), 0)
        self._changed = threading.Condition()  # guards what follows
        self._open = 0  # jobs that are not over
        self._queue: deque[Work] = deque()
        self._works: dict[int, Work] = {}  # by slot; only the model's thread changes it
        self._gone: list[Answer] = []
        self._encoded: list[Encoded] = []
        self._closing = self._hurry = False
        self._thread: threading.Thread | None = None
        self._encoder: threading.Thread | None = None
        if apart:
            self._encoder = threading.Thread(target=self._run_encoder, name="minivlm-encoder", daemon=True)

    # ---- the event loop's side

    def start(self) -> None:
        """Start the model's thread. Called in the event loop that reads the answers."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="minivlm-engine", daemon=True)
        self._thread.start()
        if self._encoder is not None:
            self._encoder.start()

    def submit(self, job: Job) -> Answer:
        """Put a job in line; from any thread, at once.

        Raises Overloaded if the line is full, InputError for a job that can never be answered, Closed while shutting
        down.
        """
        guided = job.grammar is not None
        row = Row(job.inputs, job.options, self.pipeline.vocabulary, self.max_total_tokens, verbatim=guided)
        if guided:
            _check_grammar(job, row)
        work = Work(job, row, Answer(row, self._give_up), self._pictured(job))
        with self._changed:
            if self._closing or self._thread is None:
                raise Closed("the engine is not running")
            if self._open >= self.max_batch + self.max_queue:
                raise Overloaded(self._pace.wait(len(self._queue)))
            self._open += 1
            self._queue.append(work)
            self._changed.notify()
        return work.answer

    async def close(self, seconds: float) -> None:
        """Accept no more jobs, finish those accepted, and end what is left after so many seconds with Closed."""
        if self._thread is None:
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.wait([self._ended], timeout=seconds)
        with self._changed:
            self._hurry = True
            self._changed.notify()
        await self._ended
        self._thread.join()

    def state(self) -> EngineState:
        """Numbers of this moment; from any thread."""
        slots, pictures, counts = self.slots, self.pictures, self._counts
        return EngineState(
            queued=len(self._queue),
            running=len(self._works),
            batch_tokens=sum(slot.filled for slot in slots.slots if slot.row is not None),
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            max_total_tokens=self.max_total_tokens,
            cache_bytes=slots.cache.nbytes,
            kept_tokens=sum(slot.filled for slot in slots.slots if slot.row is None),
            prefix_hits=slots.hits,
            prefix_tokens=slots.reused,
            copied_tokens=slots.copied,
            pictures=len(pictures),
            picture_bytes=pictures.nbytes,
            picture_hits=pictures.hits,
            pictures_encoded=pictures.encoded,
            prompt_tokens=counts["prompt_tokens"],
            generated_tokens=counts["generated_tokens"],
            steps=counts["steps"],
            answers=counts["answers"],
            failures=counts["failures"],
            cancelled=counts["gone"],
            alive=self._thread is not None and self._thread.is_alive(),
        )

    def _pictured(self, job: Job) -> list[tuple[Pictured, int]]:
        """Each picture's place among the ids and its number of image tokens. Raises InputError if they do not fit."""
        image_id, geometry = self.pipeline.processor.tokenizer.image_token_id, self.pipeline.processor.geometry
        places = [at for at, token_id in enumerate(job.inputs.ids) if token_id == image_id]
        counts = [geometry.image_token_count(size) for size in job.inputs.image_sizes]
        if len(places) != sum(counts):
            raise InputError(f"prompt: found {len(places)} image placeholders, expected {counts} for its pictures")
        pictured, at = [], 0
        for key, count in zip(job.pictures, counts, strict=True):
            pictured.append((Pictured(places[at], key), count))
            at += count
        return pictured

    def _give_up(self, answer: Answer) -> None:
        with self._changed:
            self._gone.append(answer)
            self._changed.notify()

    # ---- the model's thread

    def _run(self) -> None:
        try:
            while (admitted := self._wait()) is not None:
                for work in admitted:
                    self._guarded(work, self._admit, work)
                if self._encoder is None and self.pictures.busy:
                    self._encode(self.tiles if self.batch.members else max(self.tiles, TILES_AT_REST))
                self._take_encoded()
                if self.batch.members:
                    self._step()
        finally:
            self.pictures.close()
            if self._encoder is not None:
                self._encoder.join()
            with self._changed:
                self._closing = True
                left = [*self._works.values(), *self._queue]
                self._queue.clear()
            self._works.clear()
            for work in left:
                self._send([(work.answer, Closed("the engine shuts down before this answer's end"))])
            self._loop.call_soon_threadsafe(self._ended.set_result, None)

    def _wait(self) -> list[Work] | None:
        """The jobs that may begin, once there is anything to do; None to end."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            gone, self._gone = self._gone, []
            for work in [work for work in (*self._queue, *self._works.values()) if work.answer in gone]:
                if work.slot is None:
                    self._queue.remove(work)
                self._leave(work)
                self._counts["gone"] += 1
            if self._hurry or (self._closing and not self._queue and not self._works):
                return None
            free = self.max_batch - len(self._works)
            return [self._queue.popleft() for _ in range(min(free, len(self._queue)))]

    def _has_work(self) -> bool:
        if self.batch.members or self._encoded or self._gone or self._hurry:
            return True
        if self._works:
            return self._encoder is None or (self._queue and len(self._works) < self.max_batch)
        return self._queue or self._closing

    def _admit(self, work: Work) -> None:
        """Give a job a slot, and send for its pictures."""
        now = monotonic()
        work.answer.timings.queued, work.since = now - work.since, now
        pictures = tuple(picture for picture, _ in work.pictures)
        work.slot = self.slots.take(work.row, pictures, reuse=not work.job.prompt_logprobs)
        self._works[work.slot] = work
        inputs = work.job.inputs
        by_picture = zip(work.pictures, inputs.tiles.split(list(inputs.tile_counts)), inputs.image_sizes, strict=True)
        for (picture, count), tiles, size in by_picture:
            if picture.start + count <= work.row.cached:
                continue  # its keys are there
            if (tokens := self.pictures.want(picture.key, tiles, size, work)) is not None:
                work.tokens[picture.key] = tokens
            else:
                work.missing.add(picture.key)
        if not work.missing:
            self._join(work)

    def _run_encoder(self) -> None:
        try:
            while self.pictures.wait():
                self._encode(max(self.tiles, TILES_APART))
        finally:  # without it nobody would be told who waits for a picture
            with self._changed:
                self._hurry = True
                self._changed.notify()

    def _encode(self, tiles: int) -> None:
        """A few tiles; in the encoder's thread, if there is one."""
        encoded = self.pictures.encode(tiles)
        with self._changed:
            self._encoded += encoded
            self._changed.notify()

    def _take_encoded(self) -> None:
        """Jobs whose pictures are all there join the batch; one whose picture cannot be encoded fails."""
        with self._changed:
            encoded, self._encoded = self._encoded, []
        for picture in encoded:
            for work in picture.users:
                if self._works.get(work.slot) is work:  # it may have left meanwhile
                    self._guarded(work, self._provide, work, picture)

    def _provide(self, work: Work, picture: Encoded) -> None:
        if isinstance(picture.tokens, Exception):
            raise picture.tokens
        work.tokens[picture.key] = picture.tokens
        work.missing.discard(picture.key)
        if not work.missing:
            self._join(work)

    @torch.inference_mode()
    def _join(self, work: Work) -> None:
        """The embeddings of what the slot does not hold yet, and into the batch."""
        cached = work.row.cached
        tokens = [
            work.tokens[picture.key][max(0, cached - picture.start) :]
            for picture, count in work.pictures
            if picture.start + count > cached
        ]
        embeddings = self.pipeline.model.embed_ids(work.row.ids[cached:], tokens)
        work.tokens.clear()
        work.member = self.batch.join(work.row, work.slot, embeddings, work.guide, work.job.prompt_logprobs)

    def _step(self) -> None:
        began, members = monotonic(), list(self.batch.members)
        before = sum(member.row.cached for member in members)
        results = tried(self.batch.step)
        if isinstance(results, Exception):  # the fault of one row, or of the step: each alone will tell
            error, results = results, [result for member in members for result in self._alone(member)]
            if not any(isinstance(result, Exception) for _, result in results):
                log.warning("a step of %d rows failed, each row alone did not: %s", len(members), error, exc_info=error)
        seconds, now = monotonic() - began, monotonic()
        positions = sum(member.row.cached for member in members) - before
        running = sum(isinstance(result, Token) and len(m.row.ids) > m.row.prompt_tokens + 1 for m, result in results)
        self._counts["steps"] += 1
        self._counts["prompt_tokens"] += positions - running
        self._counts["generated_tokens"] += len(results)
        sent, ended = [], 0
        for member, result in results:
            work = self._works[member.slot]
            first = len(member.row.ids) == member.row.prompt_tokens + 1
            if first:
                work.answer.prompt_logprobs = member.prompt_logprobs
                work.answer.timings.prefill, work.since = now - work.since, now
            if isinstance(result, Exception) or result.finish_reason is not None:
                work.answer.timings.decode = 0.0 if first else now - work.since
                work.member = None
                self._leave(work, keep=isinstance(result, Token))
                self._counts["answers" if isinstance(result, Token) else "failures"] += 1
                ended += 1
            sent.append((work.answer, result))
        self._send(sent)
        self._pace.step(seconds, ended)
        if self._observe is not None:
            self._observe(Step(seconds, positions - running, len(results), len(members)))

    def _alone(self, member: Member) -> Sequence[tuple[Member, Token | Exception]]:
        results = tried(self.batch.step, [member])
        if isinstance(results, Exception):
            self.batch.leave(member)
            return [(member, final(results))]
        return results

    def _guarded(self, work: Work, action: Callable, *arguments: object) -> None:
        """Do something for a job; if it fails, the job fails, and no other."""
        error = tried(action, *arguments)
        if isinstance(error, Exception):
            self._counts["failures"] += 1
            self._leave(work, keep=False)
            self._send([(work.answer, final(error))])

    def _leave(self, work: Work, keep: bool = True) -> None:
        """A job is over: its slot is free from now on."""
        with self._changed:
            self._open -= 1
        if work.member is not None:
            self.batch.leave(work.member)
        self.pictures.drop(work)
        if work.slot is not None:
            del self._works[work.slot]
            self.slots.give_back(work.slot, keep)

    def _send(self, items: Sequence[tuple[Answer, Token | Exception]]) -> None:
        """One wake-up of the event loop for all that a step gave."""
        self._loop.call_soon_threadsafe(_deliver, items)


def _deliver(items: Sequence[tuple[Answer, Token | Exception]]) -> None:
    for answer, item in items:
        answer.deliver(item)


def _check_grammar(job: Job, row: Row) -> None:
    """Refuse what would keep a guided answer from ending valid."""
    room = row.limit - row.prompt_tokens
    if room < job.grammar.minimum:
        raise InputError(
            f"max_new_tokens: found room for {room} tokens, expected at least {job.grammar.minimum}, those of the "
            "shortest answer that was found for the grammar"
        )
    if job.options.stop:
        raise InputError(f"stop: found {job.options.stop!r} beside a grammar, which alone says where the answer ends")
