"""What a client is told when its request is refused or fails: status, JSON body and headers as TGI's.

It knows nothing of routes. Inside the server an error is raised; app.py has the handlers that send it.
"""

import math
from typing import Any

from starlette.exceptions import HTTPException

from minivlm.errors import GenerationError, InputError, NumericError
from minivlm.serve.faults import Failed
from minivlm.serve.jobs import Closed, Overloaded

# What the engine and the processor raise for one request; any other exception is our own mistake, not yet logged.
TOLD = (InputError, NumericError, GenerationError, Overloaded, Closed, Failed)


class ClientGone(Exception):
    """The client closed its connection before the answer was ready; nobody will read a response."""


class Refused(HTTPException):
    """An answer that is an error: {"error", "error_type"}, or plain text where `kind` is None.

    It is an HTTPException so that FastAPI passes it on from wherever it is raised. The plain texts are those that
    TGI's web framework writes before TGI's own code is reached.
    """

    def __init__(self, status: int, message: str, kind: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(status, message, headers)
        self.kind = kind

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of TGI's error."""
        return {"error": self.detail, "error_type": self.kind}

    @property
    def openai(self) -> dict[str, Any]:
        """On OpenAI's routes, whose clients show only `error.message`; also TGI's event for an error in a stream."""
        kind = self.kind or "invalid_request"
        error = {
            "message": self.detail,
            "type": kind,
            "param": None,
            "code": None,
            "http_status_code": self.status_code,
        }
        return {"error": error, "error_type": kind}


def invalid(message: str, kind: str = "validation") -> Refused:
    """422: a value that is refused."""
    return Refused(422, f"Input validation error: {message}", kind)


def overloaded(seconds: float) -> Refused:
    """429: try again after so many seconds."""
    return Refused(429, "Model is overloaded", "overloaded", {"Retry-After": str(max(1, math.ceil(seconds)))})


def unhealthy() -> Refused:
    """503: the model cannot answer."""
    return Refused(503, "unhealthy", "healthcheck", {"Retry-After": "5"})


def closing() -> Refused:
    """503: the server is being stopped; TGI, which cuts the connection then, has no words for it."""
    return Refused(503, "the server is shutting down", "shutdown", {"Retry-After": "5"})


def internal() -> Refused:
    """500: our own mistake. What it was is in the log, not in the answer."""
    return Refused(500, "internal error, see the server's log", "internal")


def refused(error: Exception) -> Refused:
    """What the client is told of an error in TOLD."""
    match error:
        case Refused():
            return error
        case Failed():
            return internal()
        case InputError():
            return invalid(str(error))
        case Overloaded():
            return overloaded(error.retry_after)
        case Closed():
            return closing()
        case GenerationError():
            return Refused(500, f"Incomplete generation: {error}", "incomplete_generation")
        case NumericError():
            return Refused(424, f"Request failed during generation: {error}", "generation")
    raise error
