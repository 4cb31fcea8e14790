"""`minivlm soak`: minutes of clients good and bad against a really running server, and what is left behind them.

Some ask and read to the end, and every answer is compared with the right one; others hang up in the middle, send
garbage (garbage.py), or begin a body and stall. Memory, threads, open files and the server's counts are read all along.
"""

import asyncio
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import jsonschema

from minivlm import hub
from minivlm.errors import InputError
from minivlm.pipeline import Pipeline, load
from minivlm.serve import client
from minivlm.serve.client import MAX_TOKENS, Question, Refused, Server
from minivlm.serve.garbage import GARBAGE, Garbage

MARGIN = 0.5  # nats between the best two tokens: a question is asked whose answer no rounding decides
QUESTIONS = 64  # drawn; those within the margin are left out
GROWTH, ALLOWANCE = 0.05, 32 * 2**20  # of memory between the second quarter and the last
PATIENCE = 30  # seconds for garbage to be refused, and for a server without clients to become idle
GAUGES = ("tgi_queue_size", "tgi_batch_current_size", "minivlm_asyncio_tasks")
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    """A dialogue whose next answer is known. messages: as OpenAI's chat completions has them."""

    messages: tuple[dict[str, Any], ...]
    answer: str


@dataclass(frozen=True)
class Sample:
    """What the server's process held at a moment. counts: its own, by the names of GAUGES."""

    seconds: float
    memory: int
    threads: int
    files: int
    counts: dict[str, float]


@dataclass
class Tally:
    """What came of the clients. problems: the first of each kind, in words."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: dict[str, str] = field(default_factory=dict)

    def wrong(self, kind: str, what: str) -> None:
        """Something that must not be."""
        self.counts[kind] += 1
        self.problems.setdefault(kind, what)


def cases(pipeline: Pipeline, seed: int) -> list[Case]:
    """Questions and second turns that the pipeline answers alone with the margin, and what it answers."""
    found = []
    for question in client.questions(QUESTIONS, seed):
        messages = [{"role": "user", "content": question.content}]
        first = _answer(pipeline, messages, question)
        if first is None:
            continue
        found.append(Case(tuple(messages), first))
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Describe the picture."}]
        second = _answer(pipeline, messages, question)
        if second is not None:
            found.append(Case(tuple(messages), second))
    if not found:
        raise InputError(f"soak: of {QUESTIONS} questions this model answers none with a margin of {MARGIN} nats")
    return found


def _answer(pipeline: Pipeline, messages: Sequence[dict[str, Any]], question: Question) -> str | None:
    """The answer, or None if anywhere in it another token was nearly as likely."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    turns += [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages[1:]]
    reply = pipeline.generate(turns, [question.picture], max_new_tokens=MAX_TOKENS, top_logprobs=2)
    gaps = [token.alternatives[0].logprob - token.alternatives[1].logprob for token in reply.tokens]
    return reply.text if min(gaps) > MARGIN else None


