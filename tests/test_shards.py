"""Weight files that are damaged, missing, elsewhere or not safetensors: each gets one line that names it."""

import json
import struct

import pytest
import torch
from layouts import write_weights
from safetensors.torch import save_file

from minivlm.errors import InputError
from minivlm.shards import INDEX, SINGLE, find_tensors, read_tensors, staged, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half(), "c": torch.zeros(2, 2).bfloat16()}
SECOND = "model-00002-of-00002.safetensors"


def refused(folder, *parts: str) -> None:
    """Reading says each of the parts in one line."""
    with pytest.raises(InputError) as caught:
        find_tensors(folder)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def edit_index(folder, change) -> None:
    """Apply `change` to the weight_map of a sharded folder."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def single(tmp_path):
    write_weights(tmp_path, TENSORS)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """a and c in the first shard, b in the second."""
    write_weights(tmp_path, TENSORS, 2)
    return tmp_path


@pytest.mark.parametrize("shards", (1, 2))
def test_reading(tmp_path, shards):
    write_weights(tmp_path, TENSORS, shards)
    stored = find_tensors(tmp_path)
    found = {tensor.name: values for tensor, values in read_tensors(stored.values())}
    assert found.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name], values)
        assert stored[name].shape == tuple(values.shape)
    assert [stored[name].dtype for name in "abc"] == ["F32", "F16", "BF16"]


def test_links_are_followed(tmp_path):
    """huggingface_hub's cache is a folder of links to files elsewhere, whose names are hashes."""
    (tmp_path / "blobs").mkdir()
    write_weights(tmp_path / "blobs", TENSORS, 2)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for i, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        blob = path.rename(path.with_name(f"0123abc{i}"))
        (snapshot / path.name).symlink_to(blob)
    assert find_tensors(snapshot).keys() == TENSORS.keys()


# Damaged files


def header_and_data(path):
    """The header's length, text and what follows it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return length, content[8 : 8 + length], content[8 + length :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda length, header, data: b"",
        lambda length, header, data: struct.pack("<Q", length)[:5],
        lambda length, header, data: struct.pack("<Q", length) + header + data[:-1],
        lambda length, header, data: struct.pack("<Q", length) + header,
        lambda length, header, data: struct.pack("<Q", 10**6) + header + data,
        lambda length, header, data: struct.pack("<Q", 2**63) + header + data,
        lambda length, header, data: struct.pack("<Q", length) + b"{" * length + data,
        lambda length, header, data: struct.pack("<Q", length) + b"\xff" * length + data,
        lambda length, header, data: struct.pack("<Q", length) + header.replace(b"[2,3]", b"[2,9]") + data,
        lambda length, header, data: struct.pack("<Q", length) + header.replace(b'"F32"', b'"F99"') + data,
    ],
    ids=[
        *("empty", "cut in the length", "cut short", "cut after the header", "header longer than the file"),
        *("header of 2^63 bytes", "header not JSON", "header not text", "shape beyond the data"),
        "unknown type",
    ],
)
def test_damaged_file(single, damage):
    path = single / SINGLE
    path.write_bytes(damage(*header_and_data(path)))
    refused(single, str(path), "not a whole safetensors file")


def test_git_lfs_pointer(single):
    """What a git clone leaves where git-lfs is not installed."""
    (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4000\n")
    refused(single, SINGLE, "not a whole safetensors file", "git lfs pull")


def test_damaged_shard(sharded):
    path = sharded / SECOND
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, str(path), "not a whole safetensors file")


def test_folder_with_a_files_name(sharded):
    (sharded / SECOND).unlink()
    (sharded / SECOND).mkdir()
    refused(sharded, INDEX, SECOND)


# The index


def test_missing_shard(sharded):
    (sharded / SECOND).unlink()
    refused(sharded, INDEX, f"names {SECOND}, which is not in the folder")


@pytest.mark.parametrize(
    "name",
    [
        *("../model.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/x.safetensors", "..", ""),
        *("a\\b.safetensors", "pytorch_model.bin", "x.safetensors\n", None, 3, ["x.safetensors"]),
    ],
)
def test_index_that_leaves_the_folder(tmp_path, name):
    """The file it points at is there, so only the name is at fault."""
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / SINGLE, folder / "sub" / "x.safetensors", folder / "a\\b.safetensors"):
        save_file({"b": TENSORS["b"]}, path)
    write_weights(folder, TENSORS, 2)
    edit_index(folder, lambda weight_map: weight_map.update(b=name))
    refused(folder, INDEX, "b", repr(name), "expected a .safetensors file of the folder")


def test_tensor_that_the_shard_lacks(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update(d=SECOND))
    refused(sharded, SECOND, "does not hold d", INDEX)


def test_tensor_that_the_index_lacks(sharded):
    edit_index(sharded, lambda weight_map: weight_map.pop("a"))
    refused(sharded, "model-00001-of-00002.safetensors", "holds a", "does not list")


def test_tensor_in_another_shard(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update(a=SECOND))
    refused(sharded, "holds a", f"places in {SECOND}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


def test_single_file_and_index(sharded):
    save_file(TENSORS, sharded / SINGLE)
    refused(sharded, str(sharded), SINGLE, INDEX, "expected one of them")


# Other formats


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["pytorch_model.bin"], ["pytorch_model.bin, a pickle, which is never opened", "save_pretrained"]),
        (["pytorch_model-00001-of-00002.bin"], ["a pickle"]),
        (["consolidated.00.pth"], ["consolidated.00.pth, a pickle"]),
        (["model-q4.gguf"], ["model-q4.gguf, llama.cpp's format"]),
        (["flax_model.msgpack"], ["Flax"]),
        (["consolidated.safetensors"], ["found consolidated.safetensors, expected model.safetensors"]),
        (["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"], ["(and 1 other)", INDEX]),
        (["config.json"], ["found no weights", SINGLE, INDEX]),
    ],
)
def test_folder_without_safetensors(tmp_path, names, parts):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, str(tmp_path), *parts)


# Writing


def test_shards_hold_at_most_their_size_and_whole_tensors(tmp_path):
    """a is 24 bytes, b and c are 8: of 16-byte shards a fills one alone, b and c share one."""
    write_tensors(tmp_path, TENSORS.items(), 16)
    index = json.loads((tmp_path / INDEX).read_text())
    first, second = "model-00001-of-00002.safetensors", SECOND
    assert index == {"metadata": {"total_size": 40}, "weight_map": {"a": first, "b": second, "c": second}}
    found = {tensor.name: values for tensor, values in read_tensors(find_tensors(tmp_path).values())}
    assert all(torch.equal(found[name], values) for name, values in TENSORS.items())


def test_staged_files_appear_only_when_all_are_written(tmp_path):
    with staged(tmp_path) as part:
        (part / "one").write_text("1")
        assert not (tmp_path / "one").exists()
    assert (tmp_path / "one").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), staged(tmp_path) as part:
        (part / "one").write_text("2")
        raise KeyboardInterrupt
    assert (tmp_path / "one").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_new_weights_replace_old_ones_and_nothing_else(sharded):
    (sharded / "other.safetensors").write_bytes(b"")
    with staged(sharded) as part:
        (part / "README.md").write_text("no weights")
    assert (sharded / INDEX).exists()
    with staged(sharded) as part:
        write_tensors(part, TENSORS.items(), 10**9)
    assert sorted(path.name for path in sharded.iterdir()) == ["README.md", SINGLE, "other.safetensors"]
