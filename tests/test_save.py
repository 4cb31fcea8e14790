"""Saving: transformers reads what we write, and a save that fails leaves what was there."""

import json
import os
import resource
import stat

import pytest
import tiny
import torch
from layouts import DTYPES, assert_equals, assert_state, copy_of, load, read_weights, renamed, state_of

from minivlm import checkpoint
from minivlm.errors import InputError

KINDS = tuple(tiny.MODELS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_was_saved(tiny_of, tmp_path, kind, dtype):
    source, state = state_of(tiny_of(kind))
    model, info = load(source, dtype)
    checkpoint.save(model, tmp_path / "verbatim", info.config_values, info.generation_values)
    checkpoint.save(model, tmp_path / "made", shard_bytes=30_000)
    assert len(list((tmp_path / "made").glob("model-*.safetensors"))) > 3
    converted = {name: tensor.to(dtype) for name, tensor in state.items()}
    for folder in (tmp_path / "verbatim", tmp_path / "made"):
        assert_state(folder, kind, converted)
        assert_equals(load(folder)[0] if dtype != torch.float16 else load(folder, dtype)[0], converted)
        assert checkpoint.read_config(folder) == model.config
    names = read_weights(tmp_path / "made")
    assert set(names) == {renamed(name, "A") for name in state}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_after_a_round_trip(tiny_of, tmp_path, kind):
    source = tiny_of(kind).folder
    model_class, config_class = tiny.MODELS[kind]
    model, _ = load(source)
    checkpoint.save(model, tmp_path / "made")
    values = config_class.from_pretrained(source)
    size = values.vision_config.image_size
    anyres = kind != "llava"
    torch.manual_seed(0)
    pixels = torch.randn((1, 3, 3, size, size) if anyres else (1, 3, size, size))
    side = size // values.vision_config.patch_size
    count = side * side + (2 * side * side + side if anyres else 0)
    ids = torch.tensor([[1, *[values.image_token_index] * count, 5, 6, 7]])
    sizes = {"image_sizes": torch.tensor([[size, 2 * size]])} if anyres else {}
    logits = []
    for folder in (source, tmp_path / "made"):
        oracle = model_class.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            logits.append(oracle(input_ids=ids, pixel_values=pixels, **sizes).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", KINDS)
def test_made_config_says_everything(tmp_path, kind):
    """No value here is a class default, so one that is not written or not read shows."""
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 3e-5, "head_dim": 10}
    if kind == "next-mistral":
        text["sliding_window"] = 33
    vision = {"hidden_act": "gelu", "layer_norm_eps": 2e-5}
    whole = {"vision_feature_layer": [-2, 0], "projector_hidden_act": "silu", "multimodal_projector_bias": False}
    if kind == "llava":
        whole["vision_feature_select_strategy"] = "full"
    source = tiny.make_tiny(tmp_path / "source", kind, text=text, vision=vision, config=whole)
    model, _ = load(source)
    checkpoint.save(model, tmp_path / "made")
    assert checkpoint.read_config(tmp_path / "made") == checkpoint.read_config(source) == model.config
    config_class = tiny.MODELS[kind][1]
    expected, found = (config_class.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "made"))
    for part in ("text_config", "vision_config"):
        # Ids come from generation_config.json or the caller, and how a weight was drawn is forgotten.
        skipped = {"dtype", "pad_token_id", "_name_or_path", "projection_dim", "architectures"}
        assert {k: v for k, v in found.pop(part).items() if k not in skipped} == {
            k: v for k, v in expected.pop(part).items() if k not in skipped
        }
    assert found | {"_name_or_path": ""} == expected | {"_name_or_path": ""}


def test_files_that_a_save_writes(tiny_of, tmp_path):
    source = tiny_of("next-mistral").folder
    model, info = load(source)
    checkpoint.save(model, tmp_path / "new" / "folder", info.config_values, info.generation_values)
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert json.loads((folder / "generation_config.json").read_text()) == info.generation_values
    wrote = json.loads((folder / "config.json").read_text())
    assert wrote.pop("torch_dtype") == "float32"
    assert wrote == {key: value for key, value in info.config_values.items() if key != "dtype"}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1  # the user's umask holds for the weights too


def test_save_replaces_the_folder_it_was_loaded_from(tiny_of, tmp_path):
    """The weights in memory are that very file."""
    source, state = state_of(tiny_of("llava"))
    folder = copy_of(source, tmp_path / "copy")
    model, info = load(folder)
    checkpoint.save(model, folder, info.config_values, shard_bytes=40_000)
    assert not (folder / "model.safetensors").exists()
    checkpoint.save(model, folder, info.config_values)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert_equals(model, state)
    assert_equals(load(folder)[0], state)


def test_save_refuses_another_models_config(tiny_of, tmp_path):
    model, _ = load(tiny_of("next-mistral").folder)
    _, info = load(tiny_of("next-llama").folder)
    with pytest.raises(InputError, match="config_values"):
        checkpoint.save(model, tmp_path / "saved", info.config_values)
    assert not (tmp_path / "saved").exists()


def test_full_disk_leaves_the_old_checkpoint(tiny_of, tmp_path):
    """A limit on the size of files stands for the full disk: writing fails in the same place."""
    folder = copy_of(tiny_of("llava").folder, tmp_path / "copy")
    model, info = load(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InputError) as caught:
            checkpoint.save(model, folder, info.config_values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot save there" in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_where_no_folder_can_be(tiny_of, tmp_path):
    model, _ = load(tiny_of("llava").folder)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot save there"):
            checkpoint.save(model, folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_save_into_a_read_only_folder(tiny_of, tmp_path):
    model, _ = load(tiny_of("llava").folder)
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot save there"):
        checkpoint.save(model, tmp_path)
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []
