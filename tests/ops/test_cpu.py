"""The backend `cpu`: what packing keeps and refuses, and that whole models compute and generate as `reference` does."""

import math
import weakref

import pytest
import tiny
import torch
import transformers
from layouts import assert_state, read_weights, state_of
from torch import nn

import minivlm
from minivlm import checkpoint
from minivlm.errors import InputError
from minivlm.kernels.cpu import few_bits, single_row
from minivlm.ops import cpu, cpu_compact, cpu_groups, joined
from minivlm.ops.backend import CPU, REFERENCE, SDPA, choose
from minivlm.ops.norms import RMSNorm
from minivlm.ops.rope import rope_table
from minivlm.ops.rows import Rows

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if cpu.missing(dtype) is None]
PROMPTS = (
    ("what colour is it", ()),
    ("<image>\nthe cat", ((23, 31),)),
    ("<image> is <image>\n two <image>", ((41, 9), (1, 1), (3, 90))),
)
TIED = {"tie_word_embeddings": True}
# name: (kind of model, changes to text_config, to vision_config, to config.json)
CASES: dict[str, tuple[str, dict, dict, dict]] = {
    "NeXT with Mistral": ("next-mistral", {}, {}, {}),
    "NeXT with Llama": ("next-llama", {}, {}, {}),
    "LLaVA-1.5": ("llava", {}, {}, {}),
    "one query head a key head": ("next-llama", {"num_key_value_heads": 4}, {}, {}),
    "four query heads a key head": ("next-mistral", {"num_key_value_heads": 1}, {}, {}),
    "eight query heads a key head": ("llava", {"num_attention_heads": 8, "num_key_value_heads": 1}, {}, {}),
    "heads wider than width / heads": ("next-mistral", {"head_dim": 12}, {}, {}),
    "odd sizes": ("next-llama", {"intermediate_size": 37, "head_dim": 10}, {"intermediate_size": 29}, {}),
    "sliding window shorter than the prompt": ("next-mistral", {"sliding_window": 5}, {}, {}),
    "sliding window of one": ("next-mistral", {"sliding_window": 1}, {}, {}),
    "tied embeddings": ("next-llama", TIED, {}, TIED),
    "three feature layers": ("llava", {}, {}, {"vision_feature_layer": [-2, -1, 1]}),
    "class token kept": ("llava", {}, {}, {"vision_feature_select_strategy": "full"}),
    "projector without bias": ("next-llama", {}, {}, {"multimodal_projector_bias": False}),
}


@pytest.fixture(params=["packed", "as vectors", "by kernels", "compact", "by columns"], autouse=True)
def form(request, monkeypatch):
    """Every form of the products, whichever this processor and these sizes are given."""
    monkeypatch.setattr(cpu, "packs", lambda: request.param == "packed")
    if request.param != "by columns":
        monkeypatch.setattr(cpu_groups, "SMALL", 0)
    if request.param == "compact":
        assert few_bits.missing(torch.float32, "compact") is None
        monkeypatch.setattr(cpu_compact, "WORTH", math.inf)
    else:
        monkeypatch.setattr(few_bits, "missing", lambda dtype, form: "not in this test")
    if request.param == "by kernels":
        assert single_row.missing_linear(torch.float32, False) is None
    else:
        monkeypatch.setattr(single_row, "missing_linear", lambda dtype, quantised: "not in this test")
    return request.param


def both(folder, dtype) -> tuple[minivlm.Pipeline, minivlm.Pipeline]:
    """A checkpoint with the backend `cpu` and with `reference`."""
    packed, plain = (minivlm.load(folder, device="cpu", dtype=dtype, backend=name) for name in ("cpu", "reference"))
    return packed, plain


def requests() -> list[tuple[str, list]]:
    return [(text, [tiny.picture(*size, seed=i) for i, size in enumerate(sizes)]) for text, sizes in PROMPTS]


# ---- the choice


