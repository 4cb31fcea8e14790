"""How answers travel: server-sent events, headers, and the documented refusals that every route may give."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import Depends
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Send

from minivlm import __version__
from minivlm.serve.errors import TOLD, Refused, internal, refused
from minivlm.serve.service import Finished, Generation, Piece, Record, Service

PING_SECONDS = 15.0  # of silence, after which a proxy might take the connection for dead
DONE = b"data: [DONE]\n\n"  # huggingface_hub looks for it with this very blank

log = logging.getLogger("minivlm.serve")


class ErrorResponse(BaseModel):
    """What is wrong, and which kind of error it is."""

    error: str
    error_type: str


TEXTS = {
    400: "The body is not JSON",
    401: "The key is missing or wrong",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body's content type is not application/json",
}
ERRORS = {
    422: "A value is refused: of the wrong type (plain text), or against a rule",
    424: "The model failed",
    429: "Too many requests; see Retry-After",
    500: "The answer could not be completed",
    503: "The server is being stopped",
}


class OpenAIError(BaseModel):
    """What is wrong, where OpenAI's clients look for it."""

    message: str
    type: str
    param: str | None
    code: str | None
    http_status_code: int


class OpenAIErrorResponse(BaseModel):
    """What is wrong, on OpenAI's routes."""

    error: OpenAIError
    error_type: str


def refusals(openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """The responses, for the OpenAPI document, of a route that takes JSON."""
    model = OpenAIErrorResponse if openai else ErrorResponse
    told = {status: {"description": text, "model": model} for status, text in (TEXTS | ERRORS).items()}
    if not openai:
        plain = {"text/plain": {"schema": {"type": "string"}}}
        told |= {status: {"description": text, "content": plain} for status, text in TEXTS.items()}
        told[422]["content"] = plain
    told[401] = {"description": TEXTS[401]}
    return told


def events_of(model: str) -> dict[int | str, dict[str, Any]]:
    """The response, for the OpenAPI document, that is a stream; each event's data is JSON of the model."""
    data = {"type": "string", "contentMediaType": "application/json",
            "contentSchema": {"$ref": f"#/components/schemas/{model}"}}  # fmt: skip
    schema = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"schema": schema}}}}


def service_of(request: Request) -> Service:
    """The model that the application serves."""
    return request.app.state.service


async def admitted(request: Request) -> AsyncIterator[Record]:
    """A place among the requests that are worked on, until the response is sent; 429 if there is none."""
    with service_of(request).admitted() as record:
        request.scope["record"] = record  # for the line in the log
        yield record


Served = Annotated[Service, Depends(service_of)]  # parameters of a route
Admitted = Annotated[Record, Depends(admitted)]


class EventStream(StreamingResponse):
    """Server-sent events. Whatever ends it, its source is closed, which cancels an answer that is not whole."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str]):
        super().__init__(with_pings(events), headers={"Cache-Control": "no-cache", **headers})

    async def stream_response(self, send: Send) -> None:
        """Starlette's own, with the source closed behind it."""
        async with aclosing(self.body_iterator):
            await super().stream_response(send)


def event(value: BaseModel | dict[str, Any]) -> bytes:
    """One event, written as TGI does: no blank behind the colon, absent fields left out."""
    if isinstance(value, dict):
        value = ErrorEvent.model_validate(value)
    return b"data:" + value.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class ErrorEvent(BaseModel):
    """An error in the middle of a stream; TGI's routes and OpenAI's have different ones."""

    error: Any
    error_type: str | None = None


async def told(
    service: Service, record: Record, events: AsyncIterator[bytes], openai: bool = False
) -> AsyncIterator[bytes]:
    """The events, and one more for the error that ends them early. openai: in OpenAI's form, with `[DONE]` at the end.

    The status is sent long before: an exception that left this would cut the connection, and tell the client nothing.
    """
    try:
        async with aclosing(events):
            async for one in events:
                yield one
    except Exception as error:
        if isinstance(error, (*TOLD, Refused)):
            refusal = refused(error)
        else:
            log.exception("a stream: %s", error)
            refusal = internal()
        service.metrics.failures.labels(err=refusal.kind).inc()
        record.error = refusal.kind
        yield event(refusal.openai if openai else refusal.body)
    if openai:
        yield DONE


async def with_pings(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events, and a comment whenever there was none for a while."""
    coming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            await asyncio.wait({coming}, timeout=PING_SECONDS)
            if not coming.done():
                yield b":\n\n"
            elif (data := coming.result()) is None:
                return
            else:
                yield data
                coming = asyncio.ensure_future(anext(events, None))
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await events.aclose()


async def merged(running: Sequence[Generation]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several answers as they come, each with the number of its answer."""
    if len(running) == 1:
        async with aclosing(running[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    coming: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def pump(number: int) -> None:
        async for piece in running[number].pieces():
            coming.put_nowait((number, piece))

    tasks = [asyncio.ensure_future(pump(number)) for number in range(len(running))]
    for task in tasks:  # None, or what ended it, behind its last piece
        task.add_done_callback(lambda task: None if task.cancelled() else coming.put_nowait(task.exception()))
    try:
        left = len(tasks)
        while left:
            item = await coming.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def envelope(service: Service, name: str) -> dict[str, Any]:
    """The fields that every response of OpenAI's routes has. name: of the object."""
    prefix = "chatcmpl" if name.startswith("chat") else "cmpl"
    return {
        "object": name,
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.name,
        "system_fingerprint": f"minivlm-{__version__}",
    }


def usage(finished: Sequence[Finished], each: int) -> dict[str, int]:
    """The tokens of a request. each: the number of answers to one prompt, which is counted once."""
    prompt = sum(one.prompt_tokens for one in finished[::each])
    completion = sum(len(one.pieces) for one in finished)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def headers(service: Service, record: Record, characters: int, finished: Finished) -> dict[str, str]:
    """What TGI tells about an answer that is sent whole: seconds for x-compute-time, else milliseconds."""
    tokens = max(1, record.generated_tokens)
    values = {
        "x-compute-type": service.device,
        "x-compute-time": record.total,
        "x-compute-characters": characters,
        "x-total-time": round(record.total * 1000),
        "x-validation-time": round(record.validation * 1000),
        "x-queue-time": round(record.queue * 1000),
        "x-inference-time": round(record.inference * 1000),
        "x-time-per-token": round(record.inference * 1000 / tokens),
        "x-prompt-tokens": finished.prompt_tokens,
        "x-generated-tokens": record.generated_tokens,
    }
    return {name: str(value) for name, value in values.items()}


def stream_headers(service: Service, characters: int) -> dict[str, str]:
    """What TGI tells before a stream begins; the last keeps proxies from holding events back."""
    return {
        "x-compute-type": service.device,
        "x-compute-characters": str(characters),
        "X-Accel-Buffering": "no",
    }
