"""`minivlm serve`: a model, an engine and uvicorn put together, and how they are stopped."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from minivlm.errors import InputError
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


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    cache_bytes, picture_bytes: of the keys and values, and of encoded pictures that are kept. prefill_chunk: positions
    of a prompt that one step computes beside the running answers. shutdown_seconds: that answers get to finish.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    cors_allow_origin: Sequence[str] = ("*",)
    remote_images: bool = True
    allow_private_hosts: bool = False
    max_batch: int = 32
    cache_bytes: int = 2**30
    picture_bytes: int = 2**28
    prefill_chunk: int = 512
    shutdown_seconds: float = 30.0
    json_logs: bool = False


def serve(pipeline: Pipeline, serving: Serving, limits: Limits) -> int:
    """Serve until a signal comes; returns the exit status: 0 after SIGTERM, 130 after Ctrl-C."""
    if limits.max_image_pixels > Image.MAX_IMAGE_PIXELS:
        raise InputError(
            f"--max-image-pixels: found {limits.max_image_pixels}, expected at most {Image.MAX_IMAGE_PIXELS}"
        )
    if serving.api_key is not None and not (serving.api_key.isascii() and serving.api_key.isprintable()):
        raise InputError("--api-key: expected printable ASCII characters")
    if not 0 <= serving.port < 2**16:
        raise InputError(f"--port: found {serving.port}, expected 0 to 65535")
    family = socket.AF_INET6 if ":" in serving.host else socket.AF_INET
    listener = socket.create_server((serving.host, serving.port), family=family, backlog=2048)
    limits, log, metrics = limits.of_context(pipeline.context), Log(serving.json_logs), Metrics()
    engine = Engine(
        pipeline,
        max_batch=serving.max_batch,
        max_queue=limits.max_concurrent_requests,
        max_total_tokens=limits.max_total_tokens,
        cache_bytes=serving.cache_bytes,
        picture_bytes=serving.picture_bytes,
        prefill_chunk=serving.prefill_chunk,
        observe=metrics.step,
    )
    fetcher = None
    if serving.remote_images:
        fetcher = Fetcher(limits.max_image_bytes, limits.fetch_seconds, serving.allow_private_hosts)
    service = Service(serving.name, pipeline, engine, limits, fetcher, metrics)
    app = create_app(service, log, serving.api_key, serving.cors_allow_origin, serving.shutdown_seconds)
    logging.captureWarnings(True)
    for name in ("uvicorn.error", "minivlm.serve", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Relay(log)], False
        logger.setLevel(logging.WARNING if name == "uvicorn.error" else logging.INFO)
    server = Server(
        uvicorn.Config(
            app,
            http=partial(Protocol, seconds=limits.body_seconds),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=serving.shutdown_seconds + LAST_WORDS_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ),
        engine,
        serving.shutdown_seconds,
        log,
    )
    asyncio.run(server.serve([listener]))
    log.say("stopped")
    return 130 if server.stopped_by == signal.SIGINT else 0


class Server(uvicorn.Server):
    """uvicorn's server, which tells where it listens and returns when a signal stopped it."""

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: float, log: Log):
        super().__init__(config)
        self.engine, self.seconds, self.log, self.stopped_by = engine, seconds, log, 0

    async def startup(self, sockets=None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        self.log.say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers that the engine gives up tell their clients so, before uvicorn ends what still runs."""
        closing = asyncio.create_task(self.engine.close(self.seconds))
        await super().shutdown(sockets)
        if not self.force_exit:
            await closing

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

    def __init__(self, *arguments: Any, seconds: float, **uvicorns: Any):
        super().__init__(*arguments, **uvicorns)
        self.seconds = seconds
        self._suspect: object = None  # the request before what was half sent when the clock last struck

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A connection: something has to be asked."""
        # asyncio does so only where it made the listening socket; else each small write waits for the client's ACK.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._clock = self.loop.call_later(self.seconds, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Its end: the clock stops too."""
        self._clock.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        """A connection is closed that neither works on a request nor rests between two, and did neither before."""
        working = self.cycle is not None and not self.cycle.response_complete
        half_sent = not working and self.timeout_keep_alive_task is None
        if half_sent and self._suspect is self.cycle and not self.transport.is_closing():
            self.transport.close()
        self._suspect = self.cycle if half_sent else self
        self._clock = self.loop.call_later(self.seconds, self._check)
