"""The soak: a good server passes, bad ones do not, and garbage is garbage."""

import asyncio
import json
import random
import sys
from dataclasses import replace

import pytest
from commands import process

from minivlm.cli import main
from minivlm.serve import client, soak
from minivlm.serve.client import Server
from minivlm.serve.garbage import GARBAGE
from minivlm.serve.soak import Case, Clients, Report, Sample, Tally

# Takes anything, and always gives the same answer.
CARELESS = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.answer(b"tgi_queue_size 2.0\\n" if self.path == "/metrics" else b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"message": {"content": "42"}, "delta": {"content": "42"}, "finish_reason": "stop"}
        event = json.dumps({"choices": [choice]}).encode()
        self.answer(b"data: " + event + b"\\n\\n" if b'"stream": true' in body or b'"stream":true' in body else event)

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
MESSAGES = ({"role": "user", "content": "How many?"},)


def test_a_careless_server_is_found_out(monkeypatch):
    monkeypatch.setattr(soak, "PATIENCE", 1)
    with Server("careless", [sys.executable, "-c", CARELESS]) as server:
        tally = Tally()
        asyncio.run(Clients(server, [Case(MESSAGES, "7")], tally, 0).run(2, 16))
        last = asyncio.run(soak.idle(server, 0))
    assert {"wrong", "invalid JSON", "garbage not refused"} <= set(tally.counts)
    assert "expected '7', found '42'" in tally.problems["wrong"]
    assert "right" not in tally.counts
    assert last.counts == {"tgi_queue_size": 2}


GOOD = Sample(0, 100_000_000, 10, 8, {name: 0.0 for name in soak.GAUGES})


def report(samples=(GOOD,) * 8, last=GOOD, ended=(0, 1.0), problems=None, **counts: int) -> Report:
    counts = {"right": 5, "valid JSON": 5} | counts
    return Report(60, 8, counts, tuple(samples), last, ended, problems or {})


def test_nothing_wrong_passes():
    assert report().ok
    assert "FAIL" not in "\n".join(report().lines())
    assert json.dumps(report().to_json())


@pytest.mark.parametrize(
    ("found", "check"),
    [
        (report(right=0), "every answer right"),
        (report(wrong=1, problems={"wrong": "x"}), "none wrong"),
        (report(samples=[replace(GOOD, memory=10**8 + n * 10**7) for n in range(40)]), "memory flat"),
        (report(last=replace(GOOD, threads=40)), "no thread left"),
        (report(last=replace(GOOD, files=40)), "no file left open"),
        (report(last=replace(GOOD, counts={})), "counts told"),
        (report(last=replace(GOOD, counts=GOOD.counts | {"tgi_batch_current_size": 1.0})), "nothing waits or runs"),
        (report(last=replace(GOOD, counts=GOOD.counts | {"minivlm_asyncio_tasks": 9.0})), "no task left"),
        (report(ended=(-9, 60.0)), "ended when asked"),
    ],
)
def test_whatever_is_wrong_fails(found, check):
    assert not found.ok
    assert [name for name, wrong in found.checks.items() if wrong] == [check]
    assert f"| {check} " in "\n".join(line for line in found.lines() if "FAIL" in line)


def test_memory_that_fills_caches_first_and_stays_is_flat():
    filling = [replace(GOOD, memory=10**8 + min(n, 10) * 10**8) for n in range(40)]
    assert report(samples=filling).ok


@pytest.mark.parametrize("one", GARBAGE, ids=lambda one: one.name)
def test_garbage_is_refused(server, one):
    async def send() -> int:
        async with client.connect(server.url, 30) as http:
            response = await http.request(one.method, one.path, headers=one.headers, content=one.body)
            assert response.text
            return response.status_code

    assert 400 <= asyncio.run(send()) < 500


def test_a_second_turn_has_a_known_answer(monkeypatch):
    import minivlm

    monkeypatch.setattr(soak, "QUESTIONS", 8)
    known = soak.cases(minivlm.load(), 0)
    assert {len(case.messages) for case in known} >= {1}
    for case in known:
        assert len(case.messages) % 2 == 1
        assert case.messages[-1]["role"] == "user"
    assert random.Random(0).choice(known)


def test_the_command():
    """Too short to judge memory; everything else has to be right."""
    done = process("soak", "--minutes", 0.1, "--clients", 8, "--json")
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert found["counts"]["right"] > 0
    assert found["problems"] == {}
    assert {name for name, wrong in found["checks"].items() if wrong} <= {"memory flat", "every schema kept"}


def test_bad_usage_is_told(capsys):
    assert main(["soak", "--clients", "2"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "at least 8" in shown.err
