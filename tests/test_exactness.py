"""Logits of whole models against transformers': the checkpoints it saved, loaded by minivlm.

On single prompts the `reference` backend equals transformers' eager attention bit for bit in float32, bfloat16 and
float16, prefill and decoding. Oracles in low precision come from `from_pretrained(dtype=...)`: `model.to(dtype)`
would also round the rotary frequencies.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor

import minivlm
from minivlm.ops.rows import Rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A raw prompt and the (height, width) of its pictures: none, odd ones, one smaller than a patch, very flat ones.
PROMPTS = (
    ("what colour is it", ()),
    ("<image>\nthe cat", ((23, 31),)),
    ("<image> is <image>\n two <image>", ((41, 9), (1, 1), (3, 90))),
)
# name: (kind of model, changes to text_config, to vision_config, to config.json)
CASES: dict[str, tuple[str, dict, dict, dict]] = {
    "NeXT with Mistral": ("next-mistral", {}, {}, {}),
    "NeXT with Llama": ("next-llama", {}, {}, {}),
    "LLaVA-1.5": ("llava", {}, {}, {}),
    "one query head a key head": ("next-llama", {"num_key_value_heads": 4}, {}, {}),
    "four query heads a key head": ("next-mistral", {"num_key_value_heads": 1}, {}, {}),
    "eight query heads a key head": ("llava", {"num_attention_heads": 8, "num_key_value_heads": 1}, {}, {}),
    "heads wider than width / heads": ("next-mistral", {"head_dim": 12}, {}, {}),
    "heads narrower than width / heads": ("next-llama", {"head_dim": 6}, {}, {}),
    "sliding window shorter than the prompt": ("next-mistral", {"sliding_window": 5}, {}, {}),
    "sliding window of one": ("next-mistral", {"sliding_window": 1}, {}, {}),
    "tied embeddings": ("next-llama", {"tie_word_embeddings": True}, {}, {"tie_word_embeddings": True}),
    "tied by the top level alone": ("llava", {}, {}, {"tie_word_embeddings": True}),
    "last feature layer": ("next-mistral", {}, {}, {"vision_feature_layer": -1}),
    "feature layer from the front": ("llava", {}, {}, {"vision_feature_layer": 1}),
    "two feature layers, NeXT": ("next-mistral", {}, {}, {"vision_feature_layer": [-1, -3]}),
    "three feature layers, LLaVA-1.5": ("llava", {}, {}, {"vision_feature_layer": [-2, -1, 1]}),
    "class token kept": ("llava", {}, {}, {"vision_feature_select_strategy": "full"}),
    "class token and two layers": (
        "llava",
        {},
        {},
        {"vision_feature_select_strategy": "full", "vision_feature_layer": [0, -2]},
    ),
    "projector without bias": ("next-llama", {}, {}, {"multimodal_projector_bias": False}),
    "projector with SiLU": ("next-mistral", {}, {}, {"projector_hidden_act": "silu"}),
    "projector with quick GELU": ("llava", {}, {}, {"projector_hidden_act": "quick_gelu"}),
    "encoder with GELU": ("next-mistral", {}, {"hidden_act": "gelu"}, {}),
    "other rotary base and epsilons": (
        "next-mistral",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-3},
        {"layer_norm_eps": 1e-3},
        {},
    ),
}


@dataclass(frozen=True)
class Pair:
    """A checkpoint loaded twice."""

    ours: minivlm.Pipeline
    oracle: Any
    processor: Any

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype, backend: str = "reference", attention: str = "eager") -> "Pair":
        ours = minivlm.load(folder, device="cpu", dtype=dtype, backend=backend)
        oracle = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
        return cls(ours, oracle, transformers.AutoProcessor.from_pretrained(folder))

    def inputs(self, text: str, pictures: tuple) -> minivlm.processor.Inputs:
        """minivlm's inputs."""
        return self.ours.processor(text, pictures_of(pictures))

    def batch(self, prompts: list[tuple[str, tuple]], side: str = "left") -> dict[str, Tensor]:
        """transformers' inputs, padded where the prompts differ in length."""
        pictures = [picture for _, sizes in prompts for picture in pictures_of(sizes)]
        texts = [text for text, _ in prompts]
        return self.processor(text=texts, images=pictures or None, padding=True, padding_side=side, return_tensors="pt")

    def our_logits(self, *prompts: tuple[str, tuple]) -> list[Tensor]:
        """The logits [S, V] of each row, computed packed."""
        rows = [self.inputs(*prompt) for prompt in prompts]
        with torch.no_grad():
            return list(self.ours.model(rows).split([len(row.ids) for row in rows]))

    def their_logits(self, prompt: tuple[str, tuple]) -> Tensor:
        """The logits [S, V] of a single prompt."""
        with torch.no_grad():
            return self.oracle(**self.batch([prompt])).logits[0]


