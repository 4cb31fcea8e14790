"""The whole model on one screen: vision tower, projector, packing, merge, decoder (Liu et al. 2024, LLaVA-NeXT).

    tiles [N,3,T,T] -> vision_tower -> [N,1+P,Dv] -> without the class token [N,P,Dv] -> projector -> [N,P,D]
                    -> pack -> image tokens [I,D]
    ids [S] -> embed_tokens -> [S,D] -> merge <- image tokens;  embeddings [S,D] -> language_model -> logits [S,V]

It knows nothing of files, text or generation. Every module is trainable; nothing here switches gradients off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.connector.mlp import MLPProjector
from minivlm.decoder.mistral import MistralConfig, MistralDecoder
from minivlm.errors import InputError
from minivlm.fields import Fields
from minivlm.merge import merge
from minivlm.ops.activations import ACTIVATIONS
from minivlm.ops.backend import Backend
from minivlm.ops.rows import Rows
from minivlm.processor import Inputs
from minivlm.processor.anyres import check_pinpoints, pack_image_features
from minivlm.vision.clip import CLIPVisionConfig, CLIPVisionModel

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # LlavaNextConfig's class default
# What LlavaConfig and LlavaNextConfig assume where config.json has no vision_config: CLIP ViT-L/14 at 336 pixels.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class VLMConfig:
    """A LLaVA-1.5 (`image_grid_pinpoints` is None) or LLaVA-NeXT configuration."""

    vision: CLIPVisionConfig
    text: MistralConfig
    image_token_id: int
    vision_feature_layers: tuple[int, ...]  # as published: -2 counts from the end
    vision_feature_select_strategy: str  # "default" drops the class token, "full" keeps it
    projector_hidden_act: str
    multimodal_projector_bias: bool
    image_grid_pinpoints: tuple[tuple[int, int], ...] | None  # (height, width) of every grid that tiles may form

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str) -> "VLMConfig":
        """From a whole config.json; absent keys take the Hugging Face class defaults."""
        f = Fields(values, where)
        model_type = f.get("model_type", str, None)
        if model_type not in ("llava", "llava_next"):
            raise InputError(f"{where}: model_type = {model_type!r} is not supported, expected 'llava' or 'llava_next'")
        f.only("use_image_newline_parameter", True)
        f.read |= {"vocab_size", "vision_feature_layer"}  # the text config's, and read below
        text_values = dict(f.get("text_config", dict, None) or {})
        if f.get("tie_word_embeddings", bool, False):
            text_values["tie_word_embeddings"] = True
        vision = f.get("vision_config", dict, None)
        anyres = model_type == "llava_next"
        config = cls(
            vision=CLIPVisionConfig.from_hf(CLIP_L_336 if vision is None else vision, f"{where}: vision_config"),
            text=MistralConfig.from_hf(text_values, f"{where}: text_config"),
            image_token_id=f.get("image_token_index", int, f.get("image_token_id", int, 32000)),
            vision_feature_layers=_feature_layers(values.get("vision_feature_layer", -2), where),
            vision_feature_select_strategy=f.get("vision_feature_select_strategy", str, "default"),
            projector_hidden_act=f.get("projector_hidden_act", str, "gelu"),
            multimodal_projector_bias=f.get("multimodal_projector_bias", bool, True),
            image_grid_pinpoints=_pinpoints(f, where) if anyres else None,
        )
        f.finish()
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Refuse combinations that no published model has and whose result would be undefined."""
        if (found := self.vision_feature_select_strategy) not in ("default", "full"):
            raise InputError(f"{where}: vision_feature_select_strategy = {found!r}, expected 'default' or 'full'")
        if self.image_grid_pinpoints is not None:
            try:
                check_pinpoints(self.image_grid_pinpoints, self.vision.image_size)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            if self.vision_feature_select_strategy == "full":
                raise InputError(
                    f"{where}: strategy 'full' keeps the class token, which has no place in a grid of tiles"
                )
        if self.projector_hidden_act not in ACTIVATIONS:
            raise InputError(f"{where}: projector_hidden_act = {self.projector_hidden_act!r} is not supported")
        if not 0 <= self.image_token_id < self.text.vocab_size:
            rows = self.text.vocab_size
            raise InputError(f"{where}: image_token_index = {self.image_token_id}, but the vocabulary has {rows} rows")
        layers = self.vision.num_hidden_layers
        for layer in self.vision_feature_layers:
            if not -layers - 1 <= layer <= layers:
                raise InputError(f"{where}: vision_feature_layer = {layer}, but the encoder has {layers} layers")

    @property
    def depths(self) -> tuple[int, ...]:
        """The feature layers as numbers of encoder layers to run: of 24, layer -2 is the state after 23."""
        states = self.vision.num_hidden_layers + 1
        return tuple(layer % states for layer in self.vision_feature_layers)


