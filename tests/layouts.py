"""Tiny checkpoints rewritten: other layouts of tensor names, shards, spoiled files; and comparisons."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from minivlm import checkpoint
from minivlm.checkpoint import HEAD, CheckpointInfo
from minivlm.errors import InputError
from minivlm.ops.backend import REFERENCE
from minivlm.vlm import VLM

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# From the names in transformers 5's memory. A: the hub's. B: a fresh save of 5.6 and later. C: of 5.5.4.
# D: the memory itself, and before 5.6. E: the original LLaVA code.
LAYOUTS = {
    "A": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.": "",
    },
    "B": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.": "",
    },
    "C": {
        "model.language_model.": "model.language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "model.vision_tower.vision_model.",
    },
    "D": {},
    "D before 5.6": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "E": {
        "model.language_model.": "model.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    },
}


def renamed(name: str, layout: str) -> str:
    """A name of layout D in another layout."""
    for prefix, replacement in LAYOUTS[layout].items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Replace the folder's weights by these, in `shards` files with an index, or in one without."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    if shards == 1:
        return save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file_name in set(places.values()):
        shard = {name: tensor for name, tensor in tensors.items() if places[name] == file_name}
        save_file(shard, folder / file_name, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's weight files, copied out of them."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor.clone() for path in files for name, tensor in load_file(path).items()}


def copy_of(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint folder to be spoiled."""
    shutil.copytree(folder, to)
    return to


def edit_config(folder: Path, **changes) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def load(folder: Path, dtype: str | torch.dtype = "auto") -> tuple[VLM, CheckpointInfo]:
    """`checkpoint.load` on the CPU."""
    return checkpoint.load(folder, "cpu", dtype, REFERENCE, progress=False)


def state_of(made) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a `conftest.Tiny`, and its state in transformers' memory, which is layout D."""
    return made.folder, made.oracle.state_dict()


def refused(folder: Path, *parts: str, dtype: str = "auto") -> None:
    """Loading says each of the parts, all in one line."""
    with pytest.raises(InputError) as caught:
        load(folder, dtype)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def assert_equals(model: VLM, state: Mapping[str, torch.Tensor]) -> None:
    """Exactly transformers' parameters, under our names."""
    ours = {"lm_head.weight" if name == HEAD else f"model.{name}": p for name, p in model.named_parameters()}
    assert ours.keys() == state.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == state[name].dtype and torch.equal(parameter, state[name]), name


def assert_state(folder: Path, kind: str, state: Mapping[str, torch.Tensor]) -> None:
    """transformers reads exactly this state, and misses nothing."""
    model_class = tiny.MODELS[kind][0]
    model, report = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
