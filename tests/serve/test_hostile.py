"""A table of hostile inputs: each gets a prompt 4xx that names what is wrong, and the server goes on unharmed."""

import io
import json
import re
import resource
import socket
import struct
import sys
import time
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serving import DATA_URI, Server, data_uri

from minivlm.serve.errors import Refused
from minivlm.serve.limits import MAX_DEPTH, MAX_VALUES, parse

JSON = {"Content-Type": "application/json"}
KEY = {"Authorization": "Bearer secret-1"}
PROMPT = 5.0  # seconds
ENDLESS = {"temperature": 1e6, "seed": 2}  # draws a thousand ids behind "a" before it draws the end


def bomb(width: int, height: int, words: bytes = b"") -> bytes:
    """A PNG of a few bytes that unpacks to width x height pixels of zeros, or to many megabytes of words."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if words:
        chunks.append((words, b"k\0\0" + zlib.compress(bytes(50_000_000), 9)))
    row = zlib.compressobj(9)
    chunks += [(b"IDAT", row.compress(bytes(100_000)) + row.flush()), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def frames() -> bytes:
    file = io.BytesIO()
    pages = [Image.new("L", (8, 8), shade) for shade in (0, 200)]
    pages[0].save(file, "GIF", save_all=True, append_images=pages[1:])
    return file.getvalue()


def picture(source: str) -> bytes:
    return json.dumps({"inputs": f"![]({source})What?"}).encode()


def chat(content) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


URL_PART = {"type": "image_url", "image_url": {"url": DATA_URI}}
# (name, path, body, status, what is told)
BODIES = [
    ("nothing", "/generate", b"", 400, "it is empty"),
    ("a broken body", "/generate", b'{"inputs": "a"', 400, "Failed to parse"),
    ("two values", "/generate", b"{} {}", 400, "Extra data"),
    ("NaN", "/generate", b'{"inputs":"a","parameters":{"temperature":NaN}}', 400, "NaN is not a JSON number"),
    ("Infinity", "/generate", b'{"inputs":"a","parameters":{"temperature":-Infinity}}', 400, "-Infinity is not a JSON"),
    ("1e999", "/generate", b'{"inputs":"a","parameters":{"temperature":1e999}}', 400, "out of range"),
    ("a long integer", "/generate", b'{"inputs":"a","parameters":{"seed":' + b"9" * 5000 + b"}}", 400, "digits"),
    ("2**70", "/generate", b'{"inputs":"a","parameters":{"seed":1180591620717411303424}}', 422, "`seed` must be"),
    ("deep", "/generate", b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "nested more than"),
    ("wide", "/generate", b'{"inputs":"a","x":[' + b"1," * 200_000 + b"1]}", 400, "more than"),
    ("invalid UTF-8", "/generate", b'{"inputs":"\xff\xfe"}', 400, "not UTF-8"),
    ("half a character", "/generate", b'{"inputs":"\\ud800"}', 400, "surrogate"),
    ("UTF-16", "/generate", '{"inputs":"a"}'.encode("utf-16"), 400, "not UTF-8"),
    ("a null byte", "/generate", b'{"inputs":"a\x00"}', 400, "control character"),
    ("a list", "/generate", b"[]", 422, "valid dictionary"),
    ("null", "/generate", b"null", 400, "it is empty or null"),
    ("tiny", "/generate", b'{"inputs":"a","parameters":{"temperature":1e-300}}', 422, "strictly positive"),
    ("huge", "/generate", b'{"inputs":"a","parameters":{"repetition_penalty":1e300}}', 422, "strictly positive"),
    ("a placeholder", "/generate", b'{"inputs":"<image>"}', 422, "1 <image> for 0 pictures"),
    ("a long prompt", "/generate", json.dumps({"inputs": "word " * 500_000}).encode(), 422, "characters"),
    ("a file", "/generate", picture("file:///etc/passwd"), 422, "invalid image content"),
    ("a path", "/generate", picture("/etc/passwd"), 422, "invalid image content"),
    ("ftp", "/generate", picture("ftp://example.com/a.png"), 422, "invalid image content"),
    ("no base64", "/generate", picture("data:image/png,abc"), 422, "expected data:MIME;base64"),
    ("bad base64", "/generate", picture("data:image/png;base64,@@@@"), 422, "not base64"),
    ("no picture", "/generate", picture(data_uri(b"hello")), 422, "not a picture"),
    ("half a picture", "/generate", picture(DATA_URI[: 22 + 4000]), 422, "truncated"),
    ("an empty picture", "/generate", picture("data:image/png;base64,"), 422, "is empty"),
    ("a bomb", "/generate", picture(data_uri(bomb(60_000, 60_000))), 422, "decompression bomb"),
    ("a large bomb", "/generate", picture(data_uri(bomb(100_000, 100_000))), 422, "decompression bomb"),
    ("the largest bomb", "/generate", picture(data_uri(bomb(2**31 - 1, 2**31 - 1))), 422, "decompression bomb"),
    ("no pixels", "/generate", picture(data_uri(bomb(0, 5))), 422, "not a picture"),
    ("a bomb of words", "/generate", picture(data_uri(bomb(8, 8, b"zTXt"))), 422, "MAX_TEXT_CHUNK"),
    ("a bomb of colours", "/generate", picture(data_uri(bomb(8, 8, b"iCCP"))), 422, "MAX_TEXT_CHUNK"),
    ("SVG", "/generate", picture(data_uri(b'<svg xmlns="http://www.w3.org/2000/svg"/>')), 422, "not a picture"),
    ("EPS", "/generate", picture(data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), 422, "not a picture"),
    ("PDF", "/generate", picture(data_uri(b"%PDF-1.4\n%%EOF")), 422, "not a picture"),
    ("deep JSON as a picture", "/generate", picture(data_uri(b"[" * 200_000)), 422, "not a picture"),
    ("deep JSON in a data URI", "/generate", picture("data:application/json," + "[" * 50_000), 422, "expected data:"),
    ("a blank in base64", "/generate", picture(DATA_URI[:99] + " " + DATA_URI[99:]), 422, "not base64"),
    ("a smaller bomb", "/generate", picture(data_uri(bomb(8_000, 8_000))), 422, "at most 50000000"),
    ("an animation", "/generate", picture(data_uri(frames())), 422, "2 frames"),
    ("many pictures", "/generate", json.dumps({"inputs": f"![]({DATA_URI})" * 9}).encode(), 422, "too many pictures"),
    ("no message", "/v1/chat/completions", b'{"messages":[]}', 422, "at least 1 item"),
    ("an odd role", "/v1/chat/completions", b'{"messages":[{"role":"x","content":"a"}]}', 422, "messages.0.role"),
    ("an odd part", "/v1/chat/completions", chat([{"type": "audio"}]), 422, "messages.0.content"),
    ("a bare URL", "/v1/chat/completions", chat([{"type": "image_url", "image_url": DATA_URI}]), 422, "image_url"),
    ("no parts", "/v1/chat/completions", json.dumps({"messages": [{"role": "assistant", "content": "x"},
     {"role": "assistant", "content": [URL_PART]}]}).encode(), 422, "picture in a message of the assistant"),
    ("a placeholder in chat", "/v1/chat/completions", chat("<image>"), 422, "1 <image> for 0 pictures"),
    ("no prompt", "/v1/completions", b'{"prompt":[]}', 422, "batch size"),
    ("many prompts", "/v1/completions", b'{"prompt":["a","a","a","a","a"]}', 422, "maximum allowed batch size of 4"),
    ("a suffix", "/v1/completions", b'{"prompt":"a","suffix":"b"}', 422, "uffix"),
]  # fmt: skip


@pytest.mark.parametrize("path, body, status, told", [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_a_hostile_body(server, path, body, status, told):
    began = time.monotonic()
    answer = server.client.post(path, content=body, headers=JSON)
    assert answer.status_code == status, answer.text[:300]
    assert told in answer.text
    assert len(answer.text) < 600  # what was sent is not sent back
    assert time.monotonic() - began < PROMPT


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "x", "image/png"])
def test_a_wrong_content_type(server, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = server.client.post("/generate", content=b'{"inputs":"a"}', headers=headers)
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.text


def test_json_with_a_suffix_or_charset_is_json(server):
    body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 1}})
    for content_type in ("application/json; charset=utf-8", "application/vnd.api+json"):
        assert server.client.post("/generate", content=body, headers={"Content-Type": content_type}).is_success


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/nowhere", 404), ("POST", "/nowhere", 404), ("GET", "/generate", 405), ("PUT", "/generate", 405),
    ("DELETE", "/", 405), ("POST", "/health", 405), ("POST", "/v1/responses", 404), ("GET", "/%ff%00", 404),
    ("GET", "/../../etc/passwd", 404), ("TRACE", "/", 405), ("GET", "/" + "a" * 50_000, 404),
    ("GET", "/docs/assets/..%2f..%2fcore.py", 404), ("GET", "/docs/assets/%00", 404), ("OPTIONS", "*", 404),
])  # fmt: skip
def test_an_unknown_route_or_method(server, method, path, status):
    answer = server.client.request(method, path)
    assert answer.status_code == status and answer.json()["error_type"] == "not_found"
    assert len(answer.text) < 200


def test_a_100_mb_data_uri_is_refused_before_it_is_read(server):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=PROMPT) as wire:
        wire.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 100000000\r\n\r\n" + b'{"inputs": "![](data:image/png;base64,')  # fmt: skip
        told = wire.recv(4096)
        while b"at most" not in told:
            told += wire.recv(4096)
    assert told.startswith(b"HTTP/1.1 413 ") and b"100000000 bytes, at most 20000000" in told
    assert time.monotonic() - began < PROMPT


def test_a_client_that_sends_all_100_mb_reads_the_413(server):
    answer = server.client.post("/generate", content=b'{"inputs":"' + b"x" * 100_000_000 + b'"}', headers=JSON)
    assert answer.status_code == 413


def test_a_body_without_a_length_is_counted_as_it_comes(strict):
    parts = (b"x" * 50_000 for _ in range(100))
    answer = strict.client.post("/generate", content=parts, headers=JSON | KEY)
    assert answer.status_code == 413 and "at most 300000" in answer.text


def test_a_slow_body(strict):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as wire:
        wire.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Authorization: Bearer secret-1\r\nContent-Length: 1000\r\n\r\n")  # fmt: skip
        wire.settimeout(0.2)
        told = b""
        while b"within" not in told:
            if not told:
                wire.sendall(b"x")
            try:
                told += wire.recv(4096)
            except TimeoutError:
                assert time.monotonic() - began < PROMPT
    assert told.startswith(b"HTTP/1.1 408 ") and b"not received within 1 s" in told


@pytest.mark.parametrize("head", [b"", b"POST /gener", b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_slow_headers(strict, head):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=PROMPT) as wire:
        wire.sendall(head)
        assert wire.recv(100) == b""


def test_a_connection_may_rest_between_requests(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=PROMPT) as wire:
        for seconds in (2.2, 0):  # longer than the time for headers, twice
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert wire.recv(1000).startswith(b"HTTP/1.1 200 ")
            time.sleep(seconds)


CHUNKED = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
TALK = [
    ("pipelined", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"GET /no HTTP/1.0\r\n\r\n", [200, 200, 200, 404]),
    ("HTTP/1.0", b"GET /health HTTP/1.0\r\n\r\n", [200]),
    ("both lengths", CHUNKED + b"Content-Length: 4\r\n\r\n2\r\n{}\r\n0\r\n\r\nGET /health HTTP/1.1\r\n\r\n", [400]),
    ("a chunk of no number", CHUNKED + b"\r\nzz\r\n{}\r\n0\r\n\r\n", [400]),
    ("a chunk below nothing", CHUNKED + b"\r\n-2\r\n{}\r\n0\r\n\r\n", [400]),
    ("a chunk that is longer", CHUNKED + b"\r\n1\r\n{}\r\n0\r\n\r\n", [400]),
    ("another coding", CHUNKED.replace(b"chunked", b"gzip, chunked") + b"\r\n0\r\n\r\n", [400]),
    ("two lengths", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", [400]),
    ("a length without end", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n{}", [400]),
    ("bytes in a path", b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    ("bytes in a header", b"GET /health HTTP/1.0\r\nAccept: \xff\xfe\r\nContent-Type: \xff\r\n\r\n", [200]),
    ("a web socket", b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n"
     b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", [200]),
    ("a tunnel", b"CONNECT a:443 HTTP/1.0\r\n\r\n", [404]),
    ("another host", b"GET http://a.example/health HTTP/1.0\r\n\r\n", [404]),
    ("zeros", bytes(1000), [400]),
]  # fmt: skip


@pytest.mark.parametrize("sent, statuses", [row[1:] for row in TALK], ids=[row[0] for row in TALK])
def test_odd_talk(server, sent, statuses):
    """Each request gets its answer, and what cannot be understood ends the connection."""
    told = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PROMPT) as wire:
        wire.sendall(sent)
        while part := wire.recv(2**16):
            told += part
    assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", told)] == statuses


def test_a_thousand_idle_connections(server):
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # of this process
    number = 1000 if most < 0 else min(1000, most - 200)
    wires = [socket.create_connection(("127.0.0.1", server.port), timeout=PROMPT) for _ in range(number)]
    began = time.monotonic()
    assert server.client.get("/health").is_success and time.monotonic() - began < PROMPT
    for wire in wires:
        wire.close()
    files = Path(f"/proc/{server.process.pid}/fd")
    if files.is_dir():
        server.until(lambda: len(list(files.iterdir())) < 100)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from minivlm.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_more_connections_than_the_system_allows():
    """The idle ones make room; accept() that fails would fill the log."""
    server = Server(command=[sys.executable, "-c", LIMITED])
    try:
        body = {"inputs": "a", "parameters": {"max_new_tokens": 1000, **ENDLESS}}
        with server.client.stream("POST", "/generate_stream", json=body) as response:
            events = response.iter_raw()
            assert next(events)
            wires = [socket.create_connection(("127.0.0.1", server.port), timeout=PROMPT) for _ in range(400)]
            with httpx.Client(base_url=server.url, timeout=PROMPT, trust_env=False) as other:
                assert other.get("/health").is_success
            assert next(events)  # who is answered is not given up
        for wire in wires:
            wire.close()
        assert len(server.lines) < 20
    finally:
        server.client.close()
        assert server.stop() == 0


def test_large_pictures_leave_no_memory_behind(server):
    """Each has some 200 MB once it is open."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.is_file():
        pytest.skip("reads /proc")

    def held(key: str) -> float:
        return int(re.search(rf"{key}:\s+(\d+) kB", status.read_text())[1]) / 1000

    file = io.BytesIO()
    Image.new("RGBA", (8000, 6000)).save(file, "PNG", compress_level=1)
    before = held("VmRSS")
    inputs = f"![]({data_uri(file.getvalue())})" * 3
    assert server.post("/generate", {"inputs": inputs, "parameters": {"max_new_tokens": 1}}).is_success
    assert held("VmRSS") - before < 150 and held("VmHWM") - before < 700


