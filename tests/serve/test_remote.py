"""Pictures from the network: only public addresses, pinned, redirects checked again, capped in time and size."""

import asyncio
import ipaddress
import json
import ssl
import time

import httpx
import pytest
from serving import SAMPLE

from minivlm.errors import InputError
from minivlm.serve import remote
from minivlm.serve.remote import Fetcher, is_public

KEY = {"Authorization": "Bearer secret-1"}


def ask(server, url):
    body = {"inputs": f"![]({url})What is written?", "parameters": {"max_new_tokens": 8}}
    return server.post("/generate", body, headers=KEY)


def fetch(url, **options):
    return asyncio.run(Fetcher(60_000, 2, **options).fetch(url))


def test_a_picture_from_the_network(strict, web, vlm):
    answer = ask(strict, f"{web.url}/sample.png")
    known = vlm.generate("<image>What is written?", [SAMPLE], raw=True, max_new_tokens=8)
    assert answer.json() == {"generated_text": known.text}
    path, headers = web.requests[-1]
    assert path == "/sample.png" and headers["Host"] == f"127.0.0.1:{web.port}" and headers["User-Agent"] == "minivlm"
    assert "Authorization" not in headers and "Cookie" not in headers
    assert ask(strict, f"{web.url}/to/sample.png".replace("/to/", "/to//")).json() == {"generated_text": known.text}


@pytest.mark.parametrize("path, told", [
    ("/endless", "larger than 60000 bytes"), ("/slow", "not received within 1 s"), ("/text", "not a picture"),
    ("/nothing", "answered 404"), ("/to//to//to//to//sample.png", "more than 3 redirects"),
    ("/to/file:///etc/passwd", "expected an http or https URL"), ("/to/http://[::1", "cannot be fetched"),
])  # fmt: skip
def test_what_is_no_picture(strict, web, path, told):
    began = time.monotonic()
    answer = ask(strict, web.url + path)
    assert answer.status_code == 422 and told in answer.json()["error"], answer.text
    assert time.monotonic() - began < 5


HOSTS = [
    "127.0.0.1", "localhost", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1",
    "[::1]", "[::]", "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]", "224.0.0.1", "255.255.255.255", "2130706433", "0x7f000001", "0177.0.0.1", "127.1",
    "localhost.", "LOCALHOST", "0", "[fe80::1%25eth0]", "[fe80::1%eth0]", "[::1%25lo]", "[::127.0.0.1]",
    "[64:ff9b:1::1]", "[2001:0:7f00:1::]", "127\u30020\u30020\u30021", "\u2460\u2461\u2466.0.0.1", "%31%32%37.0.0.1",
    "127.0.0.1%00.com",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_no_address_but_a_public_one(server, web, host):
    before = len(web.requests)
    answer = ask(server, f"http://{host}:{web.port}/sample.png")
    assert answer.status_code == 422
    assert any(
        told in answer.json()["error"] for told in ("not public", "not known", "Invalid IPv4 address", "Invalid IDNA")
    )
    assert len(web.requests) == before


@pytest.mark.parametrize("address, public", [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
    ("64:ff9b::a00:1", False), ("2002:a00:1::", False), ("::ffff:10.0.0.1", False), ("192.0.2.1", False),
    ("198.18.0.1", False), ("240.0.0.1", False), ("ff02::1", False), ("2001:db8::1", False), ("fec0::1", False),
    ("::127.0.0.1", False), ("::ffff:0:127.0.0.1", False), ("64:ff9b:1::7f00:1", False), ("5f00::1", False),
    ("3fff::1", False), ("192.88.99.1", False), ("100::1", False), ("2a00:1450:4001::200e", True), ("0.1.2.3", False),
])  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


def test_a_redirect_is_checked_like_the_first_address(web, monkeypatch):
    """From a public name to the local one, which alone is allowed to be reached here."""

    async def resolve(self, url):
        if url.host == "public.example":
            return ipaddress.ip_address("127.0.0.1")
        return await real(self, url)

    real = Fetcher._resolve
    monkeypatch.setattr(Fetcher, "_resolve", resolve)
    assert fetch(f"http://public.example:{web.port}/sample.png") == SAMPLE.read_bytes()
    with pytest.raises(InputError, match="not public"):
        fetch(f"http://public.example:{web.port}/to/{web.url}/sample.png")


def test_a_name_that_changes_its_address_is_asked_once(web, monkeypatch):
    """DNS rebinding: the name is public when it is checked, local when it is asked again."""
    answers = iter(["127.0.0.1", "10.0.0.1"])
    asked = []

    async def getaddrinfo(self, host, port, **_):
        asked.append(host)
        return [(0, 0, 0, "", (next(answers) if host == "name.example" else host, port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(remote, "is_public", lambda address: str(address) == "127.0.0.1")
    assert fetch(f"http://name.example:{web.port}/sample.png") == SAMPLE.read_bytes()
    assert asked.count("name.example") == 1
    assert web.requests[-1][1]["Host"] == f"name.example:{web.port}"


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    async def getaddrinfo(self, host, port, **_):
        return [(0, 0, 0, "", (address, port)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    with pytest.raises(InputError, match="not public"):
        fetch("http://two.example/a.png")


def test_a_certificate_is_checked_against_the_name_not_the_address(monkeypatch):
    seen = {}

    async def resolve(self, url):
        return ipaddress.ip_address("127.0.0.1")

    async def send(self, request, **_):
        seen.update(url=str(request.url), host=request.headers["Host"], name=request.extensions["sni_hostname"])
        return httpx.Response(200, stream=httpx.ByteStream(b"x"))

    monkeypatch.setattr(Fetcher, "_resolve", resolve)
    monkeypatch.setattr(httpx.AsyncClient, "send", send)
    assert fetch("https://name.example/a.png?b=c#d") == b"x"
    assert seen == {"url": "https://127.0.0.1/a.png?b=c", "host": "name.example", "name": "name.example"}
    assert ssl.create_default_context().check_hostname


@pytest.mark.parametrize("url", ["http://user:word@name.example/", "http://", "http://exa mple/", "http://a:99999/",
                                 "https://" + "a" * 300 + "/", "http://\u2603.\x00/", "http://a\r\nX: y/"])  # fmt: skip
def test_an_odd_url(server, url):
    answer = ask(server, json.loads(json.dumps(url)))
    assert answer.status_code == 422 and answer.json()["error_type"] == "validation"


def test_a_server_that_fetches_nothing(start, web):
    server = start("--no-remote-images")
    answer = ask(server, f"{web.url}/sample.png")
    assert answer.status_code == 422 and "--no-remote-images" in answer.json()["error"]
    assert server.stop() == 0
