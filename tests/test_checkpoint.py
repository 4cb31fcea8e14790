"""Loading against transformers: every layout of names, every dtype, and tensors that are refused."""

import json
import threading
from pathlib import Path

import pytest
import tiny
import torch
from layouts import (
    DTYPES,
    LAYOUTS,
    assert_equals,
    assert_state,
    copy_of,
    edit_config,
    load,
    read_weights,
    refused,
    renamed,
    state_of,
    write_weights,
)

from minivlm import checkpoint
from minivlm.ops.backend import REFERENCE
from minivlm.processor import Inputs
from minivlm.vlm import VLM, VLMConfig

KINDS = tuple(tiny.MODELS)
FOLDER = Path(__file__).parent / "published"


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout(tiny_of, tmp_path, kind, layout, shards):
    """checklist 18"""
    source, state = state_of(tiny_of(kind))
    folder = copy_of(source, tmp_path / "copy")
    write_weights(folder, {renamed(name, layout): tensor for name, tensor in state.items()}, shards)
    model, info = load(folder)
    assert_equals(model, state)
    assert info.ignored == {}


def test_layouts_differ():
    names = (
        "model.language_model.norm.weight",
        "lm_head.weight",
        "model.vision_tower.embeddings.class_embedding",
    )
    assert len({tuple(renamed(name, layout) for name in names) for layout in LAYOUTS}) == len(LAYOUTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_explicit_dtype(tiny_of, tmp_path, stored, dtype):
    source, state = state_of(tiny_of("next-mistral"))
    folder = copy_of(source, tmp_path / "copy")
    state = {name: tensor.to(stored) for name, tensor in state.items()}
    write_weights(folder, state, 2)
    model, info = load(folder, dtype)
    assert_equals(model, {name: tensor.to(dtype) for name, tensor in state.items()})
    assert info.stored_dtype == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[stored]


@pytest.mark.parametrize(
    ("named", "stored", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.float32, torch.bfloat16),
        ({"torch_dtype": "float32"}, torch.bfloat16, torch.float32),
        ({}, torch.bfloat16, torch.bfloat16),
        ({}, torch.float32, torch.float32),
    ],
)
def test_auto_dtype_is_the_top_levels_then_the_tensors(tiny_of, tmp_path, named, stored, expected):
    source, state = state_of(tiny_of("llava"))
    folder = copy_of(source, tmp_path / "copy")
    text = json.loads((folder / "config.json").read_text())["text_config"] | {"torch_dtype": "float16"}
    edit_config(folder, text_config=text, **({"dtype": None, "torch_dtype": None} | named))
    write_weights(folder, {name: tensor.to(stored) for name, tensor in state.items()})
    assert next(load(folder)[0].parameters()).dtype == expected


def test_auto_dtype_avoids_float16_on_a_cpu(tiny_of, tmp_path):
    source, state = state_of(tiny_of("llava"))
    folder = copy_of(source, tmp_path / "copy")
    edit_config(folder, dtype="float16")
    write_weights(folder, {name: tensor.half() for name, tensor in state.items()})
    assert next(load(folder)[0].parameters()).dtype in (torch.bfloat16, torch.float32)
    assert next(load(folder, "float16")[0].parameters()).dtype == torch.float16


def test_mapped_weights_can_be_trained_and_leave_the_file_alone(tiny_of, tmp_path):
    folder = copy_of(tiny_of("llava").folder, tmp_path / "copy")
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load(folder)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_buffers_are_ignored_with_their_reason(tiny_of, tmp_path):
    source, state = state_of(tiny_of("next-llama"))
    folder = copy_of(source, tmp_path / "copy")
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    write_weights(folder, {renamed(name, "A"): tensor for name, tensor in state.items()} | buffers)
    model, info = load(folder)
    assert_equals(model, state)
    assert info.ignored.keys() == buffers.keys() and all(info.ignored.values())


def test_parameters_that_never_run_are_named(tiny_of):
    model, info = load(tiny_of("next-mistral").folder)
    size, side = model.config.vision.image_size, model.config.vision.grid
    count = side * side + side * 2 * side + side  # the base tile, then two tiles in a row with its newlines
    tiles = torch.zeros(3, 3, size, size)
    model([Inputs((model.config.image_token_id,) * count, tiles, ((size, 2 * size),), (3,))]).sum().backward()
    untouched = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert set(info.not_run) == untouched


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory is anonymous")
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 1.1), ("float16", 0.1)])
def test_no_second_copy_of_the_weights(tmp_path, dtype, most):
    """96 MB of float16: converting needs their memory once, reading them as they are none that no file backs."""
    values = json.loads((FOLDER / "llava-1.5-7b-hf.json").read_text())["config"]
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 2}
    values["text_config"] |= sizes
    values["vision_config"] |= {**sizes, "image_size": 28}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = VLM(VLMConfig.from_hf(values, "test"), REFERENCE)
    tensors = {name: torch.ones(p.shape, dtype=torch.float16) for name, p in model.named_parameters()}
    write_weights(tmp_path, tensors)
    weights = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = load(tmp_path, dtype)
    done.set()
    watcher.join()
    peak = max(peak, anonymous_bytes())
    assert peak - before <= most * weights