def test_the_faster_form_is_chosen_by_the_processor(monkeypatch):
    monkeypatch.undo()
    assert cpu.packs() is not torch.cpu._is_amx_tile_supported()


def test_auto_is_cpu_where_it_can_be():
    here, apple = torch.device("cpu"), torch.device("mps")
    assert cpu.missing(torch.float32) is None
    assert choose("auto", here, torch.float32) is CPU
    assert choose("auto", apple, torch.float32) is SDPA
    with pytest.raises(InputError, match="backend cpu: found device mps, expected cpu"):
        choose("cpu", apple, torch.float32)


def test_a_type_without_packed_products_is_refused_by_name(form):
    """float64 stands for what a processor lacks, as older ones lack float16."""
    here = torch.device("cpu")
    if form != "packed":
        assert choose("auto", here, torch.float64) is CPU
        return
    assert choose("auto", here, torch.float64) is SDPA
    with pytest.raises(InputError, match=r"backend cpu: no packed products of torch\.float64 \(.+\)"):
        choose("cpu", here, torch.float64)


def test_the_trial_does_not_depend_on_the_default_device():
    with torch.device("meta"):
        assert cpu.missing.__wrapped__(torch.float32) is None


@pytest.mark.parametrize("fault", ["no operator", "wrong numbers"])
def test_the_private_operators_are_tried_before_they_are_used(monkeypatch, fault):
    def broken(x, packed, bias):
        if fault == "no operator":
            raise AttributeError("_linear_pointwise: no such operator")
        return torch.zeros(1, 3)

    monkeypatch.setattr(cpu, "packed_product", broken)
    reason = cpu.missing.__wrapped__(torch.float32)
    assert ("no such operator" if fault == "no operator" else r"expected [[2, 3, 0]]") in reason


# ---- packing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_packed_weights_are_saved_as_they_were(tiny_of, tmp_path, kind, dtype):
    """Bit for bit, under the checkpoint's names, in shards smaller than a group; `state_dict` has them too."""
    source, state = state_of(tiny_of(kind))
    vlm = minivlm.load(source, device="cpu", dtype=dtype, backend="cpu")
    vlm.save(tmp_path / "verbatim")
    checkpoint.save(vlm.model, tmp_path / "made", shard_bytes=3_000)
    assert len(read_weights(tmp_path / "made")) == len(state)
    for folder in (tmp_path / "verbatim", tmp_path / "made"):
        assert_state(folder, kind, {name: tensor.to(dtype) for name, tensor in state.items()})
    plain = minivlm.load(source, device="cpu", dtype=dtype, backend="reference").model.state_dict()
    packed = vlm.model.state_dict()
    assert packed.keys() == plain.keys() and all(torch.equal(packed[name], plain[name]) for name in plain)


def test_no_original_is_kept(tiny_of, form):
    model = minivlm.load(tiny_of("llava").folder, device="cpu", dtype="float32", backend="cpu").model
    plain = tiny_of("llava").vlm.model
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]
    groups = [module.compact for module in model.modules() if isinstance(module, cpu_compact.CompactGroup)]
    compact = sum(compact.shape[0] * compact.shape[1] * 4 for compact in groups)
    assert (compact > 0) is (form == "compact")
    kept = sum(tensor.nbytes for module in model.modules() for tensor in module.buffers(recurse=False))
    assert kept >= sum(compact.nbytes for compact in groups)  # whoever counts buffers counts them
    assert sum(p.nbytes for p in model.parameters()) + compact == sum(p.nbytes for p in plain.parameters())


def test_a_tied_head_is_not_copied(tmp_path):
    folder = tiny.make_tiny(tmp_path, "next-llama", text=TIED, config=TIED)
    vlm = minivlm.load(folder, device="cpu", dtype="float32", backend="cpu")
    decoder = vlm.model.language_model
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    vlm.save(tmp_path / "saved")
    assert len(read_weights(tmp_path / "saved")) == len(read_weights(folder))  # the head is in neither


