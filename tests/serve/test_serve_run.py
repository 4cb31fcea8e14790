"""`minivlm serve` as a process: how it starts, what it logs, how it is stopped."""

import json
import os
import signal
import socket
import threading
import time

import httpx
import pytest

from minivlm.cli import main
from minivlm.serve.run import Serving

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
    assert json.loads(told[-1][5:]) == {"error": "the server is shutting down", "error_type": "shutdown"}
    assert server.stop(0) == 130
    assert time.monotonic() - began < 10
    assert not any("Traceback" in line for line in server.lines)
    assert "status=200" in server.lines[-2] and server.lines[-2].endswith(" ended=early error=shutdown")


def test_ctrl_c_again_ends_all_answers_at_once(start):
    """The model's thread is waited for: a process that ends while it is inside torch aborts."""
    server, told = start("--shutdown-seconds", "60"), []
    body = {"inputs": "a", "parameters": {"max_new_tokens": 2000, "temperature": 20.0}}

    def read() -> None:
        told.append(server.events("/generate_stream", body)[-1])

    readers = [threading.Thread(target=read) for _ in range(12)]
    for reader in readers:
        reader.start()
    server.until(lambda: server.metric("tgi_batch_current_size") >= 8)
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.25)
    assert server.stop(signal.SIGINT) == 130
    assert time.monotonic() - began < 10
    for reader in readers:
        reader.join(10)
    assert {"error": "the server is shutting down", "error_type": "shutdown"} in told
    assert server.lines[-1].endswith(" stopped")
    assert not any("Traceback" in line or "terminate" in line or "Error" in line for line in server.lines)


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
    (["--cache-bytes", "10"], "--cache-bytes: found 10, expected at least"),
    (["--max-batch", "0"], "--max-batch: found 0, expected at least 1"),
    (["--shutdown-seconds", "-1"], "--shutdown-seconds: found -1.0, expected at least 0"),
    (["--shutdown-seconds", "nan"], "--shutdown-seconds: found nan, expected at least 0"),
    (["--api-key", ""], "--api-key: expected printable ASCII characters, at least one"),
    (["--api-key-file", os.devnull], f"--api-key-file: {os.devnull}: expected printable ASCII characters, at least"),
    (["--api-key-file", "/nowhere"], "No such file"),
    (["--api-key", "a", "--api-key-file", "/nowhere"], "--api-key, --api-key-file: found both, expected one"),
    (["--api-key", "a b\n"], "--api-key: expected printable ASCII"),
    (["--port", "99999"], "--port: found 99999, expected 0 to 65535"),
    (["--host", "203.0.113.1"], "assign requested address"),
])  # fmt: skip
def test_bad_options(options, told, capsys):
    assert main(["serve", "--port", "0", *options]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.1", "a..b"])
def test_an_address_is_taken_before_the_model_is_loaded(server, host, capsys):
    """Whether it can be: there is no model, and the address is what is told."""
    assert main(["serve", "--host", host, "--port", str(server.port), "--model", "/nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"minivlm: --host {host} --port {server.port}: ")
    assert ("ddress already in use" in line) == (host == "127.0.0.1")


def test_nobody_connects_before_the_model_is_loaded():
    """A connection that waited there would look like a server that hangs."""
    serving = Serving("m", port=0)
    with serving.bind() as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname(), timeout=5)


def test_a_key_from_a_file(start, tmp_path):
    """Not on the command line, which other users of the machine see."""
    (tmp_path / "key").write_text("secret-1\n")
    server = start("--api-key-file", str(tmp_path / "key"))
    assert server.post("/tokenize", {"inputs": "a"}).status_code == 401
    assert server.post("/tokenize", {"inputs": "a"}, headers=KEY).is_success
    assert server.stop() == 0


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_load_balancers_ask_with_head(server, path):
    answer = server.client.head(path)
    assert answer.status_code == 200 and answer.content == b""
    assert server.client.head(path, headers={"Accept": "text/html"}).status_code == 200
    assert server.client.get(path).status_code == 200  # on the same connection


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
    assert min(taken[2:]) < 0.03, "that one at least did not wait; with the algorithm each does but the first"
