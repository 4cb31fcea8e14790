"""The backend `triton` against `reference`: what tokens see, and whole models on tiny checkpoints.

On a CPU the kernels run in Triton's interpreter; `pytest -m cuda` runs the same tests on a GPU. Float32 must agree to
1e-5 of the largest logit. In 16 bits both backends are compared with the same weights in float32, and the kernels may
be at most half as far again from it as plain PyTorch is.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

import minivlm
from minivlm import checkpoint
from minivlm.answer import Options
from minivlm.batch import Batch
from minivlm.decoder.mistral import MistralAttention, MistralConfig, MistralDecoder, MistralDecoderLayer
from minivlm.errors import InputError
from minivlm.generate import Row, generate, new_cache
from minivlm.ops.backend import REFERENCE, Backend, as_loaded, choose
from minivlm.ops.rows import Rows
from minivlm.processor import Inputs

checks = pytest.importorskip("minivlm.kernels.checks", reason="Triton is installed on Linux only")
if checks.interpreted():
    import bf16
    import interpreting

    bf16.install()
    interpreting.install()

from minivlm.ops import triton, triton_attention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, interpreting: exp(100) is inf
LOW = (torch.bfloat16, torch.float16)


def pair_of(folder, device, dtype="float32") -> tuple[minivlm.Pipeline, minivlm.Pipeline]:
    """A checkpoint by `triton` and by `reference`."""
    return tuple(minivlm.load(folder, device=device, dtype=dtype, backend=name) for name in ("triton", "reference"))


def inputs_of(vlm: minivlm.Pipeline, sizes: Sequence[tuple[int, int]], text: str = "the cat") -> Inputs:
    pictures = [tiny.picture(*size, seed=i) for i, size in enumerate(sizes)]
    return vlm.processor("<image> what " * len(sizes) + text, pictures)


def three_rows(vlm: minivlm.Pipeline) -> list[Inputs]:
    """Two pictures, none, and one."""
    return [inputs_of(vlm, [(23, 9), (9, 9)]), inputs_of(vlm, []), inputs_of(vlm, [(7, 7)])]


def check(found: Tensor, plain: Tensor, exact: Tensor | None = None) -> None:
    """Two results of the same dtype; exact: the same in float32 where that is not what they are."""
    assert found.dtype == plain.dtype and found.isfinite().all()
    if exact is None:
        assert (found - plain).abs().max() <= 1e-5 * plain.abs().max()
    else:
        ours, theirs = ((x.float() - exact).square().mean().sqrt() for x in (found, plain))
        assert 0 < ours <= 1.5 * theirs, (ours, theirs)


# ---- what tokens see


@pytest.mark.parametrize(
    ("rows", "window"),
    [
        (Rows.causal([3, 2], [0, 4], [1, 0]), None),
        (Rows.causal([5, 1, 7], [0, 9, 2], [2, 0, 3]), 4),
        (Rows.shared_prefix([(3, 2, 2), (4,), (0, 2, 1)]), None),
    ],
)
def test_intervals_are_what_rows_say(rows, window):
    seen = triton_attention.sight(rows, window, "cpu")
    prefix = torch.zeros_like(seen.lo) if seen.prefix is None else seen.prefix
    assert (seen.prefix is None) == all(len(segments) == 1 for segments in rows.segments)
    parts = (x.split(rows.lengths) for x in (seen.lo, seen.hi, prefix, seen.positions, seen.slots))
    for row, (lo, hi, before, positions, slots) in enumerate(zip(*parts, strict=True)):
        key = torch.arange(rows.starts[row] + rows.lengths[row])
        found = ((lo[:, None] <= key) & (key < hi[:, None])) | (key < before[:, None])
        assert torch.equal(found, rows.visible(row, window, "cpu"))
        assert torch.equal(positions, key[rows.starts[row] :]) and set(slots.tolist()) == {rows.slots[row]}
    assert seen.offsets.tolist() == [*rows.offsets, sum(rows.lengths)]
    assert all(x.data_ptr() % 16 == seen.positions.data_ptr() % 16 for x in (seen.lo, seen.hi, seen.offsets))


# ---- whole models, without a cache


@pytest.mark.parametrize("kind", ("next-mistral", "llava"))
def test_logits_equal_reference(kind, tiny_of, device):
    ours, plain = pair_of(tiny_of(kind).folder, device)
    rows = three_rows(plain)
    with torch.inference_mode():
        check(ours.model(rows), plain.model(rows))


@pytest.mark.parametrize("dtype", LOW)
def test_logits_are_as_near_the_truth_in_16_bits(dtype, tiny_of, device):
    ours, plain = pair_of(tiny_of("next-mistral").folder, device, dtype)
    rows = three_rows(plain)
    with torch.inference_mode():
        found, rounded = ours.model(rows), plain.model(rows)
        check(found, rounded, plain.model.float()(rows))


def test_a_model_that_was_not_prepared(tiny_of, device):
    """The products are taken one by one."""
    folder, bare = tiny_of("llava").folder, dataclasses.replace(triton.TRITON, prepare=as_loaded)
    plain = minivlm.load(folder, device=device, dtype="float32", backend="reference")
    model, _ = checkpoint.load(folder, str(device), "float32", bare, progress=False)
    assert type(model.language_model.layers[0].self_attn.q_proj) is torch.nn.Linear
    rows = [inputs_of(plain, [(12, 12)]), inputs_of(plain, [])]
    with torch.inference_mode():
        check(model(rows), plain.model(rows))
        check(model(rows[1:]), plain.model(rows[1:]))


@pytest.mark.parametrize("kind", ("next-mistral", "llava"))
def test_joined_weights_are_saved_as_they_came(kind, tiny_of, tmp_path):
    ours = minivlm.load(tiny_of(kind).folder, device="cpu", dtype="float32", backend="triton")
    attention = ours.model.language_model.layers[1].self_attn
    assert attention.q_proj.group is attention.v_proj.group
    assert attention.q_proj.group.weight.shape == (32 + 16 + 16, 32)
    ours.save(tmp_path / "copy")
    again = minivlm.load(tmp_path / "copy", device="cpu", dtype="float32", backend="reference").model.state_dict()
    for name, value in tiny_of(kind).vlm.model.state_dict().items():
        assert torch.equal(again[name], value), name


def test_the_whole_decoder_compiles(tiny_of, device):
    """torch.compile traces every operation of a prompt and of a step, in one graph each."""
    decoder = pair_of(tiny_of("next-mistral").folder, device)[0].model.language_model
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).to(device)
    prompt, step = Rows.causal([5, 2], [0, 0]), Rows.causal([1, 1], [5, 2])
    caches = [decoder.new_cache(2, 8) for _ in range(2)]
    with torch.inference_mode():
        for rows, part in ((prompt, x), (step, x[:2])):
            found, expected = (run(part, rows, cache) for run, cache in zip((compiled, decoder), caches, strict=True))
            check(found, expected)
        assert torch.equal(caches[0].keys, caches[1].keys)


def test_segments_behind_a_shared_prefix(tiny_of, device):
    ours, plain = (vlm.model.language_model for vlm in pair_of(tiny_of("next-mistral").folder, device))
    rows = Rows.shared_prefix([(6, 4, 3), (5,)])
    x = torch.randn(18, 32, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        check(ours(x, rows, None), plain(x, rows, None))


# ---- generation


def steps(vlm: minivlm.Pipeline, rows: Sequence[Inputs], chunk: int, count: int) -> tuple[list[list[int]], Tensor]:
    """Greedy ids of each row, and the logits of each step: [steps, B, V]."""
    options = Options(max_new_tokens=count)
    states = [Row(row, options, dataclasses.replace(vlm.vocabulary, eos_ids=frozenset()), vlm.context) for row in rows]
    logits = []
    hook = vlm.model.language_model.lm_head.register_forward_hook(lambda *call: logits.append(call[2].clone()))
    ids = [[] for _ in rows]
    for row, token in generate(vlm.model, states, new_cache(vlm.model, states), chunk):
        ids[row].append(token.id)
    hook.remove()
    return ids, torch.stack(logits)


@pytest.mark.parametrize(("window", "chunk"), [(6, 7), (None, 1000)])
def test_generation_equals_reference(window, chunk, device, tmp_path):
    folder = tiny.make_tiny(tmp_path, "next-mistral", text={"sliding_window": window})
    ours, plain = pair_of(folder, device)
    rows = three_rows(plain)
    (found, logits), (expected, truth) = (steps(vlm, rows, chunk, 3) for vlm in (ours, plain))
    assert found == expected
    check(logits, truth)


def test_rows_that_join_running_ones(tiny_of, device):
    """Steps of chunks of prompts beside last ids, then of last ids alone: each row as in the reference."""
    answers = []
    for vlm in pair_of(tiny_of("next-mistral").folder, device):
        vocabulary = dataclasses.replace(vlm.vocabulary, eos_ids=frozenset())
        cache = vlm.model.language_model.new_cache(4, 100)
        batch = Batch(vlm.model, vocabulary.allowed, cache, 7, independent=True)
        states = [Row(row, Options(max_new_tokens=4), vocabulary, vlm.context) for row in three_rows(vlm)]
        for slot, row in zip((2, 0, 3), states, strict=True):
            with torch.inference_mode():
                batch.join(row, slot, vlm.model.embed([row.inputs]))
            for _ in range(2):
                batch.step()
        while batch.members:
            batch.step()
        answers.append([row.ids for row in states])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("shape", [(8, 1), (8, 8), (6, 3)])
def test_heads_in_groups_of_any_number(shape, device, tmp_path):
    heads, kv_heads = shape
    text = {"hidden_size": 48, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 24}
    ours, plain = pair_of(tiny.make_tiny(tmp_path, "next-llama", text=text), device)
    rows = [inputs_of(plain, [], "the cat is red"), inputs_of(plain, [], "what")]
    (found, logits), (expected, truth) = (steps(vlm, rows, 1000, 3) for vlm in (ours, plain))
    assert found == expected
    check(logits, truth)


def test_more_rows_than_a_skinny_product_takes(tiny_of, device):
    ours, plain = pair_of(tiny_of("llava").folder, device)
    rows = [inputs_of(plain, [], "the cat is"[: 2 + i]) for i in range(9)]
    (found, logits), (expected, truth) = (steps(vlm, rows, 1000, 2) for vlm in (ours, plain))
    assert found == expected
    check(logits, truth)


def test_steps_follow_a_cache_that_grows(tiny_of, device):
    """Three rows, which a step for four pads; their slots in disorder, one of the cache's slots nobody's."""
    ours, plain = (vlm.model.language_model for vlm in pair_of(tiny_of("next-mistral").folder, device))
    lengths, slots = [3, 1, 2], [2, 0, 3]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    with torch.inference_mode():
        for decoder in (ours, plain):
            cache = decoder.new_cache(4, 4)
            cache.keys.fill_(torch.nan)
            cache.values.fill_(torch.nan)
            step = decoder.backend.decoding(decoder, cache)
            decoder(x, Rows.causal(lengths, slots=slots), cache)
            outputs = []
            for t in range(4):
                starts = [n + t for n in lengths]
                cache.grow(max(starts) + 1)
                outputs.append(step([t, 5, 9], Rows.causal([1] * 3, starts, slots)).clone())
            outputs.append(step([7], Rows.causal([1], [6], [3])).clone())
            assert cache.keys[:, 1, :, :4].isnan().all() and cache.capacity == 8
            found.append(torch.cat(outputs))
    check(*found)


def test_a_drawn_answer_is_the_plain_samplers(tiny_of, device):
    ours, plain = pair_of(tiny_of("next-mistral").folder, device)
    picture = tiny.picture(20, 20)
    settings = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 7, "max_new_tokens": 4, "top_logprobs": 3}
    found, expected = (vlm.generate("what is it?", [picture], **settings).tokens for vlm in (ours, plain))
    assert [token.id for token in found] == [token.id for token in expected]
    for ours_, theirs in zip(found, expected, strict=True):
        assert [a.id for a in ours_.alternatives] == [a.id for a in theirs.alternatives]
        assert ours_.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert ours_.sampled_logprob == pytest.approx(theirs.sampled_logprob, abs=1e-4)


def test_a_position_beyond_the_cache_is_an_error(tiny_of, device):
    model = minivlm.load(tiny_of("llava").folder, device=device, dtype="float32", backend="triton").model.language_model
    with torch.inference_mode(), pytest.raises(ValueError, match="position 9 does not fit in a cache of 9 positions"):
        model(torch.zeros(2, 32, device=device), Rows.causal([2], [8]), model.new_cache(1, 9))


def test_the_shipped_checkpoints_answer(device):
    """At its own sizes: attention over several blocks of keys, products whose inner dimension is cut."""
    picture = Image.new("RGB", (96, 96), (20, 60, 200))
    answers = []
    for name in ("triton", "reference"):
        vlm = minivlm.load(device=device, dtype="float32", backend=name)
        answers.append(vlm.generate("How many shapes are there?", [picture], max_new_tokens=2).tokens)
    found, expected = answers
    assert [token.id for token in found] == [token.id for token in expected]
    assert [token.logprob for token in found] == pytest.approx([token.logprob for token in expected], abs=1e-4)


def forced(decoder: MistralDecoder, backend: Backend, ids: Tensor, prompt: int) -> Tensor:
    """The logits [n, V] of n given ids: of the first `prompt` at once, of each other by a step."""
    for module in decoder.modules():
        if isinstance(module, MistralDecoder | MistralDecoderLayer | MistralAttention):
            module.backend = backend
    cache = decoder.new_cache(1, len(ids))
    step = backend.decoding(decoder, cache)
    hidden = [decoder(decoder.embed_tokens(ids[:prompt]), Rows.causal([prompt]), cache)]
    for position in range(prompt, len(ids)):
        hidden.append(step([int(ids[position])], Rows.causal([1], [position])).clone())
    return decoder.logits(torch.cat(hidden)).float()


@pytest.mark.parametrize("dtype", LOW)
def test_random_weights_agree_on_the_best_id(dtype, device):
    """Wherever the two best logits differ by more than twice the error of plain PyTorch: on a GPU at the widths of
    Mistral 7B, on a CPU at small ones. Each id is given, so no difference is carried on. Behind the prompt a step
    reads the cache in more than one run of keys."""
    large = device.type == "cuda"
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 300}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "sliding_window": None}
    if large:
        sizes |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "vocab_size": 32064}
        sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    torch.manual_seed(0)
    with torch.device("meta"):
        decoder = MistralDecoder(MistralConfig.from_hf({"model_type": "mistral", **sizes}, "test"), REFERENCE)
    decoder = decoder.to(dtype).to_empty(device=device)
    ids = torch.randint(sizes["vocab_size"], (600 if large else 132,), device=device)
    with torch.inference_mode():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 1 if "embed" in name else parameter.shape[-1] ** -0.5)
        triton.pack(decoder)
        prompt = len(ids) - 3
        found = forced(decoder, triton.TRITON, ids, prompt)
        plain = forced(decoder, REFERENCE, ids, prompt)
        exact = forced(decoder.float(), REFERENCE, ids, prompt)
    check(found, plain, exact)
    best = exact.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * (plain - exact).abs().max()
    assert clear.sum() > len(ids) // 4
    assert torch.equal(found.argmax(-1)[clear], exact.argmax(-1)[clear])


# ---- the choice


def test_a_device_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr("minivlm.kernels.checks.interpreted", lambda: False)
    for name in ("cpu", "mps"):
        with pytest.raises(InputError, match=f"backend triton: found device {name}, expected cuda"):
            choose("triton", torch.device(name), torch.float32)


def test_the_choice_on_a_gpu(monkeypatch):
    """Hopper gets the kernels where they are asked for; Turing, which they were not made for, does not."""
    assert choose("auto", torch.device("cuda"), torch.float32).name == "sdpa"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert choose("triton", torch.device("cuda"), torch.float32).name == "triton"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match=r"compute capability 7\.5, expected 8\.0"):
        choose("triton", torch.device("cuda"), torch.float32)


def test_without_triton(monkeypatch):
    monkeypatch.setattr("minivlm.ops.backend.find_spec", lambda name: None)
    with pytest.raises(InputError, match="Triton is not installed"):
        choose("triton", torch.device("cuda"), torch.float32)


@pytest.mark.skipif(not checks.interpreted(), reason="on a GPU bfloat16 is right")
@pytest.mark.parametrize(("interpret", "message"), [("0", "found device cpu"), ("1", "computes bfloat16 wrongly")])
def test_on_a_cpu_the_command_says_what_does_not_run(interpret, message, tiny_of):
    """The interpreter as it comes, without what tests/bf16.py does to it."""
    command = [sys.executable, "-m", "minivlm", "generate", "--model", tiny_of("llava").folder, "hi"]
    command += ["--backend", "triton", "--device", "cpu", "--dtype", "bfloat16", "--max-new-tokens", "1"]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and message in run.stderr and len(run.stderr.strip().splitlines()) == 1, run.stderr