def test_gradients_are_refused_and_not_lost(tiny_of):
    model = minivlm.load(tiny_of("llava").folder, device="cpu", dtype="float32", backend="cpu").model
    inputs = tiny_of("llava").vlm.inputs("hi")
    assert not model([inputs]).requires_grad
    model.requires_grad_(True)
    with pytest.raises(InputError, match="backend cpu: its joined weights have no gradients, expected sdpa or ref"):
        model([inputs])


@pytest.mark.parametrize("rows", (1, 5, 100))
@pytest.mark.parametrize("name", ("norm.weight", "gate_proj.group.weight", "down.group.weight"))
def test_the_mlp_refuses_gradients_at_every_number_of_rows(rows, name, form):
    block = nn.Module()
    block.norm, block.down = RMSNorm(24, 1e-6), nn.Linear(40, 24, bias=False)
    block.gate_proj, block.up_proj = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
    cpu.prepare(block)
    arguments = (torch.randn(rows, 24), block.norm, block.gate_proj, block.up_proj, block.down)
    assert not cpu.gated_mlp(*arguments).requires_grad
    if form == "compact" and "group" in name:
        assert name not in dict(block.named_parameters())  # its numbers are bytes, which have no gradients
        return
    block.get_parameter(name).requires_grad_(True)
    with pytest.raises(InputError, match="backend cpu: its joined weights have no gradients"):
        cpu.gated_mlp(*arguments)


