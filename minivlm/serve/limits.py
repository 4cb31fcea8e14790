"""What a request may cost before the model sees it: bytes, seconds, nesting, numbers that are none.

Every limit has its own message that says what was found and what is allowed. It knows nothing of routes.
"""

import asyncio
import json
import logging
import math
import re
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivlm.errors import InputError
from minivlm.serve.errors import TOLD, ClientGone, Refused, internal

log = logging.getLogger("minivlm.serve")

MAX_DEPTH = 64  # brackets within brackets
MAX_VALUES = 100_000  # each costs some 100 bytes once parsed, whatever it costs on the wire
# A string, or one character that opens, closes or separates. Possessive: nothing is ever tried twice.
STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+|[\[\]{},]', re.DOTALL)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Limits:
    """What one server allows; the defaults that TGI has are TGI's, but for the payload.

    max_input_tokens, max_total_tokens: None is what the model can read. TGI's payload limit of 2 MB would refuse
    most photographs. Seconds: of a body and of a picture's way here; of a client that takes no more of its answer.
    """

    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    validation_workers: int = 2
    payload_limit: int = 20_000_000
    max_images: int = 8
    max_image_bytes: int = 10_000_000
    max_image_pixels: int = 50_000_000
    body_seconds: float = 30.0
    fetch_seconds: float = 20.0
    send_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')}: found {value}, expected more than 0")
        found, most = self.max_image_pixels, Image.MAX_IMAGE_PIXELS
        if found > most:
            raise InputError(f"--max-image-pixels: found {found}, expected at most {most}")

    def of_context(self, context: int) -> "Limits":
        """With the numbers of tokens known, for a model that reads `context` of them."""
        total = self.max_total_tokens or context
        if total > context:
            raise InputError(f"--max-total-tokens: found {total}, expected at most the model's context of {context}")
        inputs = self.max_input_tokens or total - 1
        if inputs >= total:
            raise InputError(f"--max-input-tokens: found {inputs}, expected less than --max-total-tokens, {total}")
        return Limits(**{**vars(self), "max_total_tokens": total, "max_input_tokens": inputs})


# Servers before this one may read the one length, this one the other: a request could hide behind the difference.
AMBIGUOUS = PlainTextResponse(
    "Found Content-Length and Transfer-Encoding, expected one of them", 400, {"Connection": "close"}
)


class BodyLimit:
    """ASGI middleware: no body is larger or slower than the limits, and no client stalls its answer for ever."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limits, loop = self.limits, asyncio.get_running_loop()
        deadline, size, whole = loop.time() + limits.body_seconds, 0, False
        given = dict(scope["headers"])
        declared = given.get(b"content-length", b"0")
        if b"content-length" in given and b"transfer-encoding" in given:
            return await AMBIGUOUS(scope, receive, send)

        async def limited_receive() -> Message:
            nonlocal size, whole
            if whole:  # nothing is left to come but the news that the client has gone
                return await receive()
            if declared.isdigit() and int(declared) > limits.payload_limit:
                raise _too_large(int(declared), limits)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                text = f"Failed to buffer the request body: not received within {limits.body_seconds:g} s"
                raise Refused(408, text, headers={"Connection": "close"}) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > limits.payload_limit:
                raise _too_large(size, limits)
            return message

        async def limited_send(message: Message) -> None:
            try:
                async with asyncio.timeout(limits.send_seconds):
                    await send(message)
            except TimeoutError:
                raise OSError(f"the client took nothing for {limits.send_seconds:g} s") from None

        await self.app(scope, limited_receive, limited_send)


def _too_large(size: int, limits: Limits) -> Refused:
    text = "Failed to buffer the request body: length limit exceeded"
    return Refused(413, f"{text} ({size} bytes, at most {limits.payload_limit})")


class StrictRequest(Request):
    """A request whose JSON is what JSON may be: UTF-8, finite numbers, no half characters, bounded in shape."""

    async def json(self) -> Any:
        """The body's value, parsed once."""
        if not hasattr(self, "_json"):
            self._json = parse(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route whose requests are strict; FastAPI's own way to change how bodies are read.

    Our own mistakes are logged and become an answer here. Starlette would raise them again behind their answer, and
    uvicorn then cuts the connection on which the client's next request may be on its way.
    """

    def get_route_handler(self):
        """The handler, given the stricter request."""
        handler = super().get_route_handler()

        async def strict(request: Request):
            try:
                return await handler(StrictRequest(request.scope, request.receive))
            except (HTTPException, RequestValidationError, ClientGone, *TOLD):
                raise
            except Exception as error:
                log.exception("%s %s: %s", request.method, request.url.path, error)
                raise internal() from None

        return strict


def parse(body: bytes) -> Any:
    """The value of a JSON text; Refused (400, in the words of TGI's web framework) for what is none."""
    _check_structure(body)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_not_a_number, parse_float=_finite)
        if SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise _not_json("a string holds half of a surrogate pair") from None
    except ValueError as error:  # JSONDecodeError, and an integer of more than 4,300 digits
        raise _not_json(str(error)) from None
    return value


def _check_structure(body: bytes) -> None:
    """Counts brackets and commas outside of strings, before anything is built from them."""
    depth = 0
    for values, found in enumerate(STRUCTURE.finditer(body)):
        character = found.group()[:1]
        if character in b"[{":
            depth += 1
        elif character in b"]}":
            depth -= 1
        if depth > MAX_DEPTH:
            raise _not_json(f"nested more than {MAX_DEPTH} levels deep")
        if values > MAX_VALUES:
            raise _not_json(f"more than {MAX_VALUES} values")


def _not_json(reason: str) -> Refused:
    return Refused(400, f"Failed to parse the request body as JSON: {reason}")


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text:.20} is out of range")
    return value