@pytest.mark.parametrize("request_", [b"\x16\x03\x01\x02\x00", b"GET /\r\n\r\n", b"A" * 200_000 + b"\r\n\r\n",
                                      b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n"])  # fmt: skip
def test_what_is_no_http(server, request_):
    with socket.create_connection(("127.0.0.1", server.port), timeout=PROMPT) as wire:
        wire.sendall(request_)
        assert wire.recv(100).startswith(b"HTTP/1.1 400 ")


def test_the_key(strict):
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    for headers in ({}, {"Authorization": "Bearer secret-2"}, {"Authorization": "secret-1"},
                    {"Authorization": b"Bearer \xff"}, {"Authorization": "Bearer SECRET-1"}):  # fmt: skip
        answer = strict.post("/generate", body, headers=headers)
        assert (answer.status_code, answer.content) == (401, b"")
    big = strict.client.post("/generate", content=b"x" * 400_000, headers=JSON)
    assert big.status_code == 401  # before the body is looked at
    assert strict.post("/generate", body, headers=KEY).is_success
    for path in ("/health", "/ping", "/", "/info", "/metrics", "/v1/models", "/docs"):
        assert strict.client.get(path).is_success
    for path in ("/chat_tokenize", "/tokenize", "/v1/chat/completions", "/v1/completions", "/", "/invocations"):
        assert strict.post(path, {}).status_code == 401
    schemes = strict.client.get("/api-doc/openapi.json").json()["components"]["securitySchemes"]
    assert schemes["HTTPBearer"]["scheme"] == "bearer"


def test_small_limits_each_tell_themselves(strict):
    def told(inputs, **parameters):
        return strict.post("/generate", {"inputs": inputs, "parameters": parameters}, headers=KEY).text

    wide = io.BytesIO()
    Image.new("L", (2000, 1000)).save(wide, "PNG")
    assert "2000x1000 pixels, expected at most 1000000" in told(f"![]({data_uri(wide.getvalue())})")
    assert "expected at most 60000" in told(f"![]({data_uri(bytes(70_000))})")
    assert "found 3, expected at most 2" in told(f"![]({DATA_URI})" * 3)
    assert "must have less than 900 tokens. Given: " in told("a b " * 600)
    assert "must be <= 1024. Given: 2 `inputs` tokens and 1023" in told("a", max_new_tokens=1023)


def test_more_requests_than_there_is_room_for(strict):
    """Two are answered at once; the third is sent away with a time to come back."""
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1000, **ENDLESS}}
    streams = [strict.client.stream("POST", "/generate_stream", json=body, headers=KEY) for _ in range(2)]
    events = [stream.__enter__().iter_raw() for stream in streams]
    assert all(map(next, events))
    refused = strict.post("/generate", body, headers=KEY)
    for stream in streams:
        stream.__exit__(None, None, None)
    assert refused.status_code == 429
    assert refused.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
    assert int(refused.headers["retry-after"]) >= 1
    strict.until(lambda: strict.post("/generate", body | {"parameters": {"max_new_tokens": 1}}, headers=KEY).is_success)