def pictures_of(sizes: tuple) -> list:
    return [tiny.picture(*size, seed=i) for i, size in enumerate(sizes)]


def assert_bit_for_bit(folder: Path, prompts: tuple) -> None:
    for dtype in DTYPES:
        pair = Pair.of(folder, dtype)
        for prompt in prompts:
            (ours,), theirs = pair.our_logits(prompt), pair.their_logits(prompt)
            assert ours.dtype == theirs.dtype == dtype and ours.shape == theirs.shape
            assert torch.equal(ours, theirs), (dtype, prompt, float((ours - theirs).abs().max()))
            assert ours.isfinite().all() and ours.float().std() > 0.5  # so that equality says something


@pytest.mark.parametrize("name", CASES)
def test_single_prompts_equal_transformers_bit_for_bit(name, tmp_path):
    kind, text, vision, config = CASES[name]
    assert_bit_for_bit(tiny.make_tiny(tmp_path, kind, text=text, vision=vision, config=config), PROMPTS)


@pytest.mark.parametrize("seed", range(12))
def test_drawn_configurations_equal_transformers_bit_for_bit(seed, tmp_path):
    draw = random.Random(seed)
    kind = draw.choice(list(tiny.MODELS))
    assert_bit_for_bit(tiny.make_tiny(tmp_path, kind, seed=seed, **drawn_changes(draw, kind)), drawn_prompts(draw))


