"""The projector bit for bit as transformers' in its three types."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from minivlm.connector.mlp import MLPProjector
from minivlm.ops.activations import ACTIVATIONS


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_projector_equals_transformers(activation, bias, dtype):
    torch.manual_seed(0)
    sizes = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=10),
        text_config=SimpleNamespace(hidden_size=14),
        vision_feature_layer=[-2, -1],  # two layers side by side: 20 channels go in
        projector_hidden_act=activation,
        multimodal_projector_bias=bias,
    )
    oracle = LlavaNextMultiModalProjector(sizes).to(dtype)
    ours = MLPProjector(20, 14, activation, bias).to(dtype)
    ours.load_state_dict(oracle.state_dict())
    features = torch.randn(3, 9, 20, dtype=dtype)
    assert torch.equal(ours(features), oracle(features))
