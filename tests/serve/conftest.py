"""One running server of each kind a session, with the shipped checkpoint; and a web server with pictures."""

import contextlib
import http.server
import threading
import time
from types import SimpleNamespace

import pytest
from serving import SAMPLE, Server

import minivlm


@pytest.fixture(scope="session")
def start():
    """start(*options) is a running server; all are stopped at the end of the session."""
    running: list[Server] = []

    def make(*options: str) -> Server:
        running.append(Server(*options))
        return running[-1]

    yield make
    for server in running:
        server.client.close()
        server.stop()


@pytest.fixture(scope="session")
def server(start):
    """A server with every default."""
    return start()


@pytest.fixture(scope="session")
def strict(start):
    """A server with a key, small limits, and pictures from anywhere."""
    return start(
        "--api-key", "secret-1", "--allow-private-hosts", "--fetch-seconds", "1", "--body-seconds", "1",
        "--payload-limit", "300000", "--max-images", "2", "--max-image-bytes", "60000", "--max-image-pixels", "1000000",
        "--max-concurrent-requests", "2", "--max-total-tokens", "1024", "--max-input-tokens", "900", "--json-logs",
        "--cors-allow-origin", "https://page.example",
    )  # fmt: skip


@pytest.fixture(scope="session")
def vlm():
    """The same model in this process: what answers are compared with."""
    return minivlm.load()


@pytest.fixture(scope="session")
def web():
    """A web server on loopback with pictures and traps; `requests` has what it was asked."""
    picture = SAMPLE.read_bytes()
    asked: list[tuple[str, dict]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, dict(self.headers)))
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.end_headers()
            elif self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(50):
                    self.wfile.write(b"x")
                    time.sleep(0.2)
            elif self.path in ("/sample.png", "/endless", "/text"):
                body = {"/sample.png": picture, "/endless": b"x" * 10_000_000, "/text": b"hello"}[self.path]
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)
            else:
                self.send_error(404)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the one who asked has seen enough
                super().handle()

        def log_message(self, *_) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{listener.server_port}", port=listener.server_port, requests=asked)
    listener.shutdown()
