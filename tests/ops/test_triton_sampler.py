"""The sampler of backend `triton`, behind the plain sampler's arguments, against the plain one."""

import dataclasses

import pytest
import torch

import minivlm
from minivlm.errors import InputError, NumericError
from minivlm.ops.backend import REFERENCE
from minivlm.sampler import Sampling, sample

checks = pytest.importorskip("minivlm.kernels.checks", reason="Triton is installed on Linux only")
if checks.interpreted():
    import bf16
    import interpreting

    bf16.install()
    interpreting.install()

from minivlm.kernels.sampling import sample as kernel  # noqa: E402
from minivlm.ops import triton_sampler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, interpreting: exp(100) is inf


def test_the_fused_sampler_has_the_plain_ones_results(device):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(6, 97, generator=generator)
    allowed = torch.rand(97, generator=generator) < 0.8
    samplings = [
        Sampling(),
        Sampling(top_logprobs=4, repetition_penalty=1.4),
        Sampling(temperature=0.7, seed=2**64 - 1, top_k=9),
        Sampling(top_p=0.6, seed=5, top_logprobs=20),
        Sampling(min_p=0.1, seed=6),
        Sampling(seed=3, temperature=2.5, repetition_penalty=0.6, top_k=50, top_p=0.95, min_p=0.01, top_logprobs=1),
    ]
    seen = [(), (1, 2, 3, 96, 400), (4,), (), (), tuple(range(0, 97, 3))]
    positions = [5, 6, 7, 8, 2**40, 10]
    found = triton_sampler.sampler(allowed.to(device))(logits.to(device), samplings, positions, seen)
    for ours, plain in zip(found, sample(logits, samplings, positions, seen, allowed), strict=True):
        assert ours.id == plain.id and [i for i, _ in ours.alternatives] == [i for i, _ in plain.alternatives]
        numbers = [[c.logprob, c.sampled_logprob, *(value for _, value in c.alternatives)] for c in (ours, plain)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)


def test_the_fused_sampler_reads_bitmasks_as_the_plain_one_does(device):
    generator = torch.Generator().manual_seed(2)
    logits, allowed = torch.randn(3, 97, generator=generator), torch.rand(97, generator=generator) < 0.8
    masks = torch.rand(3, 97, generator=generator) < 0.3
    words = torch.stack([triton_sampler.packed_bits(mask) for mask in masks])
    samplings = [Sampling(top_logprobs=20), Sampling(temperature=2.0, seed=3), Sampling(top_k=3, seed=4)]
    arguments = (samplings, [1, 2, 3], [(), (), ()])
    found = triton_sampler.sampler(allowed.to(device))(logits.to(device), *arguments, words)
    plain = REFERENCE.sampler(allowed)(logits, *arguments, words)
    for ours, theirs, mask in zip(found, plain, masks & allowed, strict=True):
        assert ours.id == theirs.id and mask[ours.id]
        assert [i for i, _ in ours.alternatives] == [i for i, _ in theirs.alternatives]
        assert ours.sampled_logprob == pytest.approx(theirs.sampled_logprob, abs=1e-5)
    with pytest.raises(InputError, match=r"bitmasks: found torch.int32 \[3, 3\], expected torch.int32 \[3, 4\]"):
        triton_sampler.sampler(allowed.to(device))(logits.to(device), *arguments, words[:, :3])


BEYOND = [  # what the kernel does not have
    Sampling(typical_p=0.3, temperature=1.5, seed=8, top_logprobs=3),
    Sampling(frequency_penalty=1.5),
    Sampling(presence_penalty=-2, temperature=2.0, seed=1),
    Sampling(logit_bias={3: 4.5, 90: -100}, top_logprobs=2),
]