# Tied embeddings


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tiny.make_tiny(tmp_path_factory.mktemp("tied"), "llava", config={"tie_word_embeddings": True})
    return folder, tiny.MODELS["llava"][0].from_pretrained(folder).state_dict()


@pytest.mark.parametrize("present", ("embedding", "head", "both"))
def test_tied_embeddings_stay_one_parameter(tied, tmp_path, present):
    source, state = tied
    folder = copy_of(source, tmp_path / "copy")
    names = {renamed(name, "A"): tensor.clone() for name, tensor in state.items()}
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    names[head] = names[embedding].clone()
    if present != "both":
        del names[head if present == "embedding" else embedding]
    write_weights(folder, names)
    model, _ = load(folder)
    assert model.language_model.lm_head.weight is model.language_model.embed_tokens.weight
    assert torch.equal(model.language_model.lm_head.weight, state["lm_head.weight"])

    checkpoint.save(model, tmp_path / "saved")
    assert head not in read_weights(tmp_path / "saved")
    assert len(read_weights(tmp_path / "saved")) == len(read_weights(source))
    assert_state(tmp_path / "saved", "llava", state)


def test_tied_embeddings_that_differ(tied, tmp_path):
    source, state = tied
    folder = copy_of(source, tmp_path / "copy")
    write_weights(folder, {n: t.clone() for n, t in state.items()} | {"lm_head.weight": state["lm_head.weight"] + 1})
    refused(folder, "lm_head.weight", "embed_tokens.weight", "tie_word_embeddings")


def test_untied_head_must_be_there(tiny_of, tmp_path):
    source, state = state_of(tiny_of("next-llama"))
    folder = copy_of(source, tmp_path / "copy")
    write_weights(folder, {name: tensor for name, tensor in state.items() if name != "lm_head.weight"})
    refused(folder, "no tensor for language_model.lm_head.weight", "[")


# Tensors


def spoiled(tiny_of, tmp_path, kind="next-mistral", **tensors):
    """A copy of a checkpoint in layout A with some tensors replaced, added, or (None) left out."""
    source, state = state_of(tiny_of(kind))
    folder = copy_of(source, tmp_path / "copy")
    names = {renamed(name, "A"): tensor for name, tensor in state.items()} | tensors
    write_weights(folder, {name: tensor for name, tensor in names.items() if tensor is not None})
    return folder


NORM, BIAS = "language_model.model.norm.weight", "multi_modal_projector.linear_1.bias"


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({NORM: None}, [f"no tensor for {NORM} [32]"]),
        ({NORM: None, BIAS: None}, ["no tensor for", "(and 1 other)"]),
        ({"extra": torch.zeros(3)}, ["unexpected tensor extra [3] in model.safetensors"]),
        ({NORM: None, "norm": torch.zeros(32)}, [f"no tensor for {NORM}", "unexpected tensor norm [32]"]),
        ({"model.norm.weight": torch.ones(32)}, [NORM, "and model.norm.weight both stand for"]),
        ({NORM: torch.ones(31)}, [f"{NORM} has shape [31]", "asks for [32]"]),
        ({NORM: torch.ones(32, dtype=torch.int8)}, [f"{NORM} is I8", "quantised"]),
        ({NORM: torch.full((32,), torch.nan)}, [f"{NORM} holds NaN"]),
        ({NORM: torch.full((32,), -torch.inf)}, [f"{NORM} holds NaN or infinity"]),
    ],
)
def test_refused_tensors(tiny_of, tmp_path, tensors, parts):
    refused(spoiled(tiny_of, tmp_path, **tensors), str(tmp_path / "copy"), *parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_nan_among_many_numbers(tiny_of, tmp_path, dtype):
    embedding = state_of(tiny_of("next-mistral"))[1]["model.language_model.embed_tokens.weight"].clone()
    embedding[100, 7] = torch.nan
    name = "language_model.model.embed_tokens.weight"
    refused(spoiled(tiny_of, tmp_path, **{name: embedding.to(dtype)}), name, "NaN", dtype=dtype)


def test_numbers_beyond_float16(tiny_of, tmp_path):
    folder = spoiled(tiny_of, tmp_path, **{NORM: torch.full((32,), 1e5)})
    refused(folder, NORM, "too large for torch.float16", dtype="float16")
    load(folder, "bfloat16")


def test_large_finite_numbers_are_no_fault(tiny_of, tmp_path):
    """Their sum overflows float16."""
    folder = spoiled(tiny_of, tmp_path, **{NORM: torch.full((32,), 6e4)})
    assert load(folder, "float16")[0].language_model.norm.weight.min() == 6e4


def test_image_newline_has_no_place_in_llava_15(tiny_of, tmp_path):
    refused(spoiled(tiny_of, tmp_path, "llava", image_newline=torch.zeros(32)), "unexpected tensor image_newline")


def test_more_layers_than_tensors_are_refused_before_they_are_built(tiny_of, tmp_path):
    folder = copy_of(tiny_of("next-mistral").folder, tmp_path / "copy")
    text = json.loads((folder / "config.json").read_text())["text_config"] | {"num_hidden_layers": 10**9}
    edit_config(folder, text_config=text)
    refused(folder, "config.json: asks for", "layers, the files hold")


def test_unknown_dtype(tiny_of):
    refused(tiny_of("llava").folder, "dtype 'int4'", "bfloat16", dtype="int4")
