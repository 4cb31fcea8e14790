"""The choice of a backend, and that all backends compute the same."""

import pytest
import torch
from torch import nn

from minivlm.errors import InputError
from minivlm.ops.backend import BACKENDS, choose
from minivlm.ops.norms import RMSNorm
from minivlm.sampler import Sampling, sample


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


# ---- the sampler's seam


def bitmasks_of(table: torch.Tensor) -> torch.Tensor:
    """bool [B, V] -> int32 [B, ceil(V / 32)], written out with Python's integers."""
    rows, v = table.shape
    numbers = [sum(int(table[b, i]) << i for i in range(v)) for b in range(rows)]
    words = [[number >> 32 * w & 0xFFFFFFFF for w in range(-(-v // 32))] for number in numbers]
    return torch.tensor([[w - 2**32 if w >= 2**31 else w for w in row] for row in words], dtype=torch.int32)


SAMPLINGS = (Sampling(), Sampling(temperature=2.0, seed=7, top_logprobs=20), Sampling(top_k=5, seed=1, top_p=0.9))


@pytest.mark.parametrize("v", [1, 31, 32, 33, 97])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_bitmasks_are_added_to_what_is_allowed(backend, v):
    """Each row has its own, and gets what it gets where its ids alone are allowed."""
    generator = torch.Generator().manual_seed(v)
    logits = torch.randn(3, v, generator=generator)
    allowed, masks = torch.rand(v, generator=generator) < 0.8, torch.rand(3, v, generator=generator) < 0.5
    allowed[0] = masks[:, 0] = True
    arguments = (logits, SAMPLINGS, [4, 5, 6], [(), (), ()])
    found = backend.sampler(allowed)(*arguments, bitmasks_of(masks))
    assert found == sample(*arguments, masks & allowed)
    for choice, mask in zip(found, masks & allowed, strict=True):
        assert mask[choice.id] and all(mask[i] for i, _ in choice.alternatives)
    assert backend.sampler(allowed)(*arguments) == sample(*arguments, allowed)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_samplers_are_told_where_answers_begin(backend):
    logits, asked, seen = torch.zeros(2, 3), [Sampling(presence_penalty=1)] * 2, [(0, 1), (0, 1)]
    choose_ids = backend.sampler(torch.ones(3, dtype=torch.bool))
    assert [choice.id for choice in choose_ids(logits, asked, [2, 2], seen, None, [1, 0])] == [0, 2]
    assert [choice.id for choice in choose_ids(logits, asked, [2, 2], seen)] == [2, 2]


def test_bitmasks_that_do_not_fit_are_refused():
    choose_ids = BACKENDS["reference"].sampler(torch.ones(33, dtype=torch.bool))
    for wrong in (torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(InputError, match=r"bitmasks: found .*, expected torch.int32 \[B, 2\]"):
            choose_ids(torch.randn(1, 33), [Sampling()], [1], [()], wrong)