def test_browsers_are_told_who_may_ask(server, strict):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}  # fmt: skip
    assert server.client.options("/generate", headers=asked).headers["access-control-allow-origin"] == "*"
    allowed = strict.client.options("/generate", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    other = strict.client.options("/generate", headers=asked | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_client_that_leaves_frees_its_row(server):
    body, since = {"inputs": "a", "parameters": {"max_new_tokens": 1000, **ENDLESS}}, len(server.lines)
    with server.client.stream("POST", "/generate_stream", json=body) as response:
        next(response.iter_raw())
    server.until(lambda: server.metric("tgi_batch_current_size") == 0, seconds=3)
    line = server.log_of("/generate_stream", 200, since)
    assert "ended=early" in line
    text = json.dumps(body)
    with socket.create_connection(("127.0.0.1", server.port)) as wire:  # not a stream: nothing is ever written
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
        wire.sendall(f"{head}\r\n\r\n{text}".encode())
        server.until(lambda: server.metric("tgi_batch_current_size") == 1, seconds=3)
    server.until(lambda: server.metric("tgi_batch_current_size") == 0, seconds=3)
    assert server.log_of("/generate", 499, since)


def test_a_line_in_the_log_stays_a_line(server):
    server.client.get("/a%0Ab%1b[31m")
    server.until(lambda: any("31m" in line for line in server.lines))
    (line,) = (line for line in server.lines if "31m" in line)
    assert "/a\\nb\\x1b[31m" in line and "client=127.0.0.1" in line


def test_after_all_that_the_server_is_unharmed(server, vlm):
    """Runs last in this file: the right answer, nobody waiting, and no traceback in the log."""
    answer = server.post("/generate", {"inputs": "[INST] Is it red? [/INST]", "parameters": {}})
    assert answer.json()["generated_text"] == vlm.generate("[INST] Is it red? [/INST]", raw=True).text
    assert server.metric("tgi_queue_size") == server.metric("tgi_batch_current_size") == 0
    assert [line for line in server.lines if "Traceback" in line or "level=error" in line] == []


def test_json_is_parsed_strictly_and_in_linear_time():
    assert parse(b'{"a": [1, -2.5e3, "\\u00e9\\ud83d\\ude00", null, true]}') == {"a": [1, -2500.0, "é😀", None, True]}
    assert parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert len(parse(b"[" + b"1," * (MAX_VALUES - 10) + b"1]")) == MAX_VALUES - 9
    assert parse(json.dumps("[{" * 10**6 + '"\\').encode())  # brackets in a string are text
    for body in (b'"' + b'\\"' * 5_000_000, b'"\\', b"\\" * 10**6, b'"a" ' * 10**5, b"[" * (MAX_DEPTH + 1)):
        began = time.monotonic()
        with pytest.raises(Refused) as refused:
            parse(body)
        assert refused.value.status_code == 400 and time.monotonic() - began < 20
