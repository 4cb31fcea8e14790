"""The load command: times and tokens as they are, errors counted, both servers asked the same."""

import asyncio
import json
import sys
import time

import numpy as np
import pytest
from commands import process

import minivlm
from minivlm.cli import main
from minivlm.errors import InputError
from minivlm.serve import client, load
from minivlm.serve.client import Refused, Server, percentile

# A server that is none of ours: what it says depends on the question.
FAKE = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"][-1]["text"]
        if said.isdigit():
            self.send_response(int(said))
            self.send_header("Retry-After", "7")
            self.end_headers()
            return self.wfile.write(b"no")
        self.send_response(200)
        self.end_headers()
        send = lambda event: self.wfile.write(b"data: " + event.encode() + b"\\n\\n")
        choice = lambda text, reason: {"delta": {"content": text}, "finish_reason": reason}
        chunk = lambda text, reason=None: send(json.dumps({"choices": [choice(text, reason)]}))
        time.sleep(0.2)
        chunk("one")
        time.sleep(1.0 if said == "count" else 0.3)
        if said == "fail":
            return send('{"error": {"message": "out of order"}}')
        if said == "break off":
            return
        chunk(" two", "stop")
        send('{"choices": [], "usage": {"completion_tokens": 5}}')
        send("[DONE]")

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def fake():
    with Server("fake", [sys.executable, "-c", FAKE]) as server:
        yield server


def ask(server: Server, text: str) -> client.Answer:
    async def one() -> client.Answer:
        async with client.connect(server.url) as http:
            content = [{"type": "text", "text": text}]
            return await client.stream(http, client.request("m", [{"role": "user", "content": content}]))

    return asyncio.run(one())


def test_an_answer_with_its_times(fake):
    answer = ask(fake, "count")
    assert (answer.text, answer.tokens) == ("one two", 5)
    assert answer.first >= 0.2 and answer.seconds - answer.first > 0.5, "the first text came a second before the end"


@pytest.mark.parametrize(
    ("text", "status", "told"),
    [("429", 429, "no"), ("500", 500, "no"), ("fail", 0, "out of order"), ("break off", 0, "ended before")],
)
def test_what_is_no_answer_is_told(fake, text, status, told):
    with pytest.raises(Refused, match=told) as refused:
        ask(fake, text)
    assert refused.value.status == status
    assert refused.value.wait == (7 if status else 0)


def test_a_level_counts_what_was_not_answered(fake):
    asked = [client.Question(text, b"") for text in ("a", "503", "b", "fail", "c", "d")]
    began = time.perf_counter()
    level = asyncio.run(load._level(fake, "m", asked, 3))
    assert level.seconds <= time.perf_counter() - began
    assert (level.requests, level.errors, level.tokens) == (6, 2, 20)
    assert level.answers == ("one two", None, "one two", None, "one two", "one two")
    assert level.error.startswith("503 no")
    assert 1.0 <= level.seconds < 2.5, "three at a time: two rounds of half a second; one by one they take 2.5"
    report = load.Report({"chip": "x"}, (level,), "")
    assert not report.ok or level.server != load.OURS


def test_percentiles_are_values_that_were_measured():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 99, 100, 101):
        values = rng.random(size).tolist()
        for share in load.SHARES:
            assert percentile(values, share) == np.percentile(values, 100 * share, method="inverted_cdf")


def test_every_question_has_a_picture_of_its_own():
    asked = client.questions(24, 1)
    assert len({question.picture for question in asked}) == 24
    assert {question.picture for question in asked}.isdisjoint(q.picture for q in client.questions(24, 2))


def test_a_server_that_does_not_start_is_told_in_its_own_words():
    command = [sys.executable, "-c", "import sys; print('first'); sys.exit('no weights here')"]
    with pytest.raises(InputError, match="ended with 1 at its start: no weights here"):
        Server("it", command).__enter__()


def test_the_ratio_is_of_the_same_number_of_clients():
    def level(server: str, clients: int, tokens: int, answers: tuple) -> load.Level:
        return load.Level(server, clients, 2, tokens, 2.0, (0.1,) * 3, (0.2,) * 3, 0, "", answers)

    levels = (
        level(load.OURS, 1, 100, ("a", "b")),
        level(load.THEIRS, 1, 50, ("a", "c")),
        level(load.OURS, 8, 900, ("a", None)),
        level(load.THEIRS, 8, 60, ("a", "b")),
    )
    report = load.Report({"chip": "x"}, levels, "")
    values = report.to_json()["levels"]
    assert [row["ratio"] for row in values] == [2, None, 15, None]
    assert [(row.get("same"), row.get("both")) for row in values] == [(1, 2), (None, None), (1, 1), (None, None)]
    lines = "\n".join(report.lines())
    assert "| 8       | minivlm serve      | 2        | 450      | 15.00 |" in lines


def test_the_command():
    """Real servers: minivlm's answers, under load, are those that it gives alone."""
    done = process("bench", "serving", "--clients", 3, "--quick", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    ours = report["levels"][0]
    assert (ours["server"], ours["clients"], ours["errors"]) == ("minivlm serve", 3, 0)
    asked = client.questions(ours["requests"], 3)
    vlm = minivlm.load()
    alone = [vlm.generate(q.text, images=[q.picture], max_new_tokens=client.MAX_TOKENS) for q in asked]
    assert sum(a == b.text for a, b in zip(ours["answers"], alone, strict=True)) >= len(asked) - 1  # bfloat16 rounds
    assert len(report["levels"]) == 2 or "transformers[serving]" in report["note"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serving", "decode"], "expected alone"),
        (["serving", "--threads", "1"], "expected alone"),
        (["decode", "--clients", "2"], "--clients"),
        (["serving", "--clients", "0"], "expected at least 1"),
    ],
)
def test_bad_usage_is_told(arguments, told, capsys):
    assert main(["bench", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and told in shown.err
    assert len(shown.err.splitlines()) == 1
