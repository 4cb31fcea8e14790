"""The vision tower bit for bit as transformers' CLIP: every depth, every type, and a layer of published width."""

import pytest
import torch
import transformers
from torch import nn

from minivlm.ops.backend import REFERENCE, SDPA, Backend
from minivlm.vision.clip import CLIPVisionConfig, CLIPVisionModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# As published for CLIP ViT-L/14-336, but for the number of layers and of patches.
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 1,
    "image_size": 56,
    "patch_size": 14,
}
TINY = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "image_size": 12,
    "patch_size": 4,
}


def towers(values: dict, dtype: torch.dtype, backend: Backend = REFERENCE) -> tuple[CLIPVisionModel, nn.Module]:
    """Our tower and transformers', with one set of random weights."""
    torch.manual_seed(0)
    oracle = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**values, attn_implementation="eager")).to(
        dtype
    )
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    ours = CLIPVisionModel(CLIPVisionConfig.from_hf(values, "test"), backend)
    weights = {name.removeprefix("vision_model."): value for name, value in oracle.state_dict().items()}
    weights.pop("embeddings.position_ids", None)
    ours.load_state_dict(weights, assign=True)
    return ours, oracle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_act", ("quick_gelu", "gelu"))
def test_every_depth_equals_transformers(hidden_act, dtype):
    ours, oracle = towers({**TINY, "hidden_act": hidden_act}, dtype)
    tiles = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        expected = oracle(tiles.to(dtype), output_hidden_states=True).hidden_states
        found = ours(tiles, depths=(0, 1, 2, 3))
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == dtype and torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_width(dtype):
    """A layer of 1024 channels, 4096 inner ones and 16 heads."""
    ours, oracle = towers(LARGE, dtype)
    tiles = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = oracle(tiles.to(dtype), output_hidden_states=True).hidden_states[1]
        (found,) = ours(tiles, depths=(1,))
    assert found.shape == (2, 17, 1024) and torch.equal(found, expected)


def test_order_of_depths_is_the_callers():
    ours, _ = towers(TINY, torch.float32)
    tiles = torch.randn(1, 3, 12, 12)
    for one, two in zip(ours(tiles, (3, 1, 1)), reversed(ours(tiles, (1, 1, 3))), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("depth", (0, 1, 2))
def test_layers_behind_the_last_tapped_one_do_not_run(depth):
    ours, _ = towers(TINY, torch.float32)
    run = []
    for i, layer in enumerate(ours.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: run.append(i))
    ours.post_layernorm.register_forward_hook(lambda *_: run.append("post_layernorm"))
    ours(torch.randn(1, 3, 12, 12), (depth,))
    assert run == list(range(depth))


def test_tiles_do_not_see_each_other():
    ours, _ = towers(TINY, torch.float32)
    tiles = torch.randn(3, 3, 12, 12)
    (before,) = ours(tiles, (3,))
    tiles[1] = torch.nan
    (after,) = ours(tiles, (3,))
    assert torch.equal(before[::2], after[::2]) and after[1].isnan().all()


def test_class_token_comes_first():
    """checklist 8: it is the encoder that has a class token, at index 0, the same for all pictures at depth 0."""
    ours, _ = towers(TINY, torch.float32)
    (state,) = ours(torch.randn(2, 3, 12, 12), (0,))
    assert state.shape == (2, 10, 24)
    assert torch.equal(state[0, 0], state[1, 0]) and not torch.isclose(state[0, 1:], state[1, 1:]).all(-1).any()


def test_fused_attention_agrees():
    ours, oracle = towers(TINY, torch.float32, SDPA)
    tiles = torch.randn(2, 3, 12, 12)
    expected = oracle(tiles, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(ours(tiles, (3,))[0], expected, rtol=1e-5, atol=1e-5)
