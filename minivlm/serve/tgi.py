"""text-generation-inference's routes, its requests and its responses."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from minivlm.serve.errors import invalid
from minivlm.serve.limits import StrictRoute
from minivlm.serve.parameters import Parameters, Schema, grammar_of
from minivlm.serve.service import Finished, Generation, Piece, Prompt, Record, Service, unless_gone
from minivlm.serve.wire import (
    Admitted,
    EventStream,
    Served,
    event,
    events_of,
    headers,
    refusals,
    stream_headers,
    told,
)

# A picture in `inputs`, as Markdown writes one. The text in the brackets must be empty, and a ")" ends the address.
PICTURE = re.compile(r"!\[\]\(([^)]*)\)")
REASONS = {"stop": "eos_token", "stop_string": "stop_sequence", "length": "length"}

router = APIRouter(route_class=StrictRoute, tags=["text-generation-inference"])


# ---- requests


class GenerateRequest(Schema):
    """A prompt, with pictures as `![](https://...)` or `![](data:image/png;base64,...)`."""

    inputs: str = Field(examples=["What is shown?"])
    # TGI samples if `parameters` is not there at all, and is greedy if it is there and empty.
    parameters: Parameters = Parameters(do_sample=True)


class CompatGenerateRequest(GenerateRequest):
    """What huggingface_hub posts to `/`."""

    stream: bool = False


class VertexRequest(Schema):
    """Vertex AI's envelope."""

    instances: list[GenerateRequest] = Field(min_length=1)


# ---- responses


class PrefillToken(Schema):
    """A token of the prompt; the first has no probability."""

    id: int
    text: str
    logprob: float | None


class TokenOut(Schema):
    """A token of the answer; logprob: of the distribution that it was drawn from, as in TGI."""

    id: int
    text: str
    logprob: float
    special: bool


class AnswerDetails(Schema):
    """How an answer came about."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TokenOut]
    top_tokens: list[list[TokenOut]] | None = None


class BestOfSequence(AnswerDetails):
    """An answer that was not the best."""

    generated_text: str


class Details(AnswerDetails):
    """How the answer came about, and those that it was better than."""

    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(Schema):
    """The answer."""

    generated_text: str
    details: Details | None = None


class StreamDetails(Schema):
    """What the last event of a stream says of the answer."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Schema):
    """One event of a stream: a token; the last has the whole text."""

    index: int
    token: TokenOut
    top_tokens: list[TokenOut] | None = None
    generated_text: str | None
    details: StreamDetails | None


class SimpleToken(Schema):
    """A token of the prompt and where its text stands."""

    id: int
    text: str
    start: int
    stop: int


class VertexResponse(Schema):
    """Vertex AI's envelope."""

    predictions: list[str]


# ---- routes

OPTIONS: dict[str, Any] = {"response_model_exclude_unset": True, "responses": refusals()}
EVENTS = events_of("StreamResponse")
ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}


def as_json(refusal: dict[str, Any]) -> dict[str, Any]:
    """A documented refusal of a route that only streams: FastAPI would document its model as an event."""
    if "model" not in refusal:
        return refusal
    return {"description": refusal["description"], "content": refusal.get("content", {}) | ERROR}


STREAM = {status: as_json(refusal) for status, refusal in refusals().items()} | EVENTS


@router.post("/generate", **OPTIONS)
async def generate(
    request: Request, response: Response, asked: GenerateRequest, service: Served, record: Admitted
) -> GenerateResponse:
    """One answer, once it is whole."""
    answer, finished = await unless_gone(request, generate_whole(service, asked, record))
    response.headers.update(headers(service, record, len(asked.inputs), finished))
    return answer


@router.post("/generate_stream", status_code=200, response_class=EventStream, responses=STREAM)
async def generate_stream(asked: GenerateRequest, service: Served, record: Admitted) -> EventStream:
    """One answer, an event a token."""
    return EventStream(await generate_events(service, asked, record), stream_headers(service, len(asked.inputs)))


async def compat_generate(
    request: Request, response: Response, asked: CompatGenerateRequest, service: Served, record: Admitted
) -> Any:
    """`/generate` in a list, or `/generate_stream` if `stream` is true."""
    if asked.stream:
        return await generate_stream(asked, service, record)
    return [await generate(request, response, asked, service, record)]


@router.post("/tokenize", responses=refusals())
async def tokenize(request: Request, asked: GenerateRequest, service: Served, record: Admitted) -> list[SimpleToken]:
    """The tokens of a prompt, its image tokens included."""
    return await unless_gone(request, tokens_of(service, prompt_of(asked.inputs)))


@router.post("/vertex", responses=refusals())
async def vertex(request: Request, asked: VertexRequest, service: Served, record: Admitted) -> VertexResponse:
    """Several prompts in Vertex AI's envelope."""
    if len(asked.instances) > service.limits.max_client_batch_size:
        raise batch_exceeded(service)
    wholes = [generate_whole(service, instance, record) for instance in asked.instances]
    answers = await unless_gone(request, all_of(wholes))
    return VertexResponse(predictions=[answer.generated_text for answer, _ in answers])


# ---- what the routes share


def prompt_of(inputs: str) -> Prompt:
    """The prompt and the pictures of `inputs`: each stands where its Markdown stood, and nothing else is added."""
    if not inputs:
        raise invalid("`inputs` cannot be empty")
    return Prompt(PICTURE.sub("<image>", inputs), tuple(PICTURE.findall(inputs)))


