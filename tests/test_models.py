"""Recipes are found by structure alone, and models are named in one file."""

from dataclasses import replace
from pathlib import Path

import pytest

import minivlm
from minivlm import checkpoint
from minivlm.models import PUBLISHED, SHIPPED, Structure, recipe_for


def test_no_two_published_models_share_a_structure():
    assert len({published.structure for published in PUBLISHED}) == len(PUBLISHED)


@pytest.mark.parametrize("kind", ("next-mistral", "next-llama", "llava"))
def test_another_structure_has_no_recipe(tiny_of, kind):
    assert recipe_for(checkpoint.read_config(tiny_of(kind).folder)) is None


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.hub_id)
def test_every_part_of_a_structure_counts(tiny_of, published):
    config = checkpoint.read_config(tiny_of("next-mistral").folder)
    text = replace(config.text, **{key: value for key, value in vars(published.structure).items() if key != "anyres"})
    config = replace(config, text=text, image_grid_pinpoints=((336, 672),) if published.structure.anyres else None)
    assert recipe_for(config) is published
    for field in set(vars(Structure.of(config))) - {"anyres"}:
        changed = {"model_type": "other", "sliding_window": 77}.get(field, 123457)
        assert recipe_for(replace(config, text=replace(text, **{field: changed}))) is None, field


def test_models_are_named_nowhere_else():
    names = [SHIPPED, *(published.hub_id for published in PUBLISHED)]
    package = Path(minivlm.__file__).parent
    files = [path for path in package.rglob("*.py") if path.name != "models.py" and path.parent.name != "train"]
    assert len(files) > 20
    for path in files:
        assert not [name for name in names if f'"{name}"' in path.read_text(encoding="utf-8")], path
