"""Quantised weights with the backend `triton` against `reference`, which widens them: prompts, steps, the joints."""

import pytest
import tiny
import torch

import minivlm

checks = pytest.importorskip("minivlm.kernels.checks", reason="Triton is installed on Linux only")

from minivlm.ops import triton  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, interpreting: exp(100) is inf
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("quantised") / "model", text=WIDE)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_prompts_and_steps_equal_reference(form, folder, device, monkeypatch):
    monkeypatch.setattr("minivlm.pipeline.MOST_IDS", 20)  # the interpreter takes its time
    ours, plain = (
        minivlm.load(folder, device=device, dtype="float32", backend=name, weights=form)
        for name in ("triton", "reference")
    )
    rows = [ours.inputs("what colour is it"), ours.inputs("the cat")]
    with torch.inference_mode():
        for inputs in (rows, rows[1:]):
            found, expected = ours.model(inputs), plain.model(inputs)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    replies = [vlm.generate(rows[0], max_new_tokens=3) for vlm in (ours, plain)]
    assert [token.id for token in replies[0].tokens] == [token.id for token in replies[1].tokens]
    for one, other in zip(*(reply.tokens for reply in replies), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    _has_one_weight_and_scale_for_a_product(ours.model.language_model, form)
    assert ours.info.change.relative == pytest.approx(plain.info.change.relative, rel=1e-3)


def _has_one_weight_and_scale_for_a_product(decoder, form):
    attention = decoder.layers[1].self_attn
    group = attention.q_proj.group
    assert group is attention.v_proj.group
    assert group.weight.shape[0] == group.scale.shape[0] == 128 + 64 + 64
    assert group.weight.dtype == {"int8": torch.int8, "int4": torch.uint8}[form]
    assert isinstance(decoder.lm_head, triton.SkinnyLinear) and decoder.lm_head.weight.dtype == torch.int8
