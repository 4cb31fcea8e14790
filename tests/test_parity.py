"""Parity with transformers: it holds bit for bit, and every kind of defect is reported at the stage that has it."""

import json
import math
import sys
import weakref
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from minivlm import parity
from minivlm.errors import InputError
from minivlm.ops import backend as backends
from minivlm.ops.norms import RMSNorm
from minivlm.pipeline import load
from minivlm.stages import Report, Stages, compare

KINDS = list(tiny.MODELS)
PROCESSED = {"pixels", "image sizes", "ids"}


@pytest.fixture(scope="module")
def case_of(tiny_of):
    """case_of(kind) is a case of that kind's checkpoint in float32, with transformers' stages of it."""
    made = {}

    def make(kind: str) -> tuple[parity.Case, Stages]:
        if kind not in made:
            folder = tiny_of(kind).folder
            pipeline = load(folder, "cpu", "float32", "reference")
            case = parity.Case.of(pipeline, folder, tiny.picture(30, 50), parity.QUESTION, False, 5)
            made[kind] = case, parity.capture_transformers(case, "eager")
        return made[kind]

    return make


def first(differences) -> str | None:
    report = Report({}, differences)
    return None if report.ok else report.first.stage


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_is_equal_bit_for_bit(tiny_of, kind, dtype):
    report = parity.run(tiny_of(kind).folder, dtype=dtype, tokens=8)
    assert report.ok and {d.verdict for d in report.differences} == {"equal"}
    assert report.notes == () and report.setting["dtype"] == dtype
    shapes = {d.stage: d.shape for d in report.differences}
    positions, anyres = shapes["ids"][0], kind != "llava"
    tiles, image_tokens = (5, 9 + 36 - 2 * 6 + 4) if anyres else (1, 9)  # 480x640: 4 rows of 6 patches, 4 newlines
    expected = {
        "pixels": (tiles, 3, 12, 12),
        "image sizes": (1, 2),
        "ids": (positions,),
        "vision_tower.embeddings.patch_embedding": (tiles, 24, 3, 3),
        "vision_tower.embeddings": (tiles, 10, 24),
        "vision_tower.pre_layrnorm": (tiles, 10, 24),
        "vision_tower.encoder.layers.0": (tiles, 10, 24),
        "vision_tower.encoder.layers.1": (tiles, 10, 24),  # layer -2 of 3
        "selected features": (tiles, 9, 24),
        "multi_modal_projector": (tiles, 9, 32),
        "image tokens": (image_tokens, 32),
        "language_model.embed_tokens": (positions, 32),
        "merged embeddings": (positions, 32),
        "language_model.layers.0": (positions, 32),
        "language_model.layers.1": (positions, 32),
        "language_model.norm": (positions, 32),
        "logits": (positions, 433),
        "greedy logits": (8, 425),  # without 7 rows that have no token, and the placeholder
        "greedy tokens": (8,),
    }
    if not anyres:
        del expected["image sizes"]
    assert shapes == expected and list(shapes) == list(expected)
    assert report.lines()[-1] == f"parity: all {len(expected)} stages are equal bit for bit"


