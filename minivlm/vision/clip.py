"""CLIP's vision transformer: tiles to patch features (Radford et al. 2021; Dosovitskiy et al. 2021, eq. 1-4).

It knows nothing of text, of pictures larger than a tile, or of which of its features a connector wants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.fields import Fields
from minivlm.ops.activations import ACTIVATIONS
from minivlm.ops.backend import Backend


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The sizes of a CLIP vision tower; the field names are `config.json`'s."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str) -> "CLIPVisionConfig":
        """From the `vision_config` object of a config.json; absent keys take CLIPVisionConfig's class defaults."""
        f = Fields(values, where)
        f.only("model_type", "clip_vision_model")
        f.only("num_channels", 3)
        f.read.add("vocab_size")  # belongs to CLIP's text half; written into LLaVA's vision_config, used by nothing
        config = cls(
            hidden_size=f.positive("hidden_size", 768),
            intermediate_size=f.positive("intermediate_size", 3072),
            num_hidden_layers=f.positive("num_hidden_layers", 12),
            num_attention_heads=f.positive("num_attention_heads", 12),
            image_size=f.positive("image_size", 224),
            patch_size=f.positive("patch_size", 32),
            hidden_act=f.get("hidden_act", str, "quick_gelu"),
            layer_norm_eps=f.positive_float("layer_norm_eps", 1e-5),
        )
        f.finish()
        if config.hidden_act not in ACTIVATIONS:
            raise InputError(f"{where}: hidden_act = {config.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}")
        if config.hidden_size % config.num_attention_heads:
            raise InputError(
                f"{where}: hidden_size {config.hidden_size} does not divide by {config.num_attention_heads} heads"
            )
        if config.image_size % config.patch_size:
            raise InputError(
                f"{where}: image_size {config.image_size} does not divide by patch_size {config.patch_size}"
            )
        return config

    @property
    def grid(self) -> int:
        """Patches along each side of a tile: 336 / 14 = 24."""
        return self.image_size // self.patch_size


class CLIPVisionEmbeddings(nn.Module):
    """Patches to vectors, a class token in front, learned positions added."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width).normal_(std=width**-0.5))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.grid**2 + 1, width)

    def forward(self, tiles: Tensor) -> Tensor:
        """tiles [N, 3, T, T] of any float dtype -> [N, 1 + P, Dv]."""
        patches = self.patch_embedding(tiles.to(self.patch_embedding.weight.dtype))  # [N, Dv, T/patch, T/patch]
        patches = rearrange(patches, "n d h w -> n (h w) d")  # [N, P, Dv]
        classes = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat((classes, patches), dim=1) + self.position_embedding.weight


class CLIPAttention(nn.Module):
    """Multi-head attention among the patches of one tile. The layer applies `out_proj`."""

    def __init__(self, config: CLIPVisionConfig, backend: Backend):
        super().__init__()
        width = config.hidden_size
        self.heads, self.backend = config.num_attention_heads, backend
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        q, k, v = self.backend.norm_linear(x, norm, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rearrange(part, "n p (h c) -> n h p c", h=self.heads) for part in (q, k, v))  # [N, H, 1 + P, C]
        out = self.backend.vision_attention(q, k, v)
        return rearrange(out, "n h p c -> n p (h c)")  # [N, P, Dv]


class CLIPMLP(nn.Module):
    """The weights around the configured activation (CLIP's is quick_gelu, not GELU); the layer hands them on."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)


class CLIPEncoderLayer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: CLIPVisionConfig, backend: Backend):
        super().__init__()
        self.backend = backend
        self.self_attn = CLIPAttention(config, backend)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        heads, mlp = self.self_attn(x, self.layer_norm1), self.mlp
        output, norm = self.self_attn.out_proj, self.layer_norm2
        return self.backend.encoder_end(x, heads, output, norm, mlp.fc1, mlp.activation, mlp.fc2)


class CLIPEncoder(nn.Module):
    """The stack of layers; a module of its own because the checkpoint's names say `encoder.layers`."""

    def __init__(self, config: CLIPVisionConfig, backend: Backend):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config, backend) for _ in range(config.num_hidden_layers))


class CLIPVisionModel(nn.Module):
    """The vision tower of LLaVA. `post_layernorm` is in every checkpoint and never runs: LLaVA taps an inner layer."""

    def __init__(self, config: CLIPVisionConfig, backend: Backend):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the checkpoint's spelling
        self.encoder = CLIPEncoder(config, backend)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tiles: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """The hidden states [N, 1 + P, Dv] after each of the given numbers of layers; deeper layers do not run.

        depths: 0 is the output of `pre_layrnorm`, L that of the last layer. Position 0 is the class token.
        LLaVA's feature layer -2 of 24 layers is depth 23: layer 24 is skipped.
        """
        x = self.pre_layrnorm(self.embeddings(tiles))
        states = [x]
        for layer in self.encoder.layers[: max(depths)]:
            x = layer(x)
            states.append(x)
        return [states[depth] for depth in depths]