def _feature_layers(value: Any, where: str) -> tuple[int, ...]:
    layers = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not layers or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise InputError(f"{where}: vision_feature_layer = {value!r}, expected an integer or a list of integers")
    return layers


def _pinpoints(f: Fields, where: str) -> tuple[tuple[int, int], ...]:
    value = f.get("image_grid_pinpoints", list, None)
    value = PINPOINTS if value is None else value
    ok = value and all(
        isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(n, int) for n in p) for p in value
    )
    if not ok:
        raise InputError(f"{where}: image_grid_pinpoints = {value!r}, expected a list of [height, width]")
    return tuple((height, width) for height, width in value)


class VLM(nn.Module):
    """LLaVA-1.5 or LLaVA-NeXT. Parameter names are the published checkpoint's but for two prefixes.

    `language_model.model.layers` is `language_model.layers` here (so are `embed_tokens` and `norm`), and
    `vision_tower.vision_model.encoder` is `vision_tower.encoder` (checkpoint.py, RENAMES).
    """

    def __init__(self, config: VLMConfig, backend: Backend):
        super().__init__()
        self.config = config
        width = config.text.hidden_size
        self.vision_tower = CLIPVisionModel(config.vision, backend)
        self.multi_modal_projector = MLPProjector(
            config.vision.hidden_size * len(config.depths),
            width,
            config.projector_hidden_act,
            config.multimodal_projector_bias,
        )
        if config.image_grid_pinpoints is not None:
            self.image_newline = nn.Parameter(torch.empty(width).normal_(std=width**-0.5))
        self.language_model = MistralDecoder(config.text, backend)

    def forward(self, inputs: Sequence[Inputs]) -> Tensor:
        """The logits [S, V] of every position of B packed prompts, without a cache."""
        rows = Rows.causal([len(row.ids) for row in inputs])
        return self.language_model.logits(self.language_model(self.embed(inputs), rows, None))

    def embed(self, inputs: Sequence[Inputs]) -> Tensor:
        """The decoder's input embeddings [S, D] of B packed prompts, image tokens in their places."""
        device = self.language_model.embed_tokens.weight.device
        ids = [token for row in inputs for token in row.ids]
        pictures = [size for row in inputs for size in row.image_sizes]
        if not pictures:
            return self.embed_ids(ids, ())
        tiles = torch.cat([row.tiles for row in inputs]).to(device)  # [N, 3, T, T]
        counts = [count for row in inputs for count in row.tile_counts]
        return self.embed_ids(ids, self.encode_images(tiles, pictures, counts))

    def embed_ids(self, ids: Sequence[int], image_tokens: Sequence[Tensor]) -> Tensor:
        """The input embeddings [S, D] of packed ids [S], the image tokens [I, D] of each picture in their places."""
        packed = torch.tensor(ids, device=self.language_model.embed_tokens.weight.device)  # [S]
        embeddings = self.language_model.embed_tokens(packed)  # [S, D]
        tokens = torch.cat(list(image_tokens)) if image_tokens else embeddings[:0]
        return merge(embeddings, packed, tokens, self.config.image_token_id)

    def encode_images(
        self, tiles: Tensor, image_sizes: Sequence[tuple[int, int]], tile_counts: Sequence[int]
    ) -> list[Tensor]:
        """The image tokens [I, D] of each picture.

        tiles [N, 3, T, T]: all pictures' tiles in reading order; image_sizes: original (height, width) of each;
        tile_counts: tiles of each picture, N in all.
        """
        return self.pack_images(self.encode_tiles(tiles), image_sizes, tile_counts)

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """tiles [N, 3, T, T] -> features of the decoder's width [N, P, D]; tiles do not see one another."""
        states = self.vision_tower(tiles, self.config.depths)  # of each feature layer [N, 1 + P, Dv]
        features = torch.cat(states, dim=-1)
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # [N, P, Dv], times the number of feature layers
        if self.config.image_grid_pinpoints is None and len(states) > 1:
            # Strides choose the kernel of the linear layer that follows, and so its rounding in 16 bits. Where
            # several layers are tapped, transformers' LLaVA-1.5 slices first and LLaVA-NeXT joins first.
            features = features.contiguous()
        return self.multi_modal_projector(features)  # [N, P, D]

    def pack_images(
        self, features: Tensor, image_sizes: Sequence[tuple[int, int]], tile_counts: Sequence[int]
    ) -> list[Tensor]:
        """The image tokens [I, D] of each picture from the features [N, P, D] of all pictures' tiles."""
        by_picture = features.split(list(tile_counts))
        if self.config.image_grid_pinpoints is None:  # LLaVA-1.5: one tile is the whole picture
            return [base for (base,) in by_picture]
        vision, pinpoints = self.config.vision, self.config.image_grid_pinpoints
        return [
            pack_image_features(picture, self.image_newline, size, pinpoints, vision.image_size, vision.patch_size)
            for picture, size in zip(by_picture, image_sizes, strict=True)
        ]