@pytest.mark.parametrize("backend", ["sdpa", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_backends_are_as_near_to_eager_as_transformers_sdpa(tiny_of, kind, dtype, backend):
    report = parity.run(tiny_of(kind).folder, dtype=dtype, backend=backend, tokens=4)
    assert report.ok, report.lines()
    assert "within" in {d.verdict for d in report.differences}  # else sdpa did not run, or eager did not
    limits = {d.stage: d.limit for d in report.differences}
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert all(limits[stage] == 0 if stage in PROCESSED else eps <= limits[stage] < 0.2 for stage in limits)


@pytest.mark.parametrize(
    "options",
    [
        {"raw": True, "prompt": "<image> the cat"},
        {"image": tiny.picture(50, 9), "prompt": "what colour is it", "tokens": 1},
    ],
)
def test_other_prompts_and_pictures(tiny_of, options):
    report = parity.run(tiny_of("next-mistral").folder, **options)
    assert report.ok, report.lines()


def test_both_choose_among_the_same_ids_and_end_alike(tmp_path):
    """Rows of the head without a token would win if they could; generation_config.json asks for sampling."""
    folder = tiny.make_tiny(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (head,) = [name for name in tensors if name.endswith("lm_head.weight")]
    tensors[head][-tiny.SPARE_ROWS :] *= 30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    pipeline = load(folder, "cpu", "float32", "reference")
    answer = [token.id for token in pipeline.generate("hi", [parity.sample_picture()], max_new_tokens=5).tokens]
    end = next(i for i, token in enumerate(answer) if i and token not in answer[:i])
    values = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0, "eos_token_id": [2, answer[end]]}
    (folder / "generation_config.json").write_text(json.dumps(values))
    report = parity.run(folder, prompt="hi", tokens=5)
    assert report.ok, report.lines()
    assert report.differences[-1].shape == (end + 1,)


# ---- defects


@pytest.mark.parametrize(
    "parameter, stage",
    [
        ("vision_tower.embeddings.patch_embedding.weight", "vision_tower.embeddings.patch_embedding"),
        ("vision_tower.embeddings.class_embedding", "vision_tower.embeddings"),
        ("vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm"),
        ("vision_tower.encoder.layers.1.mlp.fc1.bias", "vision_tower.encoder.layers.1"),
        ("vision_tower.encoder.layers.2.mlp.fc1.bias", None),  # behind the tapped layer: never runs
        ("multi_modal_projector.linear_2.weight", "multi_modal_projector"),
        ("image_newline", "image tokens"),
        ("language_model.embed_tokens.weight", "language_model.embed_tokens"),
        ("language_model.layers.1.self_attn.q_proj.weight", "language_model.layers.1"),
        ("language_model.norm.weight", "language_model.norm"),
        ("language_model.lm_head.weight", "logits"),
    ],
)
def test_a_wrong_weight_departs_where_it_is_used(case_of, parameter, stage):
    case, theirs = case_of("next-mistral")
    pipeline = load(case.folder, "cpu", "float32", "reference")
    weight = pipeline.model.get_parameter(parameter)
    weight.data = weight.data * 1.001
    differences = compare(parity.capture_ours(pipeline, case), theirs, 0.0)
    assert first(differences) == stage
    before = [d.stage for d in differences].index(stage) if stage else len(differences)
    assert all(d.verdict == "equal" for d in differences[:before])


def test_a_wrong_rope_theta_fails_with_the_stage_and_the_place(tiny_of, monkeypatch):
    right = backends.rope_table
    monkeypatch.setattr(backends, "rope_table", lambda p, c, theta, dtype: right(p, c, 2 * theta, dtype))
    report = parity.run(tiny_of("next-llama").folder, tokens=4)
    assert not report.ok and report.first.stage == "language_model.layers.0"
    assert report.lines()[-1].startswith("parity fails, first at language_model.layers.0: farthest at [")
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert values["ok"] is False and values["first_departure"] == "language_model.layers.0"
    assert [stage["verdict"] for stage in values["stages"]].count("equal") == 13
    report = parity.run(tiny_of("next-llama").folder, tokens=4, tolerance=1e6)
    assert report.ok and report.first is None


def test_a_weight_multiplied_before_rounding_is_seen_in_bfloat16(tiny_of, monkeypatch):
    def unrounded(norm, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        return (norm.weight.float() * wide).to(x.dtype)

    monkeypatch.setattr(RMSNorm, "forward", unrounded)
    report = parity.run(tiny_of("next-mistral").folder, dtype="bfloat16", tokens=1)
    assert report.first.stage == "language_model.layers.0" and report.first.relative < 0.1


@pytest.mark.parametrize(
    "change, departing",
    [
        ({"picture": tiny.picture(30, 50, seed=1)}, ["pixels"]),
        ({"picture": tiny.picture(60, 100)}, ["pixels", "image sizes"]),
        ({"prompt": "What is shown in this photo?"}, ["ids"]),
    ],
)
def test_unequal_inputs_do_not_hide_what_the_models_do(case_of, change, departing):
    case, theirs = case_of("next-mistral")
    other = parity.capture_transformers(replace(case, **change), "eager")
    assert [d.stage for d in compare(theirs, other, 0.0) if not d.ok] == departing


# ---- what transformers does wrong is said


def test_the_rebuilt_llama_tokenizer_is_named(case_of, monkeypatch):
    """checklist 22: AutoTokenizer may choose LlamaTokenizer, which ignores tokenizer.json's normaliser."""
    case, theirs = case_of("next-mistral")
    from_pretrained = transformers.AutoProcessor.from_pretrained

    def rebuilt(folder, **options):
        processor = from_pretrained(folder, **options)
        processor.tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
        return processor

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", rebuilt)
    other = parity.capture_transformers(case, "eager")
    assert len(other.notes) == 1 and "AutoTokenizer chose LlamaTokenizer" in other.notes[0]
    assert torch.equal(other.values["ids"], theirs.values["ids"])


def test_a_processor_that_transformers_cannot_use_is_a_failure(case_of, tmp_path):
    case, theirs = case_of("llava")
    for path in case.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "processor_config.json").unlink()
    other = parity.capture_transformers(replace(case, folder=tmp_path), "eager")
    assert [d.stage for d in compare(theirs, other, 0.0) if d.verdict == "missing"] == ["pixels", "ids"]
    assert len(other.notes) == 1 and "transformers does not process the prompt" in other.notes[0]


def test_weights_that_transformers_would_draw_at_random_are_refused(case_of, tmp_path):
    case, _ = case_of("next-mistral")
    for path in case.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    values = json.loads((case.folder / "config.json").read_text())
    values["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        InputError, match=r"transformers fills 9 weights at random, as model\.language_model\.layers\.2"
    ):
        parity.capture_transformers(replace(case, folder=tmp_path), "eager")


def test_a_template_that_transformers_does_not_find_is_noted(case_of, tmp_path):
    case, theirs = case_of("next-mistral")
    for path in case.folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).symlink_to(path)
    other = parity.capture_transformers(replace(case, folder=tmp_path), "eager")
    assert other.notes == ("transformers' processor has no chat template; both are given minivlm's",)
    assert first(compare(theirs, other, 0.0)) is None


# ---- the run


def test_only_one_model_is_alive_at_a_time(tiny_of, monkeypatch):
    alive, order = [], []

    def watched(name, make):
        def call(*args, **options):
            assert not [kind for kind, model in alive if model() is not None], f"two models at once, now {name}"
            made = make(*args, **options)
            model = made.model if name == "minivlm" else made[0]
            alive.append((name, weakref.ref(model)))
            order.append(name)
            return made

        return call

    auto = transformers.AutoModelForImageTextToText
    monkeypatch.setattr(parity, "load", watched("minivlm", parity.load))
    monkeypatch.setattr(auto, "from_pretrained", watched("transformers", auto.from_pretrained))
    assert parity.run(tiny_of("next-mistral").folder, backend="sdpa", tokens=2).ok
    assert order == ["minivlm", "transformers", "transformers"]
    assert all(model() is None for _, model in alive)


def test_the_models_are_left_without_hooks(tiny_of):
    pipeline = load(tiny_of("llava").folder, "cpu", "float32", "reference")
    case = parity.Case.of(pipeline, tiny_of("llava").folder, tiny.picture(9, 9), "hi", False, 2)
    parity.capture_ours(pipeline, case)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.model.modules())


def test_without_transformers_one_line_says_what_to_install(tiny_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"parity needs transformers .*: pip install 'minivlm\[test\]'$"):
        parity.run(tiny_of("llava").folder)


def test_an_old_transformers_is_refused(tiny_of, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(InputError, match=r"parity needs transformers 5\.6 or newer, found 4\.57\.1"):
        parity.run(tiny_of("llava").folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tolerance": -1.0}, "tolerance: found -1.0, expected a number of at least 0"),
        ({"tolerance": math.nan}, "tolerance: found nan"),
        ({"tokens": 0}, "tokens: found 0, expected at least 1"),
        ({"tokens": 1000}, "max_new_tokens: found 1000"),
        ({"raw": True}, "0 <image> for 1 pictures"),
        ({"image": "none.png"}, "none.png: no such file"),
    ],
)
def test_bad_input_is_one_line(tiny_of, options, message):
    with pytest.raises(InputError, match=message) as caught:
        parity.run(tiny_of("llava").folder, **options)
    assert "\n" not in str(caught.value)


def test_the_sample_picture_is_ordinary():
    picture = parity.sample_picture()
    assert (picture.mode, picture.size) == ("RGB", (640, 480)) and len(picture.getcolors(10**6)) > 50