class Clients:
    """What every kind of client does once; `run` lets each do it until the time is over."""

    def __init__(self, server: Server, known: Sequence[Case], tally: Tally, seed: int):
        self.server, self.known, self.tally = server, known, tally
        self.random = random.Random(seed)
        self.http = client.connect(server.url, 120)
        self.until = math.inf

    async def run(self, seconds: float, number: int) -> None:
        """Half of the clients ask; the others by turns hang up, send garbage, and stall."""
        bad = (self.leave_stream, self.leave_early, self.garbage, self.stall)
        kinds = [self.ask if n % 2 == 0 else bad[n // 2 % len(bad)] for n in range(number)]
        self.until = time.monotonic() + seconds
        async with self.http:
            await asyncio.gather(*(self._repeat(kind) for kind in kinds))

    async def _repeat(self, kind: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < self.until:
            try:
                await kind()
            except Refused as refused:
                if refused.status != 429:
                    self.tally.wrong("failed", f"{kind.__name__}: {refused}")
                    refused.wait = 1.0
                else:
                    self.tally.counts["told to wait (429)"] += 1
                await asyncio.sleep(min(refused.wait, 5.0))
            except httpx.HTTPError as error:
                self.tally.wrong("failed", f"{kind.__name__}: {type(error).__name__} {error}")
                await asyncio.sleep(1)

    def _case(self) -> Case:
        return self.random.choice(self.known)

    async def ask(self) -> None:
        """Streamed, whole, or guided by a schema; the answer is checked."""
        way = self.random.choice(("stream", "stream", "whole", "guided"))
        case = self._case()
        fields = {} if way != "guided" else {"response_format": {"type": "json_schema", "json_schema": {
            "name": "answer", "schema": SCHEMA}}}  # fmt: skip
        body = client.request("", case.messages, **fields)
        if way == "whole":
            response = await self.http.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                raise await client.refusal(response)
            text = response.json()["choices"][0]["message"]["content"]
        else:
            text = (await client.stream(self.http, body)).text
        if way == "guided":
            self._check_guided(text)
        elif text == case.answer:
            self.tally.counts["right"] += 1
        else:
            self.tally.wrong("wrong", f"{way}: expected {case.answer!r}, found {text!r}")

    def _check_guided(self, text: str) -> None:
        try:
            jsonschema.validate(json.loads(text), SCHEMA)
            self.tally.counts["valid JSON"] += 1
        except (ValueError, jsonschema.ValidationError):
            self.tally.wrong("invalid JSON", repr(text))

    async def leave_stream(self) -> None:
        """Hang up after a few tokens."""
        body = client.request("", self._case().messages) | {"stream": True}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise await client.refusal(response)
            left = self.random.randrange(6)
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    break
        self.tally.counts["hung up while tokens came"] += 1

    async def leave_early(self) -> None:
        """Hang up before anything came, at any moment from sending the body to the first tokens."""
        body = client.request("", self._case().messages)
        try:
            await asyncio.wait_for(self.http.post("/v1/chat/completions", json=body), self.random.random() ** 2 / 3)
        except TimeoutError:
            self.tally.counts["hung up before the answer"] += 1

    async def garbage(self) -> None:
        """What no server should take: each is refused with its 4xx, promptly."""
        one: Garbage = self.random.choice(GARBAGE)
        try:
            async with asyncio.timeout(PATIENCE):
                response = await self.http.request(one.method, one.path, headers=one.headers, content=one.body)
        except TimeoutError:
            return self.tally.wrong("garbage not refused", f"{one.name}: no answer in {PATIENCE} s")
        if 400 <= response.status_code < 500:
            self.tally.counts["garbage refused"] += 1
        else:
            self.tally.wrong("garbage not refused", f"{one.name}: {response.status_code} {response.text[:200]}")
        await asyncio.sleep(self.random.random() / 5)

    async def stall(self) -> None:
        """Promise a body, send a part of it, and wait; whoever loses patience first closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f'{head}Content-Length: 5000\r\n\r\n{{"messages": ['.encode())
        try:
            await writer.drain()
            patience = min(self.random.uniform(0.5, 20), self.until - time.monotonic())
            async with asyncio.timeout(patience):
                await reader.read()
            self.tally.counts["stalled, closed by the server"] += 1
        except TimeoutError:
            self.tally.counts["stalled, closed by the client"] += 1
        except ConnectionError:
            self.tally.counts["stalled, closed by the server"] += 1
        finally:
            writer.close()


async def sample(server: Server, began: float) -> Sample:
    """Read /proc and /metrics."""
    process = Path("/proc") / str(server.process.pid)
    status = (process / "status").read_text()
    anonymous, threads = (int(re.search(rf"^{key}:\s+(\d+)", status, re.M)[1]) for key in ("RssAnon", "Threads"))
    async with client.connect(server.url, PATIENCE) as http:
        text = (await http.get("/metrics")).text
    counts = {name: float(found[1]) for name in GAUGES if (found := re.search(rf"^{name} (\S+)", text, re.M))}
    files = len(list((process / "fd").iterdir()))
    return Sample(time.monotonic() - began, 1024 * anonymous, threads, files, counts)


async def idle(server: Server, began: float) -> Sample:
    """The sample once nothing waits and nothing runs, or after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while True:
        await asyncio.sleep(0.5)
        now = await sample(server, began)
        if not any(now.counts.get(name) for name in GAUGES[:2]) or time.monotonic() > deadline:
            return now


@dataclass(frozen=True)
class Report:
    """What came of the clients, what the server held, and the checks: name -> "" or what is wrong."""

    seconds: float
    clients: int
    counts: dict[str, int]
    samples: tuple[Sample, ...]
    last: Sample
    ended: tuple[int, float]
    problems: dict[str, str]

    @property
    def checks(self) -> dict[str, str]:
        """Each thing that is asked of the server, and what is wrong with it, if anything."""
        early, late = self._held(1, 2), self._held(3, 4)
        allowed = max(GROWTH * early.memory, ALLOWANCE)
        status, _ = self.ended
        missing = [name for name in GAUGES if name not in self.last.counts]
        left = {name: self.last.counts[name] for name in GAUGES[:2] if self.last.counts.get(name)}
        tasks = [one.counts.get(GAUGES[2], 0) for one in (self.samples[0], self.last)]
        return {
            "every answer right": "" if self.counts.get("right") else "none was right",
            "every schema kept": "" if self.counts.get("valid JSON") else "none was asked for",
            **{f"none {kind}": f"{self.counts[kind]}; {what}" for kind, what in self.problems.items()},
            "memory flat": ""
            if late.memory - early.memory <= allowed
            else f"grew by {_mega(late.memory - early.memory)}",
            "no thread left": _grown(early.threads, self.last.threads, 4),
            "no file left open": _grown(self.samples[0].files, self.last.files, 4),
            "counts told": f"/metrics lacks {', '.join(missing)}" if missing else "",
            "nothing waits or runs": str(left) if left else "",
            "no task left": _grown(tasks[0], tasks[1], 2),
            "ended when asked": "" if status == 0 else f"with status {status}",
        }

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.checks.values())

    def _held(self, first: int, last: int) -> Sample:
        """The medians of some quarters of the samples."""
        quarter = len(self.samples) / 4
        some = self.samples[int(first * quarter) : max(int(first * quarter) + 1, int(last * quarter))]
        values = (int(median(getattr(one, name) for one in some)) for name in ("memory", "threads", "files"))
        return Sample(some[0].seconds, *values, some[-1].counts)

    def to_json(self) -> dict[str, Any]:
        """One object."""
        return asdict(self) | {"checks": self.checks, "ok": self.ok}

    def lines(self) -> list[str]:
        """What was done, what was held when, and the checks."""
        counts = [(name, str(number)) for name, number in sorted(self.counts.items())]
        at = [self.samples[round(share * (len(self.samples) - 1) / 4)] for share in range(5)] + [self.last]
        held = [
            (f"{one.seconds:.0f} s", _mega(one.memory), str(one.threads), str(one.files))
            + tuple(f"{one.counts[name]:.0f}" if name in one.counts else "?" for name in GAUGES)
            for one in at
        ]
        checks = [(name, f"FAIL: {wrong}" if wrong else "pass") for name, wrong in self.checks.items()]
        status, seconds = self.ended
        return [
            *client.table((f"{self.clients} clients, {self.seconds:.0f} s", "times"), counts),
            "",
            *client.table(("at", "memory", "threads", "open files", "waiting", "running", "tasks"), held),
            "",
            *client.table(("check", "result"), checks),
            "",
            f"the last row is after the clients; asked to end, the server took {seconds:.1f} s, status {status}",
        ]


def _mega(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def _grown(before: float, after: float, allowed: float) -> str:
    return f"{before:.0f} at first, {after:.0f} at last" if after > before + allowed else ""


def run(
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    minutes: float = 10,
    clients: int = 24,
    seed: int = 0,
    told: Callable[[str], None] = lambda line: None,
) -> Report:
    """Find out the right answers, start a server, let the clients loose, and look at what is left.

    Raises InputError for a bad number, and where there is no /proc.
    """
    if not minutes > 0 or clients < 8:
        raise InputError(f"soak: found {minutes} minutes and {clients} clients, expected more than 0 and at least 8")
    if not Path("/proc/self/status").is_file():
        raise InputError("soak: reads /proc, which Linux has, and this system lacks")
    folder = str(hub.resolve(model))
    told("computes the right answers")
    known = cases(load(folder, device, dtype, backend), seed)
    told(f"{len(known)} answers known; starts the server")
    options = ("--model", folder, "--device", device, "--dtype", dtype, "--backend", backend)
    with Server("minivlm serve", [sys.executable, "-m", "minivlm", "serve", *options]) as server:
        tally = Tally()
        samples, last = asyncio.run(_soak(server, known, tally, 60 * minutes, clients, seed, told))
        ended = server.stop()
    return Report(60 * minutes, clients, dict(tally.counts), tuple(samples), last, ended, tally.problems)


async def _soak(
    server: Server,
    known: Sequence[Case],
    tally: Tally,
    seconds: float,
    clients: int,
    seed: int,
    told: Callable[[str], None],
) -> tuple[list[Sample], Sample]:
    began = time.monotonic()
    samples = [await sample(server, began)]
    work = asyncio.create_task(Clients(server, known, tally, seed).run(seconds, clients))
    while not work.done():
        await asyncio.wait([work], timeout=min(5, seconds / 40))
        if server.process.poll() is not None:
            work.cancel()
            raise InputError(f"soak: the server ended with {server.process.returncode}: {server.last_words()}")
        if not work.done():
            samples.append(await sample(server, began))
        if len(samples) % 10 == 0:
            told(f"{time.monotonic() - began:.0f} of {seconds:.0f} s, {dict(tally.counts)}")
    await work
    return samples, await idle(server, began)
