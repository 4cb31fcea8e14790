"""`minivlm serve` as a process: how it starts, what it logs, how it is stopped."""

import json
import signal
import threading
import time

import httpx
import pytest

from minivlm.cli import main

ENDLESS = {"temperature": 1e6, "seed": 2}  # draws a thousand ids behind "a" before it draws the end
KEY = {"Authorization": "Bearer secret-1"}


def test_sigterm_lets_answers_finish(start):
    server, events = start(), []
    assert server.metric("minivlm_pictures_encoded") == 1  # to be warm before anybody asks
    body = {"inputs": "a", "parameters": {"max_new_tokens": 400, **ENDLESS}}
    reader = threading.Thread(target=lambda: events.extend(server.events("/generate_stream", body)))
    reader.start()
    server.until(lambda: server.metric("tgi_batch_current_size") == 1)
    assert server.stop(signal.SIGTERM) == 0
    reader.join(10)
    assert len(events) == 400 and events[-1]["generated_text"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    assert server.lines[-1].endswith(" stopped")
    assert any("POST /generate_stream client=127.0.0.1 status=200" in line for line in server.lines)


def test_answers_that_take_too_long_are_ended(start):
    server = start("--shutdown-seconds", "0.5")
    body = {"inputs": "a", "parameters": {"max_new_tokens": 2000, **ENDLESS}}
    with server.client.stream("POST", "/generate_stream", json=body) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines)[5:])["index"] == 1
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        told = [line for line in lines if line]
    assert json.loads(told[-1][5:]) == {"error": "unhealthy", "error_type": "healthcheck"}
    assert server.stop(0) == 130
    assert time.monotonic() - began < 10
    assert not any("Traceback" in line for line in server.lines)


def test_json_logs(strict):
    strict.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}}, headers=KEY)
    strict.client.get("/nowhere")
    strict.until(lambda: any('"GET /nowhere"' in line for line in strict.lines))
    told = [json.loads(line) for line in strict.lines if line.startswith("{")]
    assert len(told) == len(strict.lines) - 1  # but for the line that says what was loaded
    (line,) = (one for one in told if one["message"] == "GET /nowhere")
    assert line["status"] == 404 and line["client"] == "127.0.0.1" and line["ms"] >= 0
    answered = [one for one in told if one["message"] == "POST /generate" and "generated_tokens" in one][-1]
    assert answered["prompt_tokens"] == 2 and {"validation_ms", "queue_ms", "inference_ms"} <= set(answered)


@pytest.mark.parametrize("options, told", [
    (["--max-images", "0"], "--max-images: found 0, expected more than 0"),
    (["--max-total-tokens", "99999"], "--max-total-tokens: found 99999, expected at most the model's context of 2048"),
    (["--max-input-tokens", "2048"], "--max-input-tokens: found 2048, expected less than"),
    (["--max-image-pixels", "999999999"], "--max-image-pixels: found 999999999, expected at most"),
    (["--cache-bytes", "10"], "cache_bytes: found 10, expected at least"),
    (["--api-key", "a b\n"], "--api-key: expected printable ASCII"),
    (["--port", "99999"], "--port: found 99999, expected 0 to 65535"),
    (["--host", "203.0.113.1"], "assign requested address"),
])  # fmt: skip
def test_bad_options(options, told, capsys):
    assert main(["serve", "--port", "0", *options]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken(server, capsys):
    assert main(["serve", "--port", str(server.port)]) == 2
    assert "ddress already in use" in capsys.readouterr().err


def test_it_listens_on_this_machine_alone(server):
    assert server.url.startswith("http://127.0.0.1:")


def test_it_is_warm_before_it_listens(start, server):
    """A picture, a grammar and the document are made at the start, when nobody waits; it is told if that fails."""
    assert not any("not warmed" in line for line in server.lines)
    limited = start("--max-input-tokens", "100")
    *before, last = limited.lines
    assert "listening on" in last and "not warmed: " in before[-1] and "less than 100 tokens" in before[-1]
    assert limited.stop() == 0


def test_small_answers_do_not_wait_for_the_network(server):
    """Headers and body are two writes: with Nagle's algorithm the second waits some 40 ms for the client's ACK."""
    taken = []
    for _ in range(15):
        began = time.monotonic()
        assert server.post("/tokenize", {"inputs": "a"}).is_success
        taken.append(time.monotonic() - began)
    assert sorted(taken)[len(taken) // 2] < 0.03
