"""The Mistral decoder: embeddings to hidden states to logits (Jiang et al. 2023; Llama 2, Vicuna and Yi are the same
equations with other numbers).

It knows nothing of images: an image token is an embedding like any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.fields import Fields
from minivlm.ops.backend import Backend
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.norms import RMSNorm
from minivlm.ops.rows import Rows

# Hugging Face class defaults that differ between the brands; a published config.json omits what equals them.
DEFAULTS = {
    "mistral": {
        "intermediate_size": 14336,
        "kv_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "llama": {
        "intermediate_size": 11008,
        "kv_heads": None,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
}


@dataclass(frozen=True)
class MistralConfig:
    """The sizes of a decoder; the field names are `config.json`'s."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str) -> "MistralConfig":
        """From the `text_config` object of a config.json, in transformers 4's or 5's spelling."""
        f = Fields(values, where)
        model_type = f.get("model_type", str, "llama")
        if model_type not in DEFAULTS:
            raise InputError(
                f"{where}: model_type = {model_type!r} is not supported, expected one of {', '.join(DEFAULTS)}"
            )
        default = DEFAULTS[model_type]
        f.only("hidden_act", "silu")
        f.only("attention_bias", False)
        f.only("mlp_bias", False)
        f.only("pretraining_tp", 1)
        hidden_size = f.positive("hidden_size", 4096)
        heads = f.positive("num_attention_heads", 32)
        config = cls(
            model_type=model_type,
            vocab_size=f.positive("vocab_size", 32000),
            hidden_size=hidden_size,
            intermediate_size=f.positive("intermediate_size", default["intermediate_size"]),
            num_hidden_layers=f.positive("num_hidden_layers", 32),
            num_attention_heads=heads,
            num_key_value_heads=f.positive("num_key_value_heads", default["kv_heads"]) or heads,
            head_dim=f.positive("head_dim", None) or hidden_size // heads,
            max_position_embeddings=f.positive("max_position_embeddings", default["max_position_embeddings"]),
            rms_norm_eps=f.positive_float("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(f),
            sliding_window=_sliding_window(f, default["sliding_window"]) if model_type == "mistral" else None,
            tie_word_embeddings=f.get("tie_word_embeddings", bool, False),
        )
        f.finish()
        if heads % config.num_key_value_heads:
            raise InputError(f"{where}: {heads} query heads do not divide among {config.num_key_value_heads} key heads")
        if config.head_dim % 2:
            raise InputError(f"{where}: head_dim = {config.head_dim}, expected an even number for rotary positions")
        return config


def _rope_theta(f: Fields) -> float:
    """transformers 4 writes rope_theta (and rope_scaling), transformers 5 writes rope_parameters."""
    f.only("rope_scaling", None)
    theta = f.positive_float("rope_theta", 10000.0)
    parameters = f.get("rope_parameters", dict, None)
    if parameters is None:
        return theta
    inner = Fields(parameters, f"{f.where}.rope_parameters")
    inner.only("rope_type", "default")
    theta = inner.positive_float("rope_theta", theta)
    inner.finish()
    return theta


def _sliding_window(f: Fields, default: int) -> int | None:
    """Absent, it is the class default; an explicit null, as most checkpoints have it, is no window."""
    value = f.get("sliding_window", int, None)
    return f.positive("sliding_window", default) if value is not None or "sliding_window" not in f.values else None


class MistralAttention(nn.Module):
    """Grouped-query attention with rotary positions; H query heads share K key heads. The layer applies `o_proj`."""

    def __init__(self, config: MistralConfig, backend: Backend, layer: int):
        super().__init__()
        width, c = config.hidden_size, config.head_dim
        self.head_dim, self.backend, self.layer = c, backend, layer
        self.q_proj = nn.Linear(width, config.num_attention_heads * c, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * c, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * c, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * c, width, bias=False)

    def forward(self, x: Tensor, norm: nn.Module, rope, rows: Rows, seen, cache: KVCache | None) -> Tensor:
        q, k, v = self.backend.norm_linear(x, norm, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(1, (-1, self.head_dim)) for part in (q, k, v))  # [S, H or K, C]
        return self.backend.attention(q, k, v, rope, rows, seen, cache, self.layer)  # [S, H * C]


class MistralMLP(nn.Module):
    """The weights of the gated MLP; the layer below hands them to the backend."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class MistralDecoderLayer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: MistralConfig, backend: Backend, layer: int):
        super().__init__()
        self.backend = backend
        self.self_attn = MistralAttention(config, backend, layer)
        self.mlp = MistralMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, rows: Rows, seen, cache: KVCache | None) -> Tensor:
        heads = self.self_attn(x, self.input_layernorm, rope, rows, seen, cache)  # [S, H * C]
        norm, mlp = self.post_attention_layernorm, self.mlp
        return self.backend.decoder_end(
            x, heads, self.self_attn.o_proj, norm, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        )


class MistralDecoder(nn.Module):
    """The whole decoder. Whole prefill, chunked prefill, decoding and training are one and the same `forward`."""

    def __init__(self, config: MistralConfig, backend: Backend):
        super().__init__()
        self.config, self.backend = config, backend
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MistralDecoderLayer(config, backend, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, embeddings: Tensor, rows: Rows, cache: KVCache | None) -> Tensor:
        """embeddings [S, D] of B packed rows -> hidden states [S, D] after the final norm."""
        config, device = self.config, embeddings.device
        rope = self.backend.rope(rows, config.head_dim, config.rope_theta, embeddings.dtype, device)
        return self.run(embeddings, rope, rows, self.backend.sight(rows, config.sliding_window, device), cache)

    def run(self, x: Tensor, rope, rows: Rows, seen, cache: KVCache | None) -> Tensor:
        """The same from what the backend's `rope` and `sight` say of the rows."""
        for layer in self.layers:
            x = layer(x, rope, rows, seen, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [.., D] -> [.., V] in the model's dtype."""
        return self.lm_head(hidden)

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """An empty cache for this decoder, on its device and in its dtype."""
        config, weight = self.config, self.embed_tokens.weight
        return KVCache(
            config.num_hidden_layers,
            slots,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
            weight.dtype,
            weight.device,
        )
