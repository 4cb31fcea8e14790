"""Where a checkpoint is, and a download from a hub that this test serves."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minivlm import hub
from minivlm.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer.model": b"pieces",
    "model-00001-of-00001.safetensors": b"weights" * 1000,
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same again",
    "onnx/config.json": b"{}",
    "README.md": b"text",
}
FETCHED = {
    "config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
}


class Hub(BaseHTTPRequestHandler):
    """One repository, org/model, with the branches main and other."""

    def do_GET(self) -> None:
        for branch in ("main", "other"):
            if self.path.startswith(f"/api/models/org/model/revision/{branch}"):
                siblings = [{"rfilename": name} for name in FILES]
                return self.answer(json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode())
        if self.path.startswith(f"/api/models/org/model/tree/{COMMIT}"):
            files = [{"type": "file", "path": n, "size": len(body), "oid": n} for n, body in FILES.items()]
            return self.answer(json.dumps(files).encode())
        name = self.path.split("?")[0].removeprefix(f"/org/model/resolve/{COMMIT}/")
        if name not in FILES:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return None
        return self.answer(FILES[name])

    do_HEAD = do_GET

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


PROGRAM = """
import sys
from minivlm import hub
from minivlm.errors import InputError
for model in sys.argv[1:]:
    try:
        print(hub.resolve(model))
    except InputError as error:
        print("InputError:", error)
"""


@pytest.fixture
def resolve_in_process(tmp_path):
    """resolve(variables, *models) in a new process: huggingface_hub reads its variables at import."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def resolve(variables: dict[str, str], *models: str) -> list[str]:
        here = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        root = {"PYTHONPATH": str(Path(hub.__file__).parents[1]), "no_proxy": "127.0.0.1"}
        command = [sys.executable, "-c", PROGRAM, *models]
        environment = {**os.environ, **here, **root, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    yield resolve
    server.shutdown()


def assert_refused(line: str, name: str, *parts: str) -> None:
    assert line.startswith(f"InputError: {name}: not fetched from the hub ("), line
    assert "give the path of a folder" in line
    for part in parts:
        assert part in line, line


def test_download_of_only_the_needed_files_then_offline(resolve_in_process):
    first, other, *errors = resolve_in_process({}, "org/model", "org/model@other", "org/absent", "org/model@absent")
    folder = Path(first)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FETCHED
    assert all((folder / name).read_bytes() == FILES[name] for name in FETCHED)
    assert folder.name == COMMIT and other == first
    assert len(errors) == 2
    assert_refused(errors[0], "org/absent", "RepositoryNotFoundError")
    assert_refused(errors[1], "org/model")

    again, error = resolve_in_process({"HF_HUB_OFFLINE": "1"}, "org/model", "org/absent")
    assert again == first
    assert_refused(error, "org/absent", "offline")


def test_without_a_network(resolve_in_process):
    (error,) = resolve_in_process({"HF_ENDPOINT": "http://127.0.0.1:9"}, "org/model")
    assert_refused(error, "org/model", "ConnectError")


def test_folder(tmp_path, monkeypatch):
    (tmp_path / "some" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in ("some/folder", "some/folder/", Path("some/folder"), str(tmp_path / "some" / "folder")):
        assert hub.resolve(model).resolve() == (tmp_path / "some" / "folder").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/some/folder") == tmp_path / "some" / "folder"


@pytest.mark.parametrize(
    "model",
    [
        "/no/where",
        "./no/where",
        "../where",
        "~/no/where",
        "no/such/folder",
        "nowhere",
        "",
        "a b/c",
        "here/absent",
        "org/",
        "C:\\models\\x",
        Path("org/model"),
    ],
)
def test_what_looks_like_a_path_is_never_fetched(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such folder, expected one or a hub id"):
        hub.resolve(model)


@pytest.mark.parametrize("model", [3, ["a"], b"weights"])
def test_what_names_no_model_is_refused(model):
    with pytest.raises(InputError, match="model: expected a folder or a hub id, found "):
        hub.resolve(model)


def test_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="a file, expected the folder"):
        hub.resolve(path)