@pytest.mark.parametrize("masked", (False, True))
def test_rows_beyond_the_kernel_are_the_plain_samplers_beside_rows_of_the_kernel(masked, device, monkeypatch):
    generator, fused = torch.Generator().manual_seed(3), []
    logits, allowed = 3 * torch.randn(7, 97, generator=generator), torch.rand(97, generator=generator) < 0.8
    allowed[[1, 3, 5]] = True
    words = torch.stack([triton_sampler.packed_bits(row) for row in torch.rand(7, 97, generator=generator) < 0.6])
    kernels = [Sampling(), Sampling(temperature=0.9, seed=5, top_logprobs=1), Sampling(repetition_penalty=1.4)]
    samplings = [kernels[0], BEYOND[0], BEYOND[1], kernels[1], BEYOND[2], kernels[2], BEYOND[3]]
    best = logits.argmax(-1).tolist()
    arguments = (samplings, [4, 5, 6, 7, 8, 9, 10], [(1, 2, one, one) for one in best], words if masked else None)
    monkeypatch.setattr(triton_sampler, "sample", lambda *given: fused.append(len(given[0])) or kernel(*given))
    starts = [2, 3, 2, 4, 2, 2, 1]
    found = triton_sampler.sampler(allowed.to(device))(logits.to(device), *arguments, starts)
    plain = REFERENCE.sampler(allowed)(logits, *arguments, starts)
    assert fused == [3]
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.id == theirs.id and [i for i, _ in ours.alternatives] == [i for i, _ in theirs.alternatives]
        numbers = [[c.logprob, c.sampled_logprob] for c in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    only = slice(1, 3)
    arguments = [None if given is None else given[only] for given in (*arguments, starts)]
    assert [c.id for c in triton_sampler.sampler(allowed.to(device))(logits[only].to(device), *arguments)] == [
        choice.id for choice in plain[only]
    ]
    assert fused == [3]  # nothing was left for the kernel
    broken = logits.clone()
    broken[1, 5] = torch.nan
    with pytest.raises(NumericError, match="logits of row 1, position 6"):
        triton_sampler.sampler(allowed.to(device))(broken.to(device), [kernels[0], BEYOND[1]] + samplings[2:],
                                                   [4, 6, 6, 7, 8, 9, 10], [()] * 7)  # fmt: skip


@pytest.mark.parametrize("asked", BEYOND)
def test_an_answer_beyond_the_kernel_is_the_plain_samplers(asked, tiny_of, device):
    folder = tiny_of("next-mistral").folder
    both = [minivlm.load(folder, device=device, dtype="float32", backend=name) for name in ("triton", "reference")]
    settings = dataclasses.asdict(asked) | {"max_new_tokens": 6, "raw": True}
    found, expected = (vlm.generate("the cat is what", **settings).tokens for vlm in both)
    assert [token.id for token in found] == [token.id for token in expected]
    sampled = [[token.sampled_logprob for token in tokens] for tokens in (found, expected)]
    assert sampled[0] == pytest.approx(sampled[1], abs=1e-4)


@pytest.mark.parametrize("v", (1, 31, 32, 33, 97))
def test_bits(v):
    allowed = torch.rand(v, generator=torch.Generator().manual_seed(v)) < 0.5
    words = triton_sampler.packed_bits(allowed)
    assert words.dtype == torch.int32 and len(words) == -(-v // 32)
    assert [bool(words[i // 32].item() >> i % 32 & 1) for i in range(v)] == allowed.tolist()


@pytest.mark.parametrize(
    ("logits", "allowed", "sampling", "error", "message"),
    [
        ([1.0, torch.nan], [True, True], Sampling(), NumericError, "row 0, position 3"),
        ([1.0, torch.inf], [True, True], Sampling(), NumericError, "row 0, position 3"),
        ([1.0, -torch.inf], [False, True], Sampling(), InputError, "no id of positive probability"),
        ([1e30, 1.0], [True, True], Sampling(temperature=1e-30, seed=1), InputError, "beyond the range of float32"),
        ([1.0, 2.0], [True, True], Sampling(temperature=1.0), InputError, "seed: found None"),
        ([1.0, 2.0], [True, True, True], Sampling(), InputError, "allowed"),
    ],
)
def test_the_samplers_errors(logits, allowed, sampling, error, message, device):
    logits, allowed = torch.tensor([logits], device=device), torch.tensor(allowed, device=device)
    with pytest.raises(error, match=message):
        triton_sampler.sampler(allowed)(logits, [sampling], [3], [()])
    with pytest.raises(error, match=message):
        REFERENCE.sampler(allowed)(logits, [sampling], [3], [()])
