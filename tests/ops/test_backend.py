"""The choice of a backend, and that all backends compute the same."""

import pytest
import torch
from torch import nn

from minivlm.errors import InputError
from minivlm.ops.backend import BACKENDS, choose
from minivlm.ops.norms import RMSNorm


def test_choice_is_by_name():
    here = torch.device("cpu"), torch.float32
    assert {name: choose(name, *here).name for name in BACKENDS} == {name: name for name in BACKENDS}
    with pytest.raises(InputError, match="backend 'fast' is not known, expected auto, reference or sdpa or cpu"):
        choose("fast", *here)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_blocks_equal_float64(backend):
    """norm + projections, and the gated MLP: down(silu(gate x) * up x)."""
    torch.manual_seed(0)
    norm, x = RMSNorm(16, 1e-5).requires_grad_(False), torch.randn(5, 16)
    gate, up, down = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
    unit = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    gated, lifted = (unit @ linear.weight.double().T for linear in (gate, up))
    block = nn.Module()
    block.gate_proj, block.up_proj, block.down_proj = gate, up, down
    backend.prepare(block)
    gate, up, down = block.children()
    found = (*backend.norm_linear(x, norm, (gate, up)), backend.gated_mlp(x, norm, gate, up, down))
    expected = (gated, lifted, (gated / (1 + (-gated).exp()) * lifted) @ down.weight.double().T)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
