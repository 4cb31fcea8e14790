"""Random models of known size, minivlm's and transformers' with the same weights, and the steps that are timed.

Where transformers is asked it does what its own `generate` does in a step, without `generate` itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.bench.measure import Contender
from minivlm.decoder.mistral import MistralConfig, MistralDecoder
from minivlm.ops.backend import choose
from minivlm.ops.joined import kept_bits
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rows import Rows
from minivlm.quantisation import Sizes, quantise_head, quantise_linears

BLOCK = 1_000_003  # random numbers that a large tensor repeats; a prime, no width divides it


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    channels: int
    vocabulary: int = 32064

    @property
    def matrices(self) -> int:
        """Weights that a step multiplies by, the head among them, the embeddings not."""
        attention = self.width * self.channels * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.inner) + self.vocabulary * self.width

    def cache_bytes(self, positions: int, itemsize: int) -> int:
        """Keys and values of one row."""
        return 2 * self.layers * self.kv_heads * self.channels * positions * itemsize

    def step_bytes(self, context: int, batch: int, itemsize: int, bits: float | None = None) -> float:
        """What one step must read: every matrix once, of so many bits a weight, and every row's keys and values."""
        return self.matrices * (bits or 8 * itemsize) / 8 + batch * self.cache_bytes(context, itemsize)

    def prefill_operations(self, positions: int) -> int:
        """Of a prompt of n positions, the head on the last alone: 2 n for each weight, and 2 n^2 for each channel of a
        query head, as half of all pairs are seen by two products of two operations."""
        head = self.vocabulary * self.width
        products = 2 * positions * (self.matrices - head) + 2 * head
        return products + 2 * positions**2 * self.heads * self.channels * self.layers

    def config_values(self) -> dict[str, Any]:
        """As config.json has them."""
        return {
            "model_type": "mistral",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.channels,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("300M", 1024, 3584, 16, 16, 4, 64),
        Shape("1B", 2048, 7168, 16, 16, 4, 128),
        Shape("7B", 4096, 14336, 32, 32, 8, 128),  # the decoder of LLaVA-1.6-Mistral-7B
    )
}


@dataclass(frozen=True)
class Pair:
    """minivlm's and transformers' decoder of one shape with the same random weights."""

    shape: Shape
    ours: MistralDecoder
    theirs: nn.Module
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: torch.device, backend: str) -> "Pair":
        """Weights of deviation 1 / sqrt(inputs), so that activations neither vanish nor overflow."""
        import transformers

        config = transformers.MistralConfig(**shape.config_values(), attn_implementation="sdpa")
        with torch.device("meta"):
            ours = MistralDecoder(
                MistralConfig.from_hf(shape.config_values(), shape.name), choose(backend, device, dtype)
            )
            theirs = transformers.AutoModelForCausalLM.from_config(config)
        weights = {name: random_weight(parameter.shape, dtype, device) for name, parameter in ours.named_parameters()}
        ours.load_state_dict(weights, assign=True)
        ours.backend.prepare(ours)
        published = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in weights.items()}
        theirs.load_state_dict(published, assign=True)
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(device)  # its frequencies are a buffer
        return cls(shape, ours, theirs.eval().requires_grad_(False), dtype, device)

    def quantised(self, form: str, backend: str) -> "Pair":
        """The same with minivlm's weights in a format of ops/quantised.py; transformers' stay."""
        with torch.device("meta"):
            ours = MistralDecoder(self.ours.config, choose(backend, self.device, self.dtype, form))
        weights = {name: random_weight(p.shape, self.dtype, self.device) for name, p in ours.named_parameters()}
        ours.load_state_dict(weights, assign=True)
        del weights
        sizes = Sizes()
        for layer in ours.layers:
            quantise_linears(layer, form, sizes)
        quantise_head(ours, sizes)
        ours.backend.prepare(ours)
        return replace(self, ours=ours)

    @property
    def bits(self) -> float | None:
        """Of a weight of minivlm's decoder; None if they are as stored."""
        bits = kept_bits(self.ours)
        return bits if bits is not None and round(bits, 2) < 8 * self.dtype.itemsize else None

    def decode(self, batch: int, context: int, attentions: tuple[str, ...] = ("eager", "sdpa")) -> dict:
        """Contenders that each choose one greedy id a row behind `context` cached positions."""
        import transformers

        ids = torch.full((batch,), 5, device=self.device)
        cache = self.ours.new_cache(batch, context + 1)
        rows = Rows.causal([1] * batch, [context] * batch)
        _fill(cache)
        past = transformers.DynamicCache(config=self.theirs.config)
        for layer in range(self.shape.layers if attentions else 0):
            past.update(cache.keys[layer, :, :, :context], cache.values[layer, :, :, :context], layer)

        step = self.ours.backend.decoding(self.ours, cache)  # the step that generation takes

        def ours() -> Tensor:
            return self.ours.logits(step([5] * batch, rows)).argmax(-1)

        def theirs() -> Tensor:
            return self.theirs(input_ids=ids[:, None], past_key_values=past).logits[:, -1].argmax(-1)

        peers = {name: Contender(self._with(name, theirs), lambda: past.crop(-1)) for name in attentions}
        return {"minivlm": Contender(ours), **peers}

    def prefill(self, positions: int, attentions: tuple[str, ...] = ("eager", "sdpa")) -> dict:
        """Contenders that each read a prompt into an empty cache and choose the first id."""
        ids = torch.arange(positions, device=self.device) % self.shape.vocabulary
        cache = self.ours.new_cache(1, positions)

        def ours() -> Tensor:
            hidden = self.ours(self.ours.embed_tokens(ids), Rows.causal([positions]), cache)
            return self.ours.logits(hidden[-1:]).argmax(-1)

        def theirs() -> Tensor:
            return self.theirs(input_ids=ids[None], use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

        return {"minivlm": Contender(ours), **{name: Contender(self._with(name, theirs)) for name in attentions}}

    def compiled(self, batch: int, context: int) -> dict[str, Contender]:
        """transformers' fastest way on CUDA: a static cache and a compiled step that is replayed as a graph."""
        import transformers

        self.theirs.set_attn_implementation("sdpa")
        past = transformers.StaticCache(config=self.theirs.config, max_cache_len=context + 1)
        step = torch.compile(self.theirs, mode="reduce-overhead", fullgraph=True)
        ids = torch.full((batch, 1), 5, device=self.device)
        self.theirs(input_ids=ids.expand(-1, context), past_key_values=past, logits_to_keep=1)
        at = torch.full((batch, 1), context, device=self.device)

        def run() -> Tensor:
            return step(input_ids=ids, past_key_values=past, position_ids=at).logits[:, -1].argmax(-1)

        def back() -> None:
            for layer in past.layers:
                layer.cumulative_length.fill_(context)

        return {"static cache, compiled": Contender(run, back)}

    def _with(self, attention: str, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.theirs.set_attn_implementation(attention)
            return step()

        return run


def _fill(cache: KVCache) -> None:
    for layer in (*cache.keys, *cache.values):  # one at a time: what fills it should not count as its memory
        layer.copy_(random_weight(layer.shape, layer.dtype, layer.device))


def random_weight(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers of deviation 1 / sqrt(last axis); ones for a norm's weight."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    block = torch.randn(min(BLOCK, shape.numel()), generator=generator) * shape[-1] ** -0.5
    block = block.to(device, dtype)
    return block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)
