"""The decoder bit for bit as transformers' Mistral and Llama, in one piece, in steps, packed, and at full width."""

import pytest
import torch
import transformers
from torch import nn

from minivlm.decoder.mistral import MistralConfig, MistralDecoder
from minivlm.ops.backend import BACKENDS, REFERENCE, Backend
from minivlm.ops.rows import Rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
}
# As published for Mistral-7B, but for the numbers of layers and of words.
LARGE = {
    "vocab_size": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
BRANDS = {
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "windowed": (transformers.MistralConfig, {"sliding_window": 5}),
    "llama": (transformers.LlamaConfig, {"rms_norm_eps": 1e-5}),
}
BACKEND = pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)


def decoders(
    brand: str, values: dict, dtype: torch.dtype, backend: Backend = REFERENCE
) -> tuple[MistralDecoder, nn.Module]:
    """Our decoder and transformers', with one set of random weights."""
    config_class, extra = BRANDS[brand]
    config = config_class(**{**values, **extra}, attn_implementation="eager")
    with torch.device("meta"):
        ours = MistralDecoder(MistralConfig.from_hf(config.to_dict(), "test"), backend)
        oracle = transformers.AutoModelForCausalLM.from_config(config)
    weights = {name: random_weight(p.shape, i).to(dtype) for i, (name, p) in enumerate(ours.named_parameters())}
    ours.load_state_dict(weights, assign=True)
    theirs = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in weights.items()}
    oracle.load_state_dict(theirs, assign=True)
    oracle.model.rotary_emb = type(oracle.model.rotary_emb)(config)  # its frequencies are a buffer
    return ours, oracle.eval()


def random_weight(shape: torch.Size, seed: int) -> torch.Tensor:
    """Normal numbers; a large tensor repeats a million of them, which does not divide by any width."""
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return 1 + 0.2 * torch.randn(shape, generator=generator)
    block = torch.randn(min(1_000_003, shape.numel()), generator=generator) * shape[-1] ** -0.5
    return block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)


def hidden_of(decoder: MistralDecoder, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return decoder(decoder.embed_tokens(ids), Rows.causal([len(ids)]), None)


def drawn_ids(count: int, vocab: int = 50) -> torch.Tensor:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("brand", BRANDS)
def test_hidden_states_and_logits_equal_transformers(brand, dtype):
    ours, oracle = decoders(brand, TINY, dtype)
    for count in (1, 2, 5, 6, 37):
        ids = drawn_ids(count)
        with torch.no_grad():
            expected, logits = oracle.model(ids[None]).last_hidden_state[0], oracle(ids[None]).logits[0]
        found = hidden_of(ours, ids)
        assert found.dtype == dtype and torch.equal(found, expected)
        assert torch.equal(ours.logits(found), logits)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_published_width(dtype):
    """A layer of 4096 channels, 14336 inner ones, 32 query and 8 key heads of 128."""
    ours, oracle = decoders("mistral", LARGE, dtype)
    ids = drawn_ids(6, vocab=8)
    with torch.no_grad():
        expected = oracle.model(ids[None]).last_hidden_state[0]
    assert torch.equal(hidden_of(ours, ids), expected)


@pytest.mark.parametrize("theta", (1e4, 1e6))
def test_far_positions_equal_transformers(theta):
    """Rotary angles at the end of a long context, where rounding differently would show first."""
    ours, oracle = decoders("mistral", {**TINY, "rope_theta": theta}, torch.float32)
    ids, start = drawn_ids(9), 31000
    with torch.no_grad():
        positions = torch.arange(start, start + 9)
        embeddings = ours.embed_tokens(ids)
        expected = oracle.model.rotary_emb(embeddings[None], positions[None])
        rows = Rows.causal([9], [start])
        cache = ours.new_cache(1, start + 9)
        cache.keys.zero_(), cache.values.zero_()
        seen: list[tuple] = []
        hook = ours.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        ours(embeddings, rows, cache)
        hook.remove()
    for found, table in zip(seen[0], expected, strict=True):
        assert torch.equal(found[:, 0], table[0])


@BACKEND
@pytest.mark.parametrize("brand", BRANDS)
def test_any_chunks_equal_the_whole(brand, backend):
    """checklist 17: every split of a row in two, and one token at a time, with a neighbour packed beside it."""
    ours, _ = decoders(brand, TINY, torch.float32, backend)
    ids, other = drawn_ids(11), drawn_ids(3)
    whole = hidden_of(ours, ids)
    for cuts in [(cut,) for cut in range(1, 11)] + [tuple(range(1, 11)), (4, 5, 9)]:
        cache, pieces = ours.new_cache(2, 11), []
        for begin, end in zip((0, *cuts), (*cuts, 11), strict=True):
            packed = torch.cat([other, ids[begin:end]])
            rows = Rows.causal((3, end - begin), (0, begin), (1, 0))
            with torch.no_grad():
                pieces.append(ours(ours.embed_tokens(packed), rows, cache)[3:])
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)


@BACKEND
def test_segments_equal_separate_rows(backend):
    """One prefix with three questions, as in training, gives what three rows give; so do the gradients."""
    ours, _ = decoders("llama", TINY, torch.float32, backend)
    ids = drawn_ids(12)
    segments = (5, 3, 1, 3)
    shared = ours(ours.embed_tokens(ids), Rows.shared_prefix([segments]), None)
    gradient = torch.autograd.grad(shared[5:].square().sum(), ours.embed_tokens.weight)[0]
    alone, at = [], 5
    for n in segments[1:]:
        picked = torch.cat([ids[:5], ids[at : at + n]])
        alone.append(ours(ours.embed_tokens(picked), Rows.causal([5 + n]), None)[5:])
        at += n
    torch.testing.assert_close(shared[5:], torch.cat(alone), rtol=1e-5, atol=1e-5)
    separate = torch.autograd.grad(torch.cat(alone).square().sum(), ours.embed_tokens.weight)[0]
    torch.testing.assert_close(gradient, separate, rtol=1e-4, atol=1e-4)


def test_tied_head_is_the_embedding():
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=True, attn_implementation="eager")
    oracle = transformers.AutoModelForCausalLM.from_config(config)
    ours = MistralDecoder(MistralConfig.from_hf(config.to_dict(), "test"), REFERENCE)
    assert ours.lm_head.weight is ours.embed_tokens.weight
    ours.load_state_dict({name.removeprefix("model."): value for name, value in oracle.state_dict().items()})
    ids = drawn_ids(7)
    with torch.no_grad():
        assert torch.equal(ours.logits(hidden_of(ours, ids)), oracle(ids[None]).logits[0])
