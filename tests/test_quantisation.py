"""`load(weights=...)`: quantised models against transformers with weights rounded alike, and the report of it."""

import pytest
import tiny
import torch
import transformers

import minivlm
from minivlm import checkpoint
from minivlm.errors import InputError
from minivlm.kernels.quantise import dequantise_int4, dequantise_int8, quantise_int4, quantise_int8
from minivlm.ops.cpu_quantised import missing_quantised
from minivlm.quantisation import MOST_IDS, TEXT

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
TIED = {"tie_word_embeddings": True}


def rounded(folder, form: str) -> transformers.PreTrainedModel:
    """transformers' model with the decoder's matrices replaced by what their quantised forms stand for."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    text = model.model.language_model
    layers = [module for module in text.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 7 * len(text.layers)
    for layer in layers:
        if form == "int8":
            layer.weight.data = dequantise_int8(*quantise_int8(layer.weight.data))
        else:
            layer.weight.data = dequantise_int4(*quantise_int4(layer.weight.data))
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.data = dequantise_int8(*quantise_int8(model.lm_head.weight.data))
    return model


def logits_of(model: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("config", [{}, TIED], ids=["own head", "tied head"])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_logits_and_report_are_those_of_transformers_with_rounded_weights(form, config, tmp_path):
    folder = tiny.make_tiny(tmp_path / "model", text=WIDE | config, config=config)
    vlm = minivlm.load(folder, device="cpu", dtype="float32", backend="reference", weights=form)
    ids = vlm.processor.tokenizer.encode(TEXT)[:MOST_IDS]
    plain = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    old, new = logits_of(plain, ids), logits_of(rounded(folder, form), ids)
    inputs = vlm.inputs("what colour is it", [tiny.picture(23, 31)])
    with torch.inference_mode():
        found = vlm.model([inputs])
    text = vlm.processor.tokenizer
    expected = rounded(folder, form)(
        input_ids=torch.tensor([inputs.ids]),
        pixel_values=inputs.tiles[None],
        image_sizes=torch.tensor(inputs.image_sizes),
    ).logits[0]
    assert text is not None and torch.allclose(found, expected, atol=2e-4 * expected.abs().max().item())
    change = vlm.info.change
    difference = (new - old) - (new - old).mean(-1, keepdim=True)
    relative = difference.pow(2).mean().sqrt() / old.var(-1, correction=0).mean().sqrt()
    before, after = old.log_softmax(-1).double(), new.log_softmax(-1).double()
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert change.relative == pytest.approx(relative.item(), rel=1e-2)
    assert change.divergence == pytest.approx(divergence.item(), rel=2e-2)
    assert (change.form, change.positions) == (form, len(ids))
    assert change.same == int((old.argmax(-1) == new.argmax(-1)).sum())
    assert 0.2 * change.before > change.after if form == "int4" else 0.26 * change.before > change.after
    assert form in change.line() and f"of {len(ids)} positions" in change.line()


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("name", ["sdpa", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(form, name, dtype, tmp_path):
    if name == "cpu" and (reason := missing_quantised(form, dtype)) is not None:
        pytest.skip(reason)
    folder = tiny.make_tiny(tmp_path / "model", text=WIDE)
    ours, plain = (
        minivlm.load(folder, device="cpu", dtype=dtype, backend=backend, weights=form)
        for backend in (name, "reference")
    )
    inputs = [ours.inputs("what colour is it", [tiny.picture(23, 31)]), ours.inputs("the cat")]
    with torch.inference_mode():
        found, expected = ours.model(inputs).float(), plain.model(inputs).float()
    own_error = plain.info.change.relative
    difference = (found - expected).square().mean().sqrt() / expected.std()
    rounding = 1e-5 if dtype == torch.float32 else 0.03
    # On a CPU 8 bits of the activations come on top of the weights': everywhere, or in int4's head alone.
    most = rounding if name != "cpu" else 1.5 * own_error if form == "int8" else rounding + 0.01
    assert difference <= most
    replies = [vlm.generate("what colour is it", [tiny.picture(23, 31)], max_new_tokens=4) for vlm in (ours, plain)]
    assert all(len(reply.tokens) == 4 for reply in replies)


def test_cached_steps_equal_the_whole_prompt(tmp_path):
    """One row at a time goes another way than many."""
    folder = tiny.make_tiny(tmp_path / "model", text=WIDE)
    vlm = minivlm.load(folder, device="cpu", dtype="float32", weights="int8")
    inputs = vlm.inputs("the cat is red")
    with torch.inference_mode():
        whole = vlm.model([inputs])
        decoder = vlm.model.language_model
        cache, embeddings = decoder.new_cache(1, len(inputs.ids)), vlm.model.embed([inputs])
        steps = [
            decoder.logits(decoder(row[None], minivlm.ops.rows.Rows.causal([1], [i]), cache))
            for i, row in enumerate(embeddings)
        ]
    assert torch.allclose(torch.cat(steps), whole, atol=1e-2 * whole.abs().max().item())


def test_the_rest_stays_as_stored(tmp_path):
    folder = tiny.make_tiny(tmp_path / "model", text=WIDE)
    ours, plain = (
        minivlm.load(folder, device="cpu", dtype="float32", backend="sdpa", weights=form) for form in ("int8", "stored")
    )
    expected, found = plain.model.state_dict(), ours.model.state_dict()
    kept = [name for name in expected if "_proj.weight" not in name.removeprefix("vision_tower") or "vision" in name]
    kept = [name for name in kept if name != "language_model.lm_head.weight"]
    assert set(found) == set(kept) and all(torch.equal(found[name], expected[name]) for name in kept)
    assert plain.info.change is None


def test_a_quantised_model_is_not_saved(tmp_path):
    folder = tiny.make_tiny(tmp_path / "model", text=WIDE)
    for backend in ("cpu", "sdpa"):
        vlm = minivlm.load(folder, device="cpu", weights="int8", backend=backend)
        with pytest.raises(InputError, match="quantised while loading"):
            vlm.save(tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


def test_errors_name_the_format_and_the_width(tmp_path):
    folder = tiny.make_tiny(tmp_path / "model")
    with pytest.raises(InputError, match="weights 'int3', expected stored, int8 or int4"):
        minivlm.load(folder, weights="int3")
    with pytest.raises(InputError, match="weights int4: hidden_size = 32, expected a multiple of 128"):
        minivlm.load(folder, device="cpu", weights="int4")


def test_no_second_copy_of_the_weights(tmp_path, monkeypatch):
    """When a layer is given its weights, those of the layers before it are gone."""
    folder = tiny.make_tiny(tmp_path / "model", text=WIDE | {"num_hidden_layers": 4})
    held = []
    original = checkpoint.Filling.__call__

    def filling(self, module, prefix=""):
        original(self, module, prefix)
        linears = [child for child in module.modules() if isinstance(child, torch.nn.Linear)]
        if prefix:
            held.append([child.weight.untyped_storage()._weak_ref() for child in linears])

    monkeypatch.setattr(checkpoint.Filling, "__call__", filling)
    minivlm.load(folder, device="cpu", weights="int8")
    assert len(held) == 4
