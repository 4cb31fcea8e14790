"""From a checked request to its answers: what the routes of TGI and of OpenAI share.

Pictures are fetched on the event loop; opened, cut into tiles and tokenised in worker threads; the engine computes.
It knows nothing of the fields of requests and responses.
"""

import asyncio
import base64
import binascii
import io
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar

from PIL import Image
from starlette.requests import Request

from minivlm.answer import Options, Token
from minivlm.errors import InputError
from minivlm.pipeline import Pipeline
from minivlm.processor import Inputs
from minivlm.processor.images import FORMATS
from minivlm.serve.engine import Engine
from minivlm.serve.errors import ClientGone, invalid, overloaded
from minivlm.serve.grammar import compile_grammar
from minivlm.serve.jobs import Answer, Grammar, Job
from minivlm.serve.limits import Limits
from minivlm.serve.metrics import Metrics
from minivlm.serve.remote import Fetcher

WARM_TOKENS = 2  # the second is the first that is decoded alone
MAX_CHARACTERS = 1_000_000  # of a prompt that shall be truncated; others are bounded by what could fit

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """The text that the model reads, `<image>` where a picture belongs; and the pictures: addresses, or their files."""

    text: str
    pictures: tuple[str | bytes, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A token as TGI shows it: `text` is what it adds, stop strings and special tokens included. index: from 1.

    bare: it begins a text that loses the blank before its first word.
    """

    index: int
    token: Token
    text: str
    special: bool
    bare: bool


@dataclass(frozen=True)
class Finished:
    """A whole answer. text: without the stop string that ended it; spoken: with it, as TGI has it."""

    pieces: tuple[Piece, ...]
    text: str
    spoken: str
    finish_reason: Literal["stop", "stop_string", "length"]
    prompt_tokens: int
    seed: int | None

    @property
    def mean_logprob(self) -> float:
        """What `best_of` chooses by."""
        return sum(piece.token.sampled_logprob for piece in self.pieces) / len(self.pieces)


@dataclass
class Record:
    """What is known of a request's course: for its log line, its headers and the metrics. Times in seconds."""

    began: float = field(default_factory=time.perf_counter)
    validation: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finish_reason: str = ""
    error: str | None = None  # the kind of the one that ended a stream early, whose status was sent before
    answers: list[Answer] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds since the request's body had come."""
        return time.perf_counter() - self.began


class Generation:
    """One answer on its way; when its last piece has come, `finished` is there."""

    def __init__(self, service: "Service", answer: Answer, record: Record):
        self._service, self._record, self.answer = service, record, answer
        self.finished: Finished | None = None
        record.answers.append(answer)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The tokens as they come. Raises what `errors.TOLD` lists."""
        vocabulary = self._service.pipeline.vocabulary
        tokenizer, ends = vocabulary.tokenizer, vocabulary.tokenizer.special_ids | vocabulary.eos_ids
        texts = tokenizer.stream(before=self.answer.row.before)
        pieces: list[Piece] = []
        async for token in self.answer:
            special = token.id in ends
            text = tokenizer.decode([token.id], skip_special=False) if special else texts.push(token.id)
            if token.finish_reason is not None:
                text = texts.finish() + text if special else text + texts.finish()
            bare = not pieces and not self.answer.row.before
            pieces.append(Piece(len(pieces) + 1, token, text, special, bare))
            if token.finish_reason is not None:
                self._end(pieces)
            yield pieces[-1]

    async def whole(self) -> Finished:
        """The answer once it is whole."""
        async for _ in self.pieces():
            pass
        assert self.finished is not None, "the engine ended an answer without a reason"
        return self.finished

    def _end(self, pieces: list[Piece]) -> None:
        row, timings, record, metrics = self.answer.row, self.answer.timings, self._record, self._service.metrics
        reason = pieces[-1].token.finish_reason
        text = "".join(piece.token.text for piece in pieces)
        spoken = text
        if reason == "stop_string":
            said = "".join(piece.text for piece in pieces if not piece.special)
            spoken += min((stop for stop in row.options.stop if said.startswith(text + stop)), key=len)
        self.finished = Finished(tuple(pieces), text, spoken, reason, row.prompt_tokens, row.sampling.seed)
        # Of several answers to one request: the tokens of all, the time of the slowest.
        record.prompt_tokens = max(record.prompt_tokens, row.prompt_tokens)
        record.generated_tokens += len(pieces)
        record.finish_reason = reason
        record.queue = max(record.queue, timings.queued)
        record.inference = max(record.inference, timings.prefill + timings.decode)
        metrics.queue.observe(timings.queued)
        metrics.inference.observe(timings.prefill + timings.decode)
        metrics.input_length.observe(row.prompt_tokens)
        metrics.generated.observe(len(pieces))
        metrics.skipped.observe(0)
        metrics.per_token.observe(timings.decode / max(1, len(pieces) - 1))


class Service:
    """One model behind HTTP."""

    def __init__(self, name: str, pipeline: Pipeline, engine: Engine, limits: Limits, fetcher: Fetcher | None,
                 metrics: Metrics):  # fmt: skip
        """name: of the model, as clients see it. fetcher: None where no picture is fetched from the network."""
        self.name, self.pipeline, self.engine, self.limits, self.fetcher = name, pipeline, engine, limits, fetcher
        self.device = str(pipeline.model.language_model.embed_tokens.weight.device)
        self.metrics, metrics.state = metrics, engine.state
        self._admitted = 0
        self._workers = ThreadPoolExecutor(limits.validation_workers, thread_name_prefix="validation")
        pieces = pipeline.processor.tokenizer.backend.get_vocab(with_added_tokens=True)
        self._longest_piece = max(map(len, pieces))
        self._pieces = cache(pipeline.vocabulary.piece)  # decoding one costs two calls; there are V of them

    def close(self) -> None:
        """Ends the worker threads; the engine has a `close` of its own."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def warm(self) -> None:
        """Makes what is made once: the grammars' tokenizer, kernels, graphs and buffers of tower and decoder."""
        processor = self.pipeline.processor
        message = {"role": "user", "content": [{"type": "image"}]}
        text = "<image>" if processor.chat_template is None else processor.render([message])
        picture = io.BytesIO()
        Image.new("RGB", (320, 320)).save(picture, "PNG")
        inputs = await self.inputs(Prompt(text, (picture.getvalue(),)))
        for grammar in (None, await self.grammar("regex", "aa?")):
            async for _ in self.engine.submit(Job(inputs, Options(max_new_tokens=WARM_TOKENS), grammar)):
                pass

    @contextmanager
    def admitted(self) -> Iterator[Record]:
        """A place among the requests that are worked on; 429 if there is none."""
        if self._admitted >= self.limits.max_concurrent_requests:
            raise overloaded(1)
        record = Record()
        self._admitted += 1
        self.metrics.requests.inc()
        try:
            yield record
            if record.finish_reason:
                self.metrics.successes.inc()
                self.metrics.duration.observe(record.total)
        finally:
            self._admitted -= 1
            for answer in record.answers:  # whoever leaves, leaves nothing running
                answer.cancel()

    async def work(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The function's result, computed in a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, partial(function, *arguments))

    async def inputs(self, prompt: Prompt, truncate: int | None = None) -> Inputs:
        """What the model reads, within the limits on pictures, prompt and its length in tokens."""
        limits, most = self.limits, self.limits.max_input_tokens
        if len(prompt.pictures) > limits.max_images:
            raise invalid(f"too many pictures: found {len(prompt.pictures)}, expected at most {limits.max_images}")
        characters = MAX_CHARACTERS if truncate else self._longest_piece * most
        if len(prompt.text) > characters:
            raise invalid(f"`inputs` is too long: found {len(prompt.text)} characters, expected at most {characters}")
        try:
            async with asyncio.TaskGroup() as tasks:
                fetched = [tasks.create_task(self._bytes(source)) for source in prompt.pictures]
        except ExceptionGroup as errors:  # the first to fail has ended the others
            raise errors.exceptions[0] from None
        inputs = await self.work(self._inputs, prompt.text, [task.result() for task in fetched])
        if truncate is not None:
            inputs = truncated(inputs, truncate, self.pipeline)
        if len(inputs.ids) > most:
            raise invalid(f"`inputs` must have less than {most} tokens. Given: {len(inputs.ids)}")
        return inputs

    async def grammar(self, kind: Literal["json", "regex"], value: dict[str, Any] | str) -> Grammar:
        """A compiled grammar. What is wrong with it is told in TGI's words."""
        vocabulary = self.pipeline.vocabulary
        try:
            return await self.work(compile_grammar, kind, value, vocabulary.tokenizer, vocabulary)
        except InputError as error:
            raise invalid(f"grammar is not valid: {error}") from None

    async def start(self, inputs: Inputs, options: Options, grammar: Grammar | None, record: Record,
                    prompt_logprobs: bool = False) -> Generation:  # fmt: skip
        """Hands one answer to the engine. Raises what the engine refuses it with."""
        limit, given = self.limits.max_total_tokens - len(inputs.ids), options.max_new_tokens
        if given is not None and given > limit:
            raise invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {self.limits.max_total_tokens}. "
                f"Given: {len(inputs.ids)} `inputs` tokens and {given} `max_new_tokens`"
            )
        options = replace(options, max_new_tokens=limit if given is None else given)
        job = await self.work(Job, inputs, options, grammar, prompt_logprobs)
        generation = Generation(self, self.engine.submit(job), record)
        record.validation = record.validation or record.total
        self.metrics.max_new_tokens.observe(options.max_new_tokens)
        self.metrics.validation.observe(record.validation)
        return generation

    def piece(self, token_id: int) -> str:
        """The text of one id by itself, special or not."""
        return self._pieces(token_id)

    def spelled(self, token_id: int, bare: bool) -> tuple[str, list[int] | None]:
        """An id as OpenAI's routes tell it wherever it could stand: its text, and the bytes of it.

        A byte of a longer character is written as `\\xe2`; special tokens have no bytes. bare: see `Piece`.
        """
        tokenizer = self.pipeline.vocabulary.tokenizer
        if token_id in tokenizer.byte_ids:
            value = int(tokenizer.backend.id_to_token(token_id)[1:-1], 16)
            return f"\\x{value:02x}", [value]
        text = tokenizer.decode([token_id], skip_special=False) if bare else self.piece(token_id)
        return text, None if token_id in tokenizer.special_ids else list(text.encode())

    async def _bytes(self, source: str | bytes) -> bytes:
        """The file of one picture."""
        if isinstance(source, bytes):
            return source
        scheme = source[:8].lower()
        if scheme.startswith("data:"):
            return await self.work(data_uri, source, self.limits.max_image_bytes)
        if not scheme.startswith(("http://", "https://")):
            raise InputError(f"invalid image content: {source[:40]!r}, expected an http(s) URL or a data: URI")
        if self.fetcher is None:
            raise InputError("invalid image content: a URL, but this server fetches none (--no-remote-images)")
        return await self.fetcher.fetch(source)

    def _inputs(self, text: str, files: Sequence[bytes]) -> Inputs:
        """In a worker thread. The processor opens pictures one after another, so that only one is ever large."""
        for file in files:
            check_pixels(file, self.limits.max_image_pixels)
        return self.pipeline.processor(text, files)


def data_uri(uri: str, most: int) -> bytes:
    """The bytes of `data:MIME;base64,DATA`; never more than `most`."""
    header, _, data = uri.partition(",")
    if not header.endswith(";base64"):
        raise InputError(f"invalid image content: {header[:40]!r}, expected data:MIME;base64,DATA")
    if len(data) > most * 4 // 3 + 4:
        raise InputError(f"picture: {len(data) * 3 // 4} bytes in a data: URI, expected at most {most}")
    try:
        return base64.b64decode(urllib.parse.unquote_to_bytes(data), validate=True)
    except binascii.Error as error:
        raise InputError(f"invalid image content: not base64 ({error})") from None


def check_pixels(file: bytes, most: int) -> None:
    """Refuses a picture by the size that its header tells, before a pixel is decoded."""
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"picture: more than {most} pixels, refused as a decompression bomb") from None
    except (OSError, SyntaxError, ValueError):
        return  # `load_image` says what is wrong with it
    if width * height > most:
        raise InputError(f"picture: {width}x{height} pixels, expected at most {most} in all")


def truncated(inputs: Inputs, length: int, pipeline: Pipeline) -> Inputs:
    """The last `length` ids, with the pictures that are whole among them. No picture is cut."""
    drop = len(inputs.ids) - length
    if drop <= 0:
        return inputs
    image_id = pipeline.processor.tokenizer.image_token_id
    lost = inputs.ids[:drop].count(image_id)
    pictures = tiles = 0
    while lost > 0:
        lost -= pipeline.processor.geometry.image_token_count(inputs.image_sizes[pictures])
        tiles += inputs.tile_counts[pictures]
        pictures += 1
    if lost < 0:
        raise invalid(f"`truncate` = {length} cuts through picture {pictures}, expected whole pictures")
    return Inputs(inputs.ids[drop:], inputs.tiles[tiles:], inputs.image_sizes[pictures:], inputs.tile_counts[pictures:])


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work, which is cancelled if the client goes away meanwhile."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
