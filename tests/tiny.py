"""Tiny random checkpoints that transformers wrote, with tokenizer and processor: the models of the tests.

The weights are spread so that logits differ clearly (transformers' own initialisation gives near ties), and
the vocabulary has more rows than the tokenizer has tokens, as in the published checkpoints.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from tokenizers import decoders, models, normalizers, processors

from minivlm.processor.prompts import TEMPLATES

TILE, PATCH = 12, 4  # a tile has 3 x 3 patches; a picture of LLaVA-NeXT has 9 + 12 to 9 + 42 image tokens
PINPOINTS = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
SPARE_ROWS = 7  # rows of the vocabulary that have no token
TEXT = "the cat is red what colour is it a picture of two blue shapes [INST] [/INST] USER: ASSISTANT:"
FORMATS = {"next-mistral": "mistral_instruct", "next-llama": "vicuna_v1", "llava": "vicuna_v1"}
MODELS = {
    "next-mistral": (transformers.LlavaNextForConditionalGeneration, transformers.LlavaNextConfig),
    "next-llama": (transformers.LlavaNextForConditionalGeneration, transformers.LlavaNextConfig),
    "llava": (transformers.LlavaForConditionalGeneration, transformers.LlavaConfig),
}


def make_tiny(
    folder: Path,
    kind: str = "next-mistral",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    text: Mapping[str, Any] = {},
    vision: Mapping[str, Any] = {},
    config: Mapping[str, Any] = {},
) -> Path:
    """Write a checkpoint of this kind ("next-mistral", "next-llama" or "llava"); returns the folder.

    text, vision, config: keys of text_config, vision_config and config.json that replace the tiny ones.
    """
    tokenizer = make_tokenizer()
    model_class, config_class = MODELS[kind]
    whole = config_class(**model_values(kind, tokenizer.get_vocab_size(), text, vision, config))
    torch.manual_seed(seed)
    model = spread(model_class(whole)).to(dtype)
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = 2, 1
    model.save_pretrained(folder)
    make_processor(kind, tokenizer, whole).save_pretrained(folder)
    return Path(folder)


def model_values(kind: str, tokens: int, text: Mapping, vision: Mapping, config: Mapping) -> dict[str, Any]:
    """The values of a tiny configuration, in the order: tiny ones, then the caller's."""
    text_values = {
        "model_type": "mistral" if kind == "next-mistral" else "llama",
        "vocab_size": tokens + SPARE_ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 400,
        "rms_norm_eps": 1e-5,
    }
    if kind == "next-mistral":
        text_values["sliding_window"] = None
    vision_values = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": TILE,
        "patch_size": PATCH,
    }
    values: dict[str, Any] = {
        "text_config": {**text_values, **text},
        "vision_config": {**vision_values, **vision},
        "image_token_index": tokens - 2,
        **config,
    }
    if kind != "llava":
        values = {"image_grid_pinpoints": PINPOINTS, **values}
    return values


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Redraw every weight so that all parts matter and logits have a standard deviation of about 3."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" in name or "newline" in name:
                parameter.normal_(0, 1.0)
            else:
                parameter.normal_(0, (3.0 if "lm_head" in name else 1.2) * parameter[0].numel() ** -0.5)
    return model


def make_tokenizer() -> tokenizers.Tokenizer:
    """A byte-fallback BPE of Llama's form: <unk> <s> </s>, bytes, characters, merges, <image>, <pad>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)]
    merges = []
    for word in TEXT.split():
        joined = "▁"
        for character in word:
            if joined + character not in pieces:
                merges.append((joined, character))
                pieces.append(joined + character)
            joined += character
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [tokenizers.AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(n, normalized=False, special=True) for n in ("<image>", "<pad>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tokenizer


def make_processor(kind: str, tokenizer: tokenizers.Tokenizer, config: Any) -> Any:
    """transformers' processor with its PIL image processor, at the tiny tile size."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    size = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    if kind == "llava":
        images, processor = transformers.CLIPImageProcessorPil(**size), transformers.LlavaProcessor
    else:
        images = transformers.LlavaNextImageProcessorPil(**size, image_grid_pinpoints=config.image_grid_pinpoints)
        processor = transformers.LlavaNextProcessor
    return processor(
        image_processor=images,
        tokenizer=fast,
        patch_size=patch,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATES[FORMATS[kind]],
    )


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of coloured noise: [height, width] pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
