"""The safetensors files of a folder: which tensor lies where, reading one, writing all of them or none.

It knows nothing of models. Format: huggingface.co/docs/safetensors. A folder holds `model.safetensors`, or
several shards and `model.safetensors.index.json`, whose `weight_map` says which shard holds which tensor.
Pickle is never opened.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processor.tokens import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# Other ways to keep weights, by file ending.
FOREIGN = {
    ".bin": "a pickle, which is never opened",
    ".pth": "a pickle, which is never opened",
    ".pt": "a pickle, which is never opened",
    ".ckpt": "a pickle, which is never opened",
    ".gguf": "llama.cpp's format",
    ".h5": "TensorFlow's format",
    ".msgpack": "Flax's format",
    ".onnx": "an ONNX graph",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the header of its file describes it; dtype is safetensors' name, such as F16."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weight files by name, in the order of the files and of their bytes.

    Only headers are read. Raises InputError for files that are missing, damaged, or not what the index says.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise InputError(f"{folder}: holds both {SINGLE} and {INDEX}, expected one of them")
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise InputError(f"{folder}: found {_what_is_there(folder)}, expected {SINGLE} or {INDEX}")
    weight_map = _weight_map(index)
    stored: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        if not path.is_file():
            raise InputError(f"{index}: names {file_name}, which is not in the folder")
        held = read_header(path)
        for name in held:
            if name not in weight_map:
                raise InputError(f"{path}: holds {name}, which {INDEX} does not list")
            if weight_map[name] != file_name:
                raise InputError(f"{path}: holds {name}, which {INDEX} places in {weight_map[name]}")
        stored |= held
    if absent := [name for name in weight_map if name not in stored]:
        path = folder / weight_map[absent[0]]
        raise InputError(f"{path}: does not hold {absent[0]}{others(absent)}, which {INDEX} places there")
    return stored


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in the order of their bytes."""
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.offset_keys()}
        return {
            name: StoredTensor(name, path, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()
        }


def read_tensors(stored: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Each tensor with its values, which are pages of the mapped file until somebody copies or changes them.

    The mapping is private: writing into such a tensor, as training does, copies the page and leaves the file.
    """
    for path, tensors in groupby(stored, key=lambda tensor: tensor.file):
        with _opened(path) as file:
            for tensor in tensors:
                yield tensor, file.get_tensor(tensor.name)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write one file, or shards of at most `shard_bytes` with an index; a larger tensor has its own shard.

    tensors: (name, values), taken one at a time; no more than a shard of them is held.
    """
    shards: list[list[str]] = []  # names
    total = 0
    for shard in _shards(tensors, shard_bytes):
        _write(folder / f"{len(shards)}.part", shard)
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    for number, file_name in enumerate(names):
        (folder / f"{number}.part").rename(folder / file_name)
    if count > 1:
        places = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    room = shard_bytes
    for name, tensor in tensors:
        if shard and tensor.nbytes > room:
            yield shard
            shard, room = {}, shard_bytes
        shard[name] = tensor
        room -= tensor.nbytes
    yield shard


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode  # as the user's umask has it; safetensors would give it to the owner alone
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(mode)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder` to write into; its files move into place once all are on the disk.

    After any error `folder` holds what it held. New weights replace all old ones: no shard of an earlier save
    stays behind. Raises InputError where the disk is full, the folder read-only or its name taken by a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as hidden:
            yield Path(hidden)
            _move_into(folder, sorted(Path(hidden).iterdir()))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: cannot save there ({one_line(error)})") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON object as the hub writes it: two blanks of indentation, sorted keys."""
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def others(names: Sequence[Any]) -> str:
    """How many names follow the first: "" or " (and 3 others)"."""
    rest = len(names) - 1
    return "" if rest < 1 else f" (and {rest} other{'s' if rest > 1 else ''})"


def one_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A mapped file; InputError where it is not whole: cut short, header longer than the file or not JSON."""
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        reason = one_line(error).removeprefix("Error while deserializing header: ")
        if path.is_file() and _begins(path, b"version https://git-lfs"):
            reason = "a git-lfs pointer; `git lfs pull` fetches the file itself"
        raise InputError(f"{path}: not a whole safetensors file ({reason})") from None
    with file:
        yield file


def _begins(path: Path, prefix: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(prefix)) == prefix


def _move_into(folder: Path, written: Sequence[Path]) -> None:
    for path in written:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    new = {path.name for path in written}
    old = [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) and path.name not in new]
    for path in written:
        os.replace(path, folder / path.name)
    if any(WEIGHTS.fullmatch(name) for name in new):
        for path in old:
            path.unlink()


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is {weight_map!r:.60}, expected names of tensors with their files")
    for name, file_name in weight_map.items():
        # Only a plain name cannot climb out of the folder as "../other", "/etc/x" or "a\\b" do.
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file_name):
            raise InputError(f"{index}: places {name} in {file_name!r:.80}, expected a .safetensors file of the folder")
    return weight_map


def _what_is_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if found := [name for name in names if Path(name).suffix in FOREIGN]:
        kind = FOREIGN[Path(found[0]).suffix]
        remedy = "; transformers reads it, and its save_pretrained writes safetensors" if "pickle" in kind else ""
        return f"{found[0]}, {kind}{remedy}"
    found = [name for name in names if name.endswith(".safetensors")]
    return f"{found[0]}{others(found)}" if found else "no weights"
