"""A really running server: `minivlm serve` in a process of its own, on loopback, at a free port."""

import base64
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

import httpx
from commands import COMMAND, ENVIRONMENT, PATIENCE

from minivlm.hub import resolve

SAMPLE = resolve(None) / "sample.png"


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


DATA_URI = data_uri(SAMPLE.read_bytes())


class Server:
    """`minivlm serve` in a process of its own."""

    def __init__(self, *options: str, command: Sequence[str] = (*COMMAND, "serve")):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*command, "--port", "0", *options], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._listening.wait(PATIENCE), self.lines
        found = [re.search(r"listening on (http://[\d.]+:\d+)", line) for line in self.lines]
        urls = [match[1] for match in found if match]
        assert urls, self.lines
        self.url = urls[0]
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if "listening on" in line:
                self._listening.set()
        self._listening.set()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit status after a signal, and all of stderr in `lines`."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def post(self, path: str, body, **more) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def events(self, path: str, body) -> list:
        """The values of a stream's events, `[DONE]` as it is."""
        with self.client.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line[5:].strip() for line in response.iter_lines() if line.startswith("data:")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def metric(self, name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)[1])

    def until(self, condition, seconds: float = 10.0) -> None:
        """Waits until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.lines[-5:]}"
            time.sleep(0.02)

    def log_of(self, path: str, status: int, since: int) -> str:
        """The first line of the log about a path with a status, of those from number `since` on; it may come later."""

        def found() -> list[str]:
            return [line for line in self.lines[since:] if f"{path} " in line and f"status={status}" in line]

        self.until(found)
        return found()[0]
