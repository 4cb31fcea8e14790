"""The choice of a backend, and that all backends compute the same."""

import pytest
import torch
from torch import nn

from minivlm.errors import InputError
from minivlm.ops.backend import BACKENDS, SDPA, choose
from minivlm.ops.norms import RMSNorm


def test_choice_is_by_name():
    cpu = torch.device("cpu")
    assert {name: choose(name, cpu).name for name in BACKENDS} == {name: name for name in BACKENDS}
    assert choose("auto", cpu) is SDPA
    with pytest.raises(InputError, match="backend 'fast' is not known, expected auto, reference or sdpa or triton"):
        choose("fast", cpu)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_blocks_equal_float64(backend):
    """norm + projections; then with attention's part added, y, the gated MLP: y + down(silu(gate y) * up y)."""
    torch.manual_seed(0)
    norm, x, heads = RMSNorm(16, 1e-5), torch.randn(5, 16), torch.randn(5, 12)
    gate, up, down = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
    output = nn.Linear(12, 16, bias=False)

    def projected(x):
        unit = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return [unit @ linear.weight.double().T for linear in (gate, up)]

    y = x.double() + heads.double() @ output.weight.double().T
    gated, lifted = projected(y)
    expected = (*projected(x.double()), y + (gated / (1 + (-gated).exp()) * lifted) @ down.weight.double().T)
    found = (
        *backend.norm_linear(x, norm, (gate, up)),
        backend.decoder_end(x, heads, output, norm, gate, up, down),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
