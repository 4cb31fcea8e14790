"""config.json and generation_config.json: class defaults, both spellings, and what is refused."""

import json

import pytest
import tiny
import transformers
from layouts import assert_equals, copy_of, edit_config, load, refused, state_of

from minivlm import checkpoint
from minivlm.checkpoint import GenerationDefaults
from minivlm.decoder.mistral import MistralConfig
from minivlm.errors import InputError
from minivlm.vision.clip import CLIPVisionConfig
from minivlm.vlm import VLMConfig

KINDS = tuple(tiny.MODELS)


def test_class_defaults():
    """A published config.json lists what differs from the class; the rest must be the class's."""
    for model_type, hf in (("mistral", transformers.MistralConfig()), ("llama", transformers.LlamaConfig())):
        ours = MistralConfig.from_hf({"model_type": model_type}, "test")
        assert ours.rope_theta == hf.rope_parameters["rope_theta"]
        for field in set(vars(ours)) - {"rope_theta", "sliding_window"}:
            assert vars(ours)[field] == vars(hf)[field] if field in vars(hf) else hf.model_type, field
        assert ours.model_type == hf.model_type
        assert ours.sliding_window == (hf.sliding_window if model_type == "mistral" else None)
    ours, hf = CLIPVisionConfig.from_hf({}, "test"), transformers.CLIPVisionConfig()
    assert vars(ours) == {field: vars(hf)[field] for field in vars(ours)}


@pytest.mark.parametrize(
    ("model_type", "config_class"),
    [("llava", transformers.LlavaConfig), ("llava_next", transformers.LlavaNextConfig)],
)
@pytest.mark.parametrize("vision", (None, {"image_size": 336, "patch_size": 14}))
def test_whole_config_defaults(model_type, config_class, vision):
    given = {"text_config": {"vocab_size": 32064}} | ({} if vision is None else {"vision_config": vision})
    ours, hf = VLMConfig.from_hf({"model_type": model_type, **given}, "test"), config_class(**given)
    for field in vars(ours.vision):
        assert vars(ours.vision)[field] == vars(hf.vision_config)[field], field
    assert ours.text.model_type == hf.text_config.model_type
    assert ours.image_token_id == hf.image_token_index
    assert ours.vision_feature_layers == (hf.vision_feature_layer,)
    for field in ("vision_feature_select_strategy", "projector_hidden_act", "multimodal_projector_bias"):
        assert vars(ours)[field] == vars(hf)[field], field
    if model_type == "llava_next":
        assert [list(size) for size in ours.image_grid_pinpoints] == hf.image_grid_pinpoints


@pytest.mark.parametrize("kind", KINDS)
def test_version_4_spelling(tiny_of, tmp_path, kind):
    folder = copy_of(tiny_of(kind).folder, tmp_path / "copy")
    values = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in values["text_config"] and "dtype" in values
    new = checkpoint.read_config(folder)
    parameters = values["text_config"].pop("rope_parameters")
    values["text_config"] |= {
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "float32",
    }
    values["torch_dtype"] = values.pop("dtype")
    values |= {"ignore_index": -100, "_name_or_path": "/somewhere"}
    (folder / "config.json").write_text(json.dumps(values))
    assert checkpoint.read_config(folder) == new
    assert_equals(load(folder)[0], state_of(tiny_of(kind))[1])


@pytest.mark.parametrize("theta", (1e4, 1e6))
def test_rope_theta_of_both_spellings(theta):
    for rope in ({"rope_theta": theta}, {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}):
        assert MistralConfig.from_hf({"model_type": "llama", **rope}, "test").rope_theta == theta


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "paligemma"}, ["model_type = 'paligemma'"]),
        ({"model_type": None}, ["model_type = None"]),
        ({"text_config": []}, ["text_config = []", "expected dict"]),
        ({"text_config": {"model_type": "gemma"}}, ["model_type = 'gemma'", "mistral"]),
        ({"text_config": {"hidden_size": "32"}}, ["hidden_size = '32'", "expected int"]),
        ({"text_config": {"hidden_size": 0}}, ["hidden_size = 0", "positive"]),
        ({"text_config": {"rms_norm_eps": float("nan")}}, ["rms_norm_eps = nan"]),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2}}}, ["rope_scaling", "linear"]),
        ({"text_config": {"attention_bias": True}}, ["attention_bias = True"]),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, ["siglip_vision_model"]),
        ({"vision_feature_layer": -9}, ["vision_feature_layer = -9"]),
        ({"vision_feature_layer": "last"}, ["vision_feature_layer = 'last'"]),
        ({"image_grid_pinpoints": [[12, 23]]}, ["image_grid_pinpoints", "23", "multiple"]),
        ({"image_grid_pinpoints": [12, 24]}, ["image_grid_pinpoints = [12, 24]"]),
        ({"vision_feature_select_strategy": "full"}, ["'full'"]),
        ({"image_token_index": 10**6}, ["image_token_index = 1000000"]),
        ({"new_switch": 3}, ["unknown key new_switch = 3"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "not supported"]),
        ({"mm_vision_tower": "openai/clip"}, ["mm_vision_tower", "Hugging Face's form"]),
        ({"dtype": "float8"}, ["dtype = 'float8'"]),
    ],
)
def test_refused_configs(tiny_of, tmp_path, changes, parts):
    folder = copy_of(tiny_of("next-mistral").folder, tmp_path / "copy")
    edit_config(folder, **changes)
    refused(folder, "config.json", *parts)


def test_config_files_that_are_none(tiny_of, tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json", "JSON")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    refused(tmp_path, "config.json", "utf-8")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json", "expected a JSON object, found list")
    refused(tmp_path / "config.json", "a file, expected the folder")


# Generation defaults


@pytest.mark.parametrize(
    ("generation", "text", "top", "expected"),
    [
        ({}, {}, {}, ((2,), 1, None)),
        (
            {"eos_token_id": [2, 7], "bos_token_id": 3, "pad_token_id": 9},
            {"eos_token_id": 5},
            {},
            ((2, 7), 3, 9),
        ),
        ({"bos_token_id": 1}, {"eos_token_id": 7, "pad_token_id": 0}, {"eos_token_id": 8}, ((7,), 1, 0)),
        ({"eos_token_id": None}, {}, {"eos_token_id": 8, "pad_token_id": 32001}, ((8,), 1, 32001)),
    ],
)
def test_generation_defaults(generation, text, top, expected):
    found = GenerationDefaults.from_hf(generation, {"text_config": text, **top}, "test")
    assert (found.eos_token_ids, found.bos_token_id, found.pad_token_id) == expected


@pytest.mark.parametrize("eos", ("2", [], [2, None], -1, True, 2.0))
def test_generation_ids_that_are_none(tiny_of, tmp_path, eos):
    folder = copy_of(tiny_of("llava").folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    refused(folder, "eos_token_id", repr(eos))


@pytest.mark.parametrize(
    ("part", "key"),
    [("text_config", "rms_norm_eps"), ("text_config", "rope_theta"), ("vision_config", "layer_norm_eps")],
)
def test_numbers_that_would_give_no_numbers_are_refused(part, key):
    with pytest.raises(InputError, match=rf"{part}: {key} = -1.0, expected a positive number"):
        VLMConfig.from_hf({"model_type": "llava", part: {key: -1}}, "config.json")
