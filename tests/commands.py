"""Commands in processes of their own, plain or in a terminal that a test types into."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "minivlm"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parent.parent),
    "PYTHONIOENCODING": "utf-8",
    "PYTHONUNBUFFERED": "",  # as for a user, for whom a full disk is met when Python flushes
    "OMP_NUM_THREADS": "1",
}
PATIENCE = 120  # seconds for what takes three


def process(*arguments, stdin="") -> subprocess.CompletedProcess:
    """A command as its own process."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        timeout=PATIENCE,
    )


class Typist:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execve(COMMAND[0], [*COMMAND, *arguments], ENVIRONMENT)
        self.shown, self.at = "", 0  # all that was shown, and where the next `wait` looks

    def wait(self, wanted: str, insist: str = "") -> None:
        """Until the terminal shows a pattern, behind what earlier ones matched; `insist` is typed every 5 s."""
        deadline = time.monotonic() + PATIENCE
        self.type(insist)
        while (found := re.compile(wanted).search(self.shown, self.at)) is None:
            if not self._ready(5):
                self.type(insist)
            elif not self._read():
                break
            assert time.monotonic() < deadline, f"{wanted} not in {self.shown[-500:]!r}"
        assert found, f"{wanted} not in {self.shown[-500:]!r}"
        self.at = found.end()

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def end(self) -> int:
        """The exit status, once everything was shown."""
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _ready(self, seconds: float) -> bool:
        return bool(select.select([self.terminal], [], [], seconds)[0])

    def _read(self) -> bool:
        """Read what comes within PATIENCE; False at the end."""
        data = b""
        with contextlib.suppress(OSError):  # how Linux tells that the other end is closed
            if self._ready(PATIENCE):
                data = os.read(self.terminal, 2**16)
        self.shown += data.decode(errors="replace")
        return bool(data)