def drawn_changes(draw: random.Random, kind: str) -> dict[str, dict]:
    """Any structure that the configurations allow."""
    kv_heads = draw.choice((1, 2, 3))
    heads = kv_heads * draw.choice((1, 2, 4, 8))
    text = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice((2, 6, 8, 10, 20)),
        "hidden_size": heads * draw.randint(-(-16 // heads), -(-48 // heads)),
        "intermediate_size": draw.randint(5, 70),
        "num_hidden_layers": draw.randint(1, 3),
        "rms_norm_eps": draw.choice((1e-6, 1e-5, 1e-2)),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice((1e2, 1e4, 1e6))},
    }
    if kind == "next-mistral":
        text["sliding_window"] = draw.choice((None, 2, 10, 33))
    tile, patch = draw.choice(((12, 4), (15, 5), (8, 4), (14, 7), (9, 3), (16, 2)))
    vision_heads, layers = draw.choice((1, 2, 3)), draw.randint(1, 4)
    vision = {
        "num_attention_heads": vision_heads,
        "hidden_size": vision_heads * draw.choice((4, 8, 10)),
        "intermediate_size": draw.randint(5, 70),
        "num_hidden_layers": layers,
        "image_size": tile,
        "patch_size": patch,
        "hidden_act": draw.choice(("quick_gelu", "gelu")),
    }
    feature_layers = draw.choices([n for n in range(-layers - 1, layers + 1) if n], k=draw.choice((1, 1, 2, 3)))
    config = {
        "vision_feature_layer": feature_layers[0] if len(feature_layers) == 1 else feature_layers,
        "multimodal_projector_bias": draw.random() < 0.5,
        "projector_hidden_act": draw.choice(("gelu", "quick_gelu", "silu")),
    }
    if kind == "llava":
        config["vision_feature_select_strategy"] = draw.choice(("default", "full"))
    else:
        grids = draw.sample([(1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (1, 1), (4, 1)], draw.randint(1, 5))
        config["image_grid_pinpoints"] = [[tile * rows, tile * columns] for rows, columns in grids]
    return {"text": text, "vision": vision, "config": config}


def drawn_prompts(draw: random.Random) -> tuple:
    """Two prompts of up to three pictures and one without."""
    prompts: list[tuple[str, tuple]] = [("is it red or blue", ())]
    for _ in range(2):
        sizes = tuple((draw.randint(1, 60), draw.randint(1, 60)) for _ in range(draw.randint(1, 3)))
        words = draw.choices(tiny.TEXT.split(), k=len(sizes) + 1)
        prompts.append((" <image> ".join(words), sizes))
    return tuple(prompts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    [
        "NeXT with Mistral",
        "LLaVA-1.5",
        "one query head a key head",
        "four query heads a key head",
        "sliding window shorter than the prompt",
    ],
)
def test_decode_steps_equal_transformers_bit_for_bit(name, dtype, tmp_path):
    """checklist 13: every step on a growing cache sees every token, in the order in which transformers has them."""
    kind, text, vision, config = CASES[name]
    pair = Pair.of(tiny.make_tiny(tmp_path, kind, text=text, vision=vision, config=config), dtype)
    decoder = pair.ours.model.language_model
    for prompt in PROMPTS:
        inputs = pair.inputs(*prompt)
        length, steps = len(inputs.ids), 12
        cache = decoder.new_cache(1, length + steps)
        past = transformers.DynamicCache(config=pair.oracle.config.get_text_config())
        with torch.no_grad():
            theirs = pair.oracle(**pair.batch([prompt]), past_key_values=past).logits[0]
            ours = decoder.logits(decoder(pair.ours.model.embed([inputs]), Rows.causal([length]), cache))
            assert torch.equal(ours, theirs)
            for step in range(steps):
                best = theirs[-1:].argmax(-1)
                theirs = pair.oracle(input_ids=best[None], past_key_values=past).logits[0]
                rows = Rows.causal([1], [length + step])
                ours = decoder.logits(decoder(decoder.embed_tokens(best), rows, cache))
                assert torch.equal(ours, theirs), (prompt, step)


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_packed_rows_equal_rows_alone(kind, tiny_of):
    """checklist 11, 14: pictures of different sizes, rows with 0, 1 and 3 of them, in any order of rows."""
    pair = Pair.of(tiny_of(kind).folder, torch.float32)
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[1:] * 2):
        for packed, prompt in zip(pair.our_logits(*prompts), prompts, strict=True):
            theirs = pair.their_logits(prompt)
            assert float((packed - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_packed_rows_equal_a_batch_padded_on_either_side(kind, side, tiny_of):
    """checklist 12: left padding as for generation, right padding as for scoring; ours has none to get wrong."""
    pair = Pair.of(tiny_of(kind).folder, torch.float32)
    batch = pair.batch(list(PROMPTS), side)
    assert (batch["attention_mask"] == 0).any()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = pair.oracle(**batch, position_ids=positions).logits
    for row, ours in enumerate(pair.our_logits(*PROMPTS)):
        theirs = padded[row][batch["attention_mask"][row].bool()]
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_fused_attention_is_as_near_as_transformers_own(kind, dtype, tiny_of):
    """`sdpa` against eager: what transformers' two differ by, measured on the same prompts, is the allowance."""
    eager = Pair.of(tiny_of(kind).folder, dtype)
    fused = Pair.of(tiny_of(kind).folder, dtype, backend="sdpa", attention="sdpa")
    ours, theirs = [], []
    for prompt in PROMPTS:
        exact = eager.their_logits(prompt)
        ours.append(float((fused.our_logits(prompt)[0] - exact).abs().max()))
        theirs.append(float((fused.their_logits(prompt) - exact).abs().max()))
    assert 0 < max(ours) <= max(theirs)


@pytest.mark.parametrize("backend", ("reference", "sdpa", "cpu"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_logits_are_finite_everywhere(dtype, backend, tiny_of):
    """checklist 21: rows of very different lengths share a batch, and no position sees nothing."""
    pair = Pair.of(tiny_of("next-mistral").folder, dtype, backend)
    short = pair.ours.processor("")
    assert short.ids == (1,)
    rows = [short, *(pair.inputs(*prompt) for prompt in PROMPTS), short]
    with torch.no_grad():
        logits = pair.ours.model(rows)
    assert len(logits) == sum(len(row.ids) for row in rows) and logits.isfinite().all()


def test_the_class_token_strategy_full_has_no_place_in_a_grid(tmp_path):
    """checklist 9"""
    folder = tiny.make_tiny(tmp_path, "next-llama", config={"vision_feature_select_strategy": "full"})
    with pytest.raises(minivlm.InputError, match="strategy 'full' keeps the class token"):
        minivlm.load(folder)
