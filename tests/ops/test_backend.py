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
    with pytest.raises(InputError, match="'fast' is not known, expected auto, reference or sdpa or cpu or triton"):
        choose("fast", *here)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_blocks_equal_float64(backend):
    """norm + projections; then with attention's part added, y, the gated MLP: y + down(silu(gate y) * up y)."""
    torch.manual_seed(0)
    norm, x, heads = RMSNorm(16, 1e-5).requires_grad_(False), torch.randn(5, 16), torch.randn(5, 12)
    block = nn.Module()
    block.gate_proj, block.up_proj = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
    block.down_proj, block.o_proj = nn.Linear(24, 16, bias=False), nn.Linear(12, 16, bias=False)
    gate, up, down, output = (linear.weight.double() for linear in block.children())

    def projected(x):
        unit = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return [unit @ weight.T for weight in (gate, up)]

    y = x.double() + heads.double() @ output.T
    gated, lifted = projected(y)
    expected = (*projected(x.double()), y + (gated / (1 + (-gated).exp()) * lifted) @ down.T)
    backend.prepare(block)
    gate, up, down, output = block.children()
    found = (
        *backend.norm_linear(x, norm, (gate, up)),
        backend.decoder_end(x, heads, output, norm, gate, up, down),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
