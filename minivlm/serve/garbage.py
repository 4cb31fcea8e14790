"""What hostile or broken clients send: each is to be refused with a 4xx status, and the server to go on."""

import base64
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHAT, GENERATE = "/v1/chat/completions", "/generate"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Garbage:
    """One bad request."""

    name: str
    path: str
    body: bytes = b""
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)


def _chat(text: str = "What?", picture: str = "", **fields: object) -> bytes:
    """A chat completion with something wrong in it."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    return json.dumps(
        {"model": "", "max_tokens": 8, "messages": [{"role": "user", "content": content}], **fields}
    ).encode()


def _schema(schema: object) -> bytes:
    return _chat(response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}})


def _bomb(side: int = 60_000) -> str:
    """A small PNG file that promises 3.6 billion pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    parts = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
             for name, data in chunks)  # fmt: skip
    return f"data:image/png;base64,{base64.b64encode(b''.join([bytes.fromhex('89504e470d0a1a0a'), *parts])).decode()}"


GARBAGE = (
    Garbage("no JSON", CHAT, b"{'model': "),
    Garbage("an empty body", CHAT),
    Garbage("a number instead of an object", GENERATE, b"7"),
    Garbage("no messages", CHAT, b'{"model": "", "max_tokens": 8}'),
    Garbage("messages that are none", CHAT, b'{"messages": {"role": "user"}}'),
    Garbage("max_tokens in words", CHAT, _chat(max_tokens="many")),
    Garbage("a negative max_tokens", CHAT, _chat(max_tokens=-1)),
    Garbage("NaN", CHAT, b'{"messages": [{"role": "user", "content": "What?"}], "temperature": NaN}'),
    Garbage("deep nesting", CHAT, b"[" * 100_000),
    Garbage("bytes that are no UTF-8", CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
    Garbage("another content type", CHAT, _chat(), headers={"Content-Type": "text/plain"}),
    Garbage("an unknown route", "/v2/generate", b"{}"),
    Garbage("a method that is not offered", GENERATE, method="GET", headers={}),
    Garbage("a picture that is none", CHAT, _chat(picture="data:image/png;base64,AAAA")),
    Garbage("a picture that is no base64", CHAT, _chat(picture="data:image/png;base64,@@@")),
    Garbage("a picture far too large", CHAT, _chat(picture=_bomb())),
    Garbage("a local file", CHAT, _chat(picture="file:///etc/passwd")),
    Garbage("a picture from this machine", CHAT, _chat(picture="http://127.0.0.1:1/cat.png")),
    Garbage("a picture from the link-local network", CHAT, _chat(picture="http://169.254.169.254/latest/")),
    Garbage("a picture in the prompt that is none", GENERATE, b'{"inputs": "![](data:image/png;base64,AAAA)What?"}'),
    Garbage("a prompt that is too long", CHAT, _chat(text="what " * 50_000)),
    Garbage("a schema that is none", CHAT, _schema({"type": "nonsense"})),
    Garbage("a schema that is a list", CHAT, _schema([1, 2])),
    Garbage("a grammar that is no regular expression", GENERATE,
            b'{"inputs": "What?", "parameters": {"grammar": {"type": "regex", "value": "(["}}}'),
)  # fmt: skip
