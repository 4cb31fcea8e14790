"""Published checkpoints by name and shape: every tensor consumed, every parameter filled, the recipe found.

`published/*.json` hold each checkpoint's config.json and its tensors; `layers.0..31.` stands for 32 names.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from minivlm.checkpoint import account, published_name, rename
from minivlm.models import PUBLISHED, recipe_for
from minivlm.ops.backend import REFERENCE
from minivlm.processor.prompts import TEMPLATES
from minivlm.shards import StoredTensor
from minivlm.vlm import VLM, VLMConfig

FILES = sorted((Path(__file__).parent / "published").glob("*.json"))
PARAMETERS = {  # as Hugging Face counts them
    "llava-v1.6-mistral-7b-hf": 7_566_747_648,
    "llava-v1.6-vicuna-7b-hf": 7_063_431_168,
    "llava-v1.6-vicuna-13b-hf": 13_351_499_776,
    "llava-v1.6-34b-hf": 34_752_083_968,
    "llava-1.5-7b-hf": 7_063_427_072,
    "llava-1.5-13b-hf": 13_351_494_656,
    "bakLlava-v1-hf": 7_566_743_552,
}


def expand(condensed: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """{"layers.0..1.norm": [8]} -> {"layers.0.norm": (8,), "layers.1.norm": (8,)}."""
    tensors = {}
    for name, shape in condensed.items():
        span = re.search(r"\b0\.\.(\d+)\b", name)
        for i in range(int(span[1]) + 1 if span else 1):
            tensors[name.replace(span[0], str(i)) if span else name] = tuple(shape)
    return tensors


def read(path: Path) -> tuple[VLMConfig, dict[str, tuple[int, ...]]]:
    entry = json.loads(path.read_text())
    return VLMConfig.from_hf(entry["config"], path.name), expand(entry["tensors"])


def on_meta(config: VLMConfig) -> VLM:
    with torch.device("meta"):
        return VLM(config, REFERENCE)


def test_every_published_model_has_a_file_and_a_recipe():
    assert [path.stem for path in FILES] == sorted(PARAMETERS)
    assert {published.hub_id for published in PUBLISHED} == {f"llava-hf/{name}" for name in PARAMETERS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_tensor_fills_one_parameter(path):
    config, tensors = read(path)
    model = on_meta(config)
    stored = {name: StoredTensor(name, path, shape, "F16") for name, shape in tensors.items()}
    # Older uploads also hold this buffer.
    buffer = "vision_tower.vision_model.embeddings.position_ids"
    stored[buffer] = StoredTensor(buffer, path, (1, 577), "I64")
    sources, ignored = account(model, stored, path.parent)

    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in sources.items()} == parameters
    assert sorted(tensor.name for tensor in sources.values()) == sorted(tensors)
    assert list(ignored) == [buffer]
    assert sum(map(math.prod, tensors.values())) == PARAMETERS[path.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_saved_names_are_the_published_ones(path):
    config, tensors = read(path)
    assert {published_name(name) for name, _ in on_meta(config).named_parameters()} == set(tensors)
    assert all(published_name(rename(name)) == name for name in tensors)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_found_by_structure(path):
    config, _ = read(path)
    recipe = recipe_for(config)
    assert recipe.hub_id == f"llava-hf/{path.stem}"
    assert recipe.prompt_format in TEMPLATES
    assert recipe.context == config.text.max_position_embeddings
    assert config.depths == (23,)
    assert config.image_token_id == (64000 if "34b" in path.stem else 32000)