def test_a_layer_of_a_group_can_stand_alone():
    torch.manual_seed(0)
    block = nn.Module()
    block.gate_proj, block.up_proj, block.down_proj = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)
    plain = {name: (layer.weight.clone(), layer.bias.clone()) for name, layer in block.named_children()}
    cpu.prepare(block)
    assert block.gate_proj.group is block.up_proj.group is not block.down_proj.group
    for name, (weight, bias) in plain.items():
        layer, x = block.get_submodule(name), torch.randn(2, 3, weight.shape[1])
        assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)
        assert (layer.out_features, layer.in_features) == weight.shape
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", (1, 2, 63, 64, 65))
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows(rows, dtype):
    """One row, a few and many take different ways to the same numbers."""
    torch.manual_seed(0)
    block = nn.Module()
    block.gate_proj, block.up_proj = nn.Linear(24, 40), nn.Linear(24, 16)
    block.to(dtype)
    exact = [(layer.weight.detach().double(), layer.bias.detach().double()) for layer in block.children()]
    cpu.prepare(block)
    x = torch.randn(rows, 24, dtype=dtype)
    for found, (weight, bias) in zip(block.gate_proj.group.parts(x), exact, strict=True):
        expected = nn.functional.linear(x.double(), weight, bias)
        assert float((found - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no fast embedding_bag")
@pytest.mark.parametrize("tied", (False, True))
def test_small_weights_of_16_bits_lie_by_columns(form, tied):
    """Without a bias; so do embeddings that a head is tied to, and what is saved of either is in the usual order."""
    torch.manual_seed(0)
    block = nn.Module()
    block.embed, block.q_proj, block.head = nn.Embedding(40, 24), nn.Linear(24, 24), nn.Linear(24, 40, bias=False)
    if tied:
        block.head.weight = block.embed.weight
    block.to(torch.bfloat16)
    weight, state = block.head.weight.detach().clone(), {k: v.clone() for k, v in block.state_dict().items()}
    cpu.prepare(block)
    assert (block.head.group.whole().stride() == (1, 40)) is (form == "by columns")
    assert (block.head.weight is block.embed.weight) is tied
    assert block.q_proj.group.weight.is_contiguous()
    assert torch.equal(block.embed(torch.tensor([3, 0])), state["embed.weight"][[3, 0]])
    saved = block.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    x = torch.randn(1, 24, dtype=torch.bfloat16)
    torch.testing.assert_close(block.head(x), nn.functional.linear(x, weight), rtol=0.01, atol=0.01)


def test_how_many_bits_a_weight_takes(form):
    torch.manual_seed(0)
    block = nn.Module()
    block.gate_proj, block.up_proj = (nn.Linear(1024, 64, bias=False, dtype=torch.bfloat16) for _ in range(2))
    assert joined.kept_bits(block) is None
    cpu.prepare(block)
    bits = joined.kept_bits(block)
    assert 12 < bits < 12.2 if form == "compact" else bits == 16


def test_a_group_takes_what_a_linear_layer_takes():
    """Rows of any number of dimensions, none, and no other width."""
    torch.manual_seed(0)
    block, plain = nn.Module(), nn.Module()
    for module in (block, plain):
        module.gate_proj, module.up_proj = nn.Linear(24, 40, bias=False), nn.Linear(24, 12, bias=False)
    plain.load_state_dict(block.state_dict())
    cpu.prepare(block)
    group = block.gate_proj.group
    for shape in ((24,), (1, 24), (3, 24), (2, 3, 24), (2, 50, 24), (0, 24), (2, 0, 24)):
        x = torch.randn(shape)
        expected = plain.gate_proj(x), plain.up_proj(x)
        torch.testing.assert_close(group(x), torch.cat(expected, dim=-1))
        torch.testing.assert_close(group.parts(x), expected)
    with pytest.raises((ValueError, RuntimeError)):
        group(torch.randn(2, 12))


def test_a_strided_row_is_multiplied_as_any(form):
    torch.manual_seed(0)
    block = nn.Module()
    block.head = nn.Linear(24, 40, bias=False)
    weight = block.head.weight.detach().clone()
    cpu.prepare(block)
    x = torch.randn(24, 2).t()[:1]
    torch.testing.assert_close(block.head(x), nn.functional.linear(x, weight))
    assert (cpu_groups.without_kernels(block, torch.float32) is not None) is (form == "as vectors")


# ---- the operations


def test_rotary_rows_are_those_of_the_table():
    device = torch.device("cpu")
    layouts = [Rows.causal([n], [start]) for n, start in ((1, 0), (5, 2047), (1, 2048), (3, 31000))]
    layouts += [Rows.causal((1, 4, 2), (9, 0, 5000)), Rows.shared_prefix([(3, 2, 2)])]
    for rows in layouts:
        for dtype in (torch.float32, torch.bfloat16):
            expected = rope_table(rows.positions(device), 64, 1e4, dtype)
            for found, table in zip(cpu.rope(rows, 64, 1e4, dtype, device), expected, strict=True):
                torch.testing.assert_close(found, table, rtol=0, atol=2 * torch.finfo(dtype).eps)


# ---- whole models


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_reference(name, tmp_path):
    """Rows alone and packed, in float32, to 1e-5 of the largest logit."""
    kind, text, vision, config = CASES[name]
    packed, plain = both(tiny.make_tiny(tmp_path, kind, text=text, vision=vision, config=config), "float32")
    inputs = [plain.processor(text, pictures) for text, pictures in requests()]
    for rows in (*([row] for row in inputs), inputs):
        with torch.inference_mode():
            found, expected = packed.model(rows), plain.model(rows)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_generated_ids_equal_reference(name, tmp_path):
    """Single prompts, and a batch whose rows end at different steps."""
    kind, text, vision, config = CASES[name]
    packed, plain = both(tiny.make_tiny(tmp_path, kind, text=text, vision=vision, config=config), "float32")
    for text, pictures in requests():
        found, expected = (vlm.generate(text, pictures, raw=True, max_new_tokens=30) for vlm in (packed, plain))
        assert [token.id for token in found.tokens] == [token.id for token in expected.tokens]
        logprobs = [token.logprob for token in expected.tokens]
        assert [token.logprob for token in found.tokens] == pytest.approx(logprobs, abs=1e-4)
    batches = (vlm.generate_batch(requests(), raw=True, max_new_tokens=30) for vlm in (packed, plain))
    found, expected = ([[token.id for token in reply.tokens] for reply in replies] for replies in batches)
    assert found == expected


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_a_dialogue_equals_reference(tiny_of, kind):
    """Three turns; the cache grows beneath them."""
    packed, plain = (vlm.chat() for vlm in both(tiny_of(kind).folder, "float32"))
    for turn, pictures in (("what is it", [tiny.picture(20, 31)]), ("the cat", []), ("is it red", [])):
        replies = [chat.say(turn, pictures, max_new_tokens=25) for chat in (packed, plain)]
        found, expected = ([token.id for token in reply.tokens] for reply in replies)
        assert found == expected


@pytest.mark.parametrize("window", (None, 5))
def test_chunks_and_steps_equal_one_pass(tmp_path, window):
    """checklist 17: packed weights, chunked prefill and single queries give what one uncached pass gives."""
    folder = tiny.make_tiny(tmp_path, "next-mistral", text={"sliding_window": window})
    decoder = minivlm.load(folder, device="cpu", dtype="float32", backend="cpu").model.language_model
    ids = torch.randint(400, (12,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = decoder(decoder.embed_tokens(ids), Rows.causal([12]), None)
        for cuts in ((5,), (1, 2, 9), tuple(range(1, 12))):
            cache, pieces = decoder.new_cache(2, 12), []
            cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
            for begin, end in zip((0, *cuts), (*cuts, 12), strict=True):
                rows = Rows.causal([end - begin], [begin], [1])
                pieces.append(decoder(decoder.embed_tokens(ids[begin:end]), rows, cache))
            torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_error_in_16_bits_is_that_of_16_bits(tiny_of, kind, dtype):
    """Against float32: at most 1.1 times the error of transformers' own eager and sdpa, root mean square."""
    folder = tiny_of(kind).folder
    vlm = minivlm.load(folder, device="cpu", dtype=dtype, backend="cpu")
    exact = tiny_of(kind).vlm.model
    errors: dict[str, list] = {"cpu": [], "eager": [], "sdpa": []}
    oracles = {
        name: transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=name)
        for name in ("eager", "sdpa")
    }
    for text, pictures in requests():
        batch = tiny_of(kind).processor(text=text, images=pictures or None, return_tensors="pt")
        inputs = [vlm.processor(text, pictures)]
        with torch.inference_mode():
            expected = exact(inputs)
            found = {name: oracle(**batch).logits[0] for name, oracle in oracles.items()} | {"cpu": vlm.model(inputs)}
        for name, logits in found.items():
            errors[name].append((logits.float() - expected).flatten())
    size = {name: float(torch.cat(parts).square().mean().sqrt()) for name, parts in errors.items()}
    assert 0 < size["cpu"] <= 1.1 * max(size["eager"], size["sdpa"]), size


def test_reference_and_sdpa_stay_trainable(tiny_of):
    """Only `cpu` prepares: the others' modules and gradients are as loaded."""
    for backend in (REFERENCE, SDPA):
        model, _ = checkpoint.load(tiny_of("llava").folder, "cpu", "float32", backend, progress=False)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert any(isinstance(module, nn.Linear) for module in model.modules())


def test_the_original_weights_go_as_their_group_is_made(monkeypatch):
    """At no time are there more weights twice than those of one group."""
    blocks, gone = nn.ModuleList(), []
    for _ in range(3):
        block = nn.Module()
        block.q_proj, block.k_proj, block.v_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        blocks.append(block)

    made = joined.Group.__init__

    def watched(group, linears):
        assert [weight() for weight in gone] == [None] * len(gone)
        made(group, linears)
        gone.extend(weakref.ref(linear.weight) for linear in linears)

    monkeypatch.setattr(joined.Group, "__init__", watched)
    cpu.prepare(blocks)
    assert [weight() for weight in gone] == [None] * 9
