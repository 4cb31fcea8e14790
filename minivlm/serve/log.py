"""What the server tells on stderr: one line a request, and what uvicorn and the engine have to say, as text or JSON.

Prompts, pictures and answers are never written. What comes from outside is escaped, so that a line stays a line.
"""

import json
import logging
import sys
import time
import traceback
from dataclasses import dataclass
from typing import TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

GONE = 499  # what nginx writes for a client that left before its answer


@dataclass(frozen=True)
class Log:
    """Writes lines. as_json: each line is a JSON object."""

    as_json: bool = False
    stream: TextIO | None = None

    def say(self, text: str, **values: object) -> None:
        """One line: a text and values, with the time."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        if self.as_json:
            line = json.dumps({"time": stamp, "message": text, **values})
        else:
            told = "".join(f" {name}={value}" for name, value in values.items())
            line = f"{stamp} {text}{told}".encode("unicode_escape").decode("ascii")
        print(line, file=self.stream or sys.stderr, flush=True)


class Relay(logging.Handler):
    """Passes what libraries log on to the same lines, tracebacks as one value."""

    def __init__(self, log: Log):
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One record as one line."""
        values = {"level": record.levelname.lower(), "logger": record.name}
        if record.exc_info is not None and record.exc_info[1] is not None:
            values["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        self.log.say(record.getMessage(), **values)


class AccessLog:
    """ASGI middleware: a line for every request, when its response has ended."""

    def __init__(self, app: ASGIApp, log: Log):
        self.app, self.log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, ended = time.perf_counter(), GONE, False

        async def noted(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))

        try:
            await self.app(scope, receive, noted)
        finally:
            host = scope["client"][0] if scope.get("client") else "-"
            values: dict[str, object] = {"client": host, "status": status, "ms": _ms(time.perf_counter() - began)}
            if not ended:
                values["ended"] = "early"
            record = scope.get("record")
            if record is not None and record.error is not None:
                values |= {"ended": "early", "error": record.error}
            if record is not None and record.finish_reason:
                values |= {
                    "prompt_tokens": record.prompt_tokens,
                    "generated_tokens": record.generated_tokens,
                    "finish_reason": record.finish_reason,
                    "validation_ms": _ms(record.validation),
                    "queue_ms": _ms(record.queue),
                    "inference_ms": _ms(record.inference),
                }
            self.log.say(f"{scope['method'][:16]} {scope['path'][:200]}", **values)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
