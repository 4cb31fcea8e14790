"""`minivlm bench serving`: many clients at once against `minivlm serve`, and against `transformers serve`.

Both servers run the same checkpoint in the same run and are asked the same questions, each about its own picture.
They take turns: while one is asked the other is idle.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import httpx

from minivlm import hub
from minivlm.bench.measure import machine
from minivlm.errors import InputError
from minivlm.pipeline import choose_device
from minivlm.serve import client
from minivlm.serve.client import Answer, Question, Refused, Server, percentile

CLIENTS = (1, 8, 32, 128)
QUICK_CLIENTS = (1, 8)
WARM = 8  # questions before the first that count
SHARES = (0.5, 0.95, 0.99)
NEEDED = ("transformers", "accelerate", "fastapi", "openai", "pydantic", "typer", "uvicorn")  # transformers[serving]
OURS, THEIRS = "minivlm serve", "transformers serve"


@dataclass(frozen=True)
class Level:
    """So many clients at once against one server, each asking one question after the other.

    tokens     of all answers, seconds from the first request to the last answer
    first      seconds to the first text, the SHARES of them; whole: to the end of the answer
    errors     requests without an answer, and what the first of them was
    """

    server: str
    clients: int
    requests: int
    tokens: int
    seconds: float
    first: tuple[float, ...]
    whole: tuple[float, ...]
    errors: int
    error: str
    answers: tuple[str | None, ...]

    @property
    def speed(self) -> float:
        """Tokens a second of all clients together."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Report:
    """The levels of one run, minivlm's and, where it could be measured, the other server's."""

    machine: dict[str, str]
    levels: tuple[Level, ...]
    note: str

    @property
    def ok(self) -> bool:
        """Whether minivlm's server answered every request."""
        return not any(level.errors for level in self.levels if level.server == OURS)

    def peer(self, level: Level) -> Level | None:
        """The other server under as many clients."""
        found = [one for one in self.levels if (one.server, one.clients) == (THEIRS, level.clients)]
        return found[0] if found and level.server == OURS else None

    def to_json(self) -> dict[str, Any]:
        """One object, ratios included."""
        rows = []
        for level in self.levels:
            peer = self.peer(level)
            ratio = level.speed / peer.speed if peer else None
            derived = {"tokens_per_second": level.speed, "ratio": ratio, **same(level, peer)}
            rows.append(asdict(level) | derived)
        return {"machine": self.machine, "percentiles": SHARES, "levels": rows, "note": self.note, "ok": self.ok}

    def lines(self) -> list[str]:
        """The table in Markdown."""
        shares = " / ".join(f"{100 * share:.0f}" for share in SHARES)
        names = ("clients", "server", "requests", "tokens/s", "ratio", f"first token, ms, p{shares}",
                 f"whole answer, ms, p{shares}", "errors", "same answers")  # fmt: skip
        body, problems = [], []
        for level in self.levels:
            peer = self.peer(level)
            times = [" / ".join(f"{1000 * value:.0f}" for value in values) for values in (level.first, level.whole)]
            ratio = f"{level.speed / peer.speed:.2f}" if peer else ""
            agreed = "{same} of {both}".format(**same(level, peer)) if peer else ""
            body.append((str(level.clients), level.server, str(level.requests), f"{level.speed:.0f}", ratio, *times,
                         str(level.errors), agreed))  # fmt: skip
            problems += [f"{level.server}, {level.clients} clients: {level.error}"] if level.errors else []
        head = [f"{name:14}{value}" for name, value in self.machine.items()]
        tokens = sum(level.tokens for level in self.levels) / max(1, sum(level.requests for level in self.levels))
        note = f"{tokens:.1f} tokens an answer; every question is about a picture of its own"
        return [*head, "", *client.table(names, body), "", note, *filter(None, [self.note]), *problems]


def same(level: Level, peer: Level | None) -> dict[str, int]:
    """How many questions both answered, and how many of them alike; rounding differs between the two."""
    if peer is None:
        return {}
    both = [(a, b) for a, b in zip(level.answers, peer.answers, strict=True) if a is not None and b is not None]
    return {"both": len(both), "same": sum(a == b for a, b in both)}


def run(
    model: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    clients: Sequence[int] = (),
    quick: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> Report:
    """Start the servers, ask, and report. told: is given a line about each step.

    Raises InputError where a server does not start.
    """
    if wrong := [number for number in clients if number < 1]:
        raise InputError(f"--clients: found {wrong[0]}, expected at least 1")
    folder, place = str(hub.resolve(model)), str(choose_device(device))
    missing = [name for name in NEEDED if find_spec(name) is None]
    note = (
        f"{THEIRS}: not measured, {missing[0]} is not installed: pip install 'transformers[serving]'" if missing else ""
    )
    python = sys.executable
    ours = [python, "-m", "minivlm", "serve", "--model", folder, "--device", place, "--backend", backend]
    commands = {OURS: ours}
    if not missing:
        commands[THEIRS] = [python, "-m", "transformers.cli.transformers", "serve", folder, "--device", place]
    levels: list[Level] = []
    with ExitStack() as running:
        servers = []
        for name, command in commands.items():
            told(f"{name}: starts")
            servers.append(running.enter_context(Server(name, command)))
        for server in servers:
            asyncio.run(_level(server, folder, client.questions(WARM, 0), 2))
        for number in clients or (QUICK_CLIENTS if quick else CLIENTS):
            asked = client.questions(_requests(number, quick), number)
            for server in servers:
                told(f"{server.name}: {number} clients, {len(asked)} questions")
                levels.append(asyncio.run(_level(server, folder, asked, number)))
    return Report(machine(choose_device(device), backend), tuple(levels), note)


def _requests(clients: int, quick: bool) -> int:
    """Enough that one slow answer does not decide: 24 at least, 3 a client; of the quick form half."""
    return max(12, 2 * clients) if quick else max(24, 3 * clients)


async def _level(server: Server, model: str, asked: Sequence[Question], clients: int) -> Level:
    """The clients take the next question from a common list until it is used up."""
    answers: list[Answer | Refused | None] = [None] * len(asked)
    waiting: Iterator[tuple[int, Question]] = iter(enumerate(asked))

    async def one(http: httpx.AsyncClient) -> None:
        for index, question in waiting:
            body = client.request(model, [{"role": "user", "content": question.content}])
            try:
                answers[index] = await client.stream(http, body)
            except Refused as refused:
                answers[index] = refused
            except httpx.HTTPError as error:
                answers[index] = Refused(0, f"{type(error).__name__} {error}")

    async with client.connect(server.url) as http:
        began = time.perf_counter()
        await asyncio.gather(*(one(http) for _ in range(clients)))
        seconds = time.perf_counter() - began
    given = [answer for answer in answers if isinstance(answer, Answer)]
    refused = [str(answer) for answer in answers if isinstance(answer, Refused)]
    return Level(
        server.name,
        clients,
        len(asked),
        sum(answer.tokens for answer in given),
        seconds,
        tuple(percentile([answer.first for answer in given], share) for share in SHARES) if given else (),
        tuple(percentile([answer.seconds for answer in given], share) for share in SHARES) if given else (),
        len(refused),
        refused[0] if refused else "",
        tuple(answer.text if isinstance(answer, Answer) else None for answer in answers),
    )