async def started(
    service: Service, prompt: Prompt, parameters: Parameters, record: Record, count: int = 1
) -> list[Generation]:
    """`count` answers to one prompt, in the engine's hands."""
    wanted = grammar_of(parameters.grammar)
    grammar = None if wanted is None else await service.grammar(*wanted)
    inputs = await service.inputs(prompt, parameters.truncate)
    details = bool(parameters.decoder_input_details)
    return [
        await service.start(inputs, parameters.options(number), grammar, record, details) for number in range(count)
    ]


async def all_of(works: list[Any]) -> list[Any]:
    """The results of works that run together; the first to fail cancels the others."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in running]


async def generate_whole(service: Service, asked: GenerateRequest, record: Record) -> tuple[GenerateResponse, Finished]:
    """The answer to a request, the best of several if that is asked for."""
    parameters = asked.parameters
    parameters.check(service.limits, stream=False)
    prompt = prompt_of(asked.inputs)
    running = await started(service, prompt, parameters, record, parameters.best_of or 1)
    finished = await all_of([generation.whole() for generation in running])
    prefix = asked.inputs if parameters.return_full_text else ""
    order = sorted(range(len(finished)), key=lambda i: -finished[i].mean_logprob)  # stable: of equals the first
    best = finished[order[0]]
    response = GenerateResponse(generated_text=prefix + best.spoken)
    if parameters.details or parameters.decoder_input_details:
        whole = [sequence(service, running[i], finished[i]) for i in order]
        response.details = Details(**whole[0])
        if len(whole) > 1:
            pairs = zip(order[1:], whole[1:], strict=True)
            response.details.best_of_sequences = [
                BestOfSequence(**values, generated_text=prefix + finished[i].spoken) for i, values in pairs
            ]
    return response, best


def sequence(service: Service, generation: Generation, finished: Finished) -> dict[str, Any]:
    """The fields of `AnswerDetails`; those that were not asked for are left out."""
    values: dict[str, Any] = {
        "finish_reason": REASONS[finished.finish_reason],
        "generated_tokens": len(finished.pieces),
        "seed": finished.seed,
        "prefill": prefill(service, generation),
        "tokens": [token_out(piece) for piece in finished.pieces],
    }
    if any(piece.token.alternatives for piece in finished.pieces):
        values["top_tokens"] = [top_tokens(service, piece) for piece in finished.pieces]
    return values


def prefill(service: Service, generation: Generation) -> list[PrefillToken]:
    """The prompt's tokens with their log-probabilities, if `decoder_input_details` asked for them."""
    logprobs = generation.answer.prompt_logprobs
    if logprobs is None:
        return []
    pairs = zip(generation.answer.row.inputs.ids, logprobs, strict=True)
    return [PrefillToken(id=i, text=service.piece(i), logprob=logprob) for i, logprob in pairs]


def token_out(piece: Piece) -> TokenOut:
    """A token as TGI writes it."""
    token = piece.token
    return TokenOut(id=token.id, text=piece.text, logprob=token.sampled_logprob, special=piece.special)


def top_tokens(service: Service, piece: Piece) -> list[TokenOut]:
    """The likeliest ids at a token's place."""
    special = service.pipeline.processor.tokenizer.special_ids
    return [
        TokenOut(id=one.id, text=service.piece(one.id), logprob=one.logprob, special=one.id in special)
        for one in piece.token.alternatives
    ]


async def generate_events(service: Service, asked: GenerateRequest, record: Record) -> AsyncIterator[bytes]:
    """The events of a stream. What is refused is refused before the first, with a status of its own."""
    parameters = asked.parameters
    parameters.check(service.limits, stream=True)
    (generation,) = await started(service, prompt_of(asked.inputs), parameters, record)
    return told(service, record, _events(service, generation, asked))


async def _events(service: Service, generation: Generation, asked: GenerateRequest) -> AsyncIterator[bytes]:
    async for piece in generation.pieces():
        yield event(stream_response(service, generation, piece, asked.inputs, asked.parameters))


def stream_response(
    service: Service, generation: Generation, piece: Piece, inputs: str, parameters: Parameters
) -> StreamResponse:
    """One event of a stream."""
    response = StreamResponse(index=piece.index, token=token_out(piece), generated_text=None, details=None)
    if piece.token.alternatives:
        response.top_tokens = top_tokens(service, piece)
    finished = generation.finished
    if finished is not None:
        response.generated_text = (inputs if parameters.return_full_text else "") + finished.spoken
        if parameters.details:
            response.details = StreamDetails(
                finish_reason=REASONS[finished.finish_reason],
                generated_tokens=len(finished.pieces),
                seed=finished.seed,
                input_length=finished.prompt_tokens,
            )
    return response


async def tokens_of(service: Service, prompt: Prompt) -> list[SimpleToken]:
    """The tokens of a prompt; those of a picture stand where its placeholder does."""
    inputs = await service.inputs(prompt)
    return await service.work(_tokens_of, service, prompt.text, inputs.image_sizes)


def _tokens_of(service: Service, text: str, sizes: tuple[tuple[int, int], ...]) -> list[SimpleToken]:
    processor = service.pipeline.processor
    tokenizer, counts = processor.tokenizer, iter(map(processor.geometry.image_token_count, sizes))
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    found = list(zip(encoded.ids, encoded.offsets, strict=True))
    if len(tokenizer.encode(text)) > len(found):
        found.insert(0, (tokenizer.bos_token_id, (0, 0)))
    return [
        SimpleToken(id=i, text=text[start:stop], start=start, stop=stop)
        for i, (start, stop) in found
        for _ in range(next(counts) if i == tokenizer.image_token_id else 1)
    ]


def batch_exceeded(service: Service) -> Exception:
    """422: too many prompts in one request."""
    most = service.limits.max_client_batch_size
    return invalid(f"Number of prompts exceeds the maximum allowed batch size of {most}", "batch size exceeded")
