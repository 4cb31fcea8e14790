"""A client of a really running server: questions about drawn pictures, their answers and times; load.py and soak.py.

It starts servers as processes of their own and speaks OpenAI's chat completions, which other servers speak too.
"""

import base64
import io
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import httpx
from PIL import Image

from minivlm.errors import InputError
from minivlm.shards import one_line
from minivlm.train.draw import draw
from minivlm.train.questions import heldout

# Long answers and short ones by turns.
KINDS = ("describe", "box", "count", "text", "describe", "colour", "position", "presence")
MAX_TOKENS = 64  # the longest of these answers has about 60
START_SECONDS, STOP_SECONDS = 300, 60  # how long a server may take to load its model, and to end


@dataclass(frozen=True)
class Question:
    """A question about a picture, which is the bytes of a PNG file."""

    text: str
    picture: bytes

    @property
    def url(self) -> str:
        """The picture as a `data:` URI."""
        return f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"

    @property
    def content(self) -> list[dict[str, Any]]:
        """As a message of OpenAI's chat completions has it."""
        return [{"type": "image_url", "image_url": {"url": self.url}}, {"type": "text", "text": self.text}]


def questions(count: int, seed: int) -> list[Question]:
    """Held-out questions, each about a picture of its own, so that no server can answer from what it kept."""
    drawn = []
    for index in range(count):
        scene, qa = heldout(KINDS[index % len(KINDS)], index, seed)
        file = io.BytesIO()
        Image.fromarray(draw(scene)[0]).save(file, "PNG")
        drawn.append(Question(qa.question, file.getvalue()))
    return drawn


@dataclass(frozen=True)
class Answer:
    """A whole answer. first: seconds from the request to the first text; seconds: to the end."""

    text: str
    tokens: int
    first: float
    seconds: float


class Refused(Exception):
    """The server answered with a status that is not 200, or broke off. status: 0 where there was none."""

    def __init__(self, status: int, text: str, wait: float = 0.0):
        super().__init__(f"{status} {text}"[:300])
        self.status, self.wait = status, wait


def request(model: str, messages: Sequence[dict[str, Any]], **fields: object) -> dict[str, Any]:
    """The body of a greedy chat completion."""
    return {"model": model, "messages": list(messages), "max_tokens": MAX_TOKENS, "temperature": 0, **fields}


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Ask for an answer as it is generated and read it to its end. Raises Refused."""
    began, first, text, tokens, reason = time.perf_counter(), None, "", 0, None
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise await refusal(response)
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            chunk = json.loads(line[5:])
            if "error" in chunk:
                raise Refused(0, line)
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    text += piece
                reason = choice.get("finish_reason") or reason
            if usage := chunk.get("usage"):
                tokens = usage["completion_tokens"]
    seconds = time.perf_counter() - began
    if reason is None:
        raise Refused(0, "the stream ended before its answer did")
    return Answer(text, tokens, first or seconds, seconds)


async def refusal(response: httpx.Response) -> Refused:
    """What a response that is no answer says; 429 says how long to wait."""
    text = one_line((await response.aread()).decode(errors="replace"))
    return Refused(response.status_code, text, float(response.headers.get("retry-after", 0)))


def connect(url: str, seconds: float = 600) -> httpx.AsyncClient:
    """A client that opens as many connections as it is asked to."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=seconds, trust_env=False)


class Server:
    """A server in a process of its own on a free port of this machine, from `with` to its end."""

    def __init__(self, name: str, command: Sequence[str]):
        """command: what to run, to which `--host` and `--port` are added."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self.url = name, f"http://127.0.0.1:{self.port}"
        self.command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.command, stdout=self._log, stderr=self._log)
        with ExitStack() as undo:
            undo.callback(self.__exit__)
            self._wait()
            undo.pop_all()  # it runs: nothing to undo
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            if self.process.poll() is not None:
                raise InputError(f"{self.name}: ended with {self.process.returncode} at its start: {self.last_words()}")
            if time.monotonic() > deadline:
                raise InputError(f"{self.name}: does not answer {START_SECONDS} s after its start: {self.last_words()}")
            time.sleep(0.1)

    def last_words(self) -> str:
        """The last line of what it has written."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"

    def stop(self) -> tuple[int, float]:
        """Ask it to end and wait; its exit status and the seconds that it took."""
        began = time.monotonic()
        self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS), time.monotonic() - began
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(), time.monotonic() - began

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self._log.close()


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that this share of the values does not exceed: 0.5 of [1, 2, 3] is 2."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def table(names: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown, each column as wide as its widest cell."""
    widths = [max(len(line[i]) for line in (names, *body)) for i in range(len(names))]
    rows = [names, tuple("-" * width for width in widths), *body]
    return [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
