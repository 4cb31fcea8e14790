"""`minivlm serve`: a model, an engine and uvicorn put together, and how they are stopped."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from minivlm.errors import InputError
from minivlm.ops.cpu_threads import small
from minivlm.pipeline import Pipeline
from minivlm.serve.app import create_app
from minivlm.serve.engine import Engine
from minivlm.serve.limits import Limits
from minivlm.serve.log import Log, Relay
from minivlm.serve.metrics import Metrics
from minivlm.serve.remote import Fetcher
from minivlm.serve.service import Service

KEEP_ALIVE_SECONDS = 20  # that a connection may rest between two requests
LAST_WORDS_SECONDS = 2  # to tell clients that their answers were given up
MAX_HEADER_BYTES = 64 * 1024
PICTURE_BLOCK = 2**26  # bytes
DESCRIPTORS = 10_240  # to ask of the system, for connections; what macOS gives at most
BACKLOG = 2048  # connections that wait in the system
ACCEPTED = 16  # of them in one turn of the event loop; four turns pass until one more is counted and another closed
OTHER_DESCRIPTORS = 4 * ACCEPTED + 64  # that are no counted clients': also pictures on their way here, files, pipes


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    cache_bytes, picture_bytes: of the keys and values, and of encoded pictures that are kept. prefill_chunk: positions
    of a prompt that one step computes beside the running answers. shutdown_seconds: that answers get to finish.
    api_key_file: a file with the key alone, for a command line is seen by all who use the machine.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    api_key_file: str | None = None
    cors_allow_origin: Sequence[str] = ("*",)
    remote_images: bool = True
    allow_private_hosts: bool = False
    max_batch: int = 32
    cache_bytes: int = 2**30
    picture_bytes: int = 2**28
    prefill_chunk: int = 512
    shutdown_seconds: float = 30.0
    json_logs: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise InputError(f"--port: found {self.port}, expected 0 to 65535")
        if not self.shutdown_seconds >= 0:
            raise InputError(f"--shutdown-seconds: found {self.shutdown_seconds}, expected at least 0")
        if self.api_key is not None and self.api_key_file is not None:
            raise InputError("--api-key, --api-key-file: found both, expected one")

    def key(self) -> str | None:
        """What clients must send; never empty."""
        name, key = "--api-key", self.api_key
        if self.api_key_file is not None:
            name, key = f"--api-key-file: {self.api_key_file}", Path(self.api_key_file).read_text("latin-1").strip()
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise InputError(f"{name}: expected printable ASCII characters, at least one")
        return key

    def bind(self) -> socket.socket:
        """The socket to listen on. It refuses connections until uvicorn listens, once the model can answer."""
        bound = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        try:
            if os.name == "posix":  # a port just left may be taken again; elsewhere this would share one in use
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self.host, self.port))
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one
            bound.close()
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"--host {self.host} --port {self.port}: {reason}") from None
        return bound


def serve(pipeline: Pipeline, serving: Serving, limits: Limits, key: str | None, bound: socket.socket) -> int:
    """Serve until a signal comes; returns the exit status: 0 after SIGTERM, 130 after Ctrl-C."""
    apart = small(pipeline.model.language_model)
    if apart:  # a thread of its own encodes pictures, and each of the two has half of the cores but the event loop's
        torch.set_num_threads(max(1, (torch.get_num_threads() - 1) // 2))
    limits, log, metrics = limits.of_context(pipeline.context), Log(serving.json_logs), Metrics()
    engine = Engine(
        pipeline,
        max_batch=serving.max_batch,
        max_queue=limits.max_concurrent_requests,
        max_total_tokens=limits.max_total_tokens,
        cache_bytes=serving.cache_bytes,
        picture_bytes=serving.picture_bytes,
        prefill_chunk=serving.prefill_chunk,
        apart=apart,
        observe=metrics.step,
    )
    fetcher = None
    if serving.remote_images:
        fetcher = Fetcher(limits.max_image_bytes, limits.fetch_seconds, serving.allow_private_hosts)
    service = Service(serving.name, pipeline, engine, limits, fetcher, metrics)
    app = create_app(service, log, key, serving.cors_allow_origin, serving.shutdown_seconds)
    # Above what malloc keeps for itself: the memory of a large picture goes back to the system behind its request.
    Image.core.set_block_size(PICTURE_BLOCK)
    logging.captureWarnings(True)
    for name in ("uvicorn.error", "minivlm.serve", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Relay(log)], False
        logger.setLevel(logging.WARNING if name == "uvicorn.error" else logging.INFO)
    server = Server(
        uvicorn.Config(
            app,
            http=partial(Protocol, seconds=limits.body_seconds, most=_descriptors() - OTHER_DESCRIPTORS),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=serving.shutdown_seconds + LAST_WORDS_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            backlog=ACCEPTED,
        ),
        engine,
        serving.shutdown_seconds,
        log,
    )
    asyncio.run(server.serve([bound]))
    log.say("stopped")
    return 130 if server.stopped_by == signal.SIGINT else 0


def _descriptors() -> int:
    """How many connections and files may be open: many, if the system allows it."""
    if sys.platform == "win32":  # has no such limit, but asyncio's loop for servers has
        return 512
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(most, 2 * OTHER_DESCRIPTORS)


class Server(uvicorn.Server):
    """uvicorn's server, which tells where it listens and returns when a signal stopped it."""

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: float, log: Log):
        super().__init__(config)
        self.engine, self.seconds, self.log, self.stopped_by = engine, seconds, log, 0

    async def startup(self, sockets=None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        sockets[0].listen(BACKLOG)  # asyncio has one number for how many wait and how many are accepted at once
        host, port = sockets[0].getsockname()[:2]
        self.log.say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers that the engine gives up tell their clients so, before uvicorn ends what still runs."""
        closing = asyncio.create_task(self.engine.close(self.seconds))
        await super().shutdown(sockets)
        if self.force_exit:
            await self._hurry()
        await closing

    async def _hurry(self) -> None:
        """Ctrl-C again: all answers end at the next token. The process must not end while a thread is inside torch,
        nor the event loop while tasks run: the one aborts, the other writes a trace for each."""
        await self.engine.close(0)
        await self._tasks_end()
        for connection in list(self.server_state.connections):  # of clients that read nothing
            connection.transport.abort()
        await self._tasks_end()
        await self.lifespan.shutdown()

    async def _tasks_end(self) -> None:
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=LAST_WORDS_SECONDS)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again at the end; here a stop that was asked for is a success."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame) -> None:
        """The first signal lets answers finish, Ctrl-C again does not."""
        self.stopped_by = self.stopped_by or sig
        super().handle_exit(sig, frame)


class Protocol(H11Protocol):
    """uvicorn's HTTP, with a clock for requests that never become whole: slow headers, a body nobody waits for."""

    def __init__(self, *arguments: Any, seconds: float, most: int, **uvicorns: Any):
        """most: connections at once; for one more, one that waits for its client is given up."""
        super().__init__(*arguments, **uvicorns)
        self.seconds, self.most = seconds, most
        self._suspect: object = None  # the request before what was half sent when the clock last struck

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A connection: something has to be asked."""
        # asyncio does so only where it made the listening socket; else each small write waits for the client's ACK.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._clock = self.loop.call_later(self.seconds, self._check)
        if len(self.connections) > self.most:
            others = (one for one in self.connections if one is not self and one.dispensable)
            next(others, self).transport.abort()

    @property
    def working(self) -> bool:
        """Whether a request is on its way through the server."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def dispensable(self) -> bool:
        """Whether it is there and waits for its client."""
        return not self.working and not self.transport.is_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Its end: the clock stops too."""
        self._clock.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        """A connection is closed that neither works on a request nor rests between two, and did neither before."""
        half_sent = not self.working and self.timeout_keep_alive_task is None
        if half_sent and self._suspect is self.cycle and not self.transport.is_closing():
            self.transport.close()
        self._suspect = self.cycle if half_sent else self
        self._clock = self.loop.call_later(self.seconds, self._check)
