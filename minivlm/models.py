"""Published models as data: parts, context, prompt format.

A checkpoint's own chat template goes before anything here. Where a folder has none, the prompt format is that
of the published model with the same structure; names and paths of folders are never looked at.
"""

from dataclasses import dataclass

from minivlm.vlm import VLMConfig

SHIPPED = "minivlm-tiny"  # the folder in weights/ that is used when no model is named
SAMPLE_PICTURE, SAMPLE_QUESTION = "sample.png", "Describe the picture."  # a file of that folder; what is asked of it


@dataclass(frozen=True)
class Structure:
    """What tells published configurations apart. anyres: LLaVA-NeXT's tiles, else LLaVA-1.5's single one."""

    anyres: bool
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float
    sliding_window: int | None = None

    @classmethod
    def of(cls, config: VLMConfig) -> "Structure":
        """The structure of a configuration."""
        text = config.text
        return cls(
            anyres=config.image_grid_pinpoints is not None,
            model_type=text.model_type,
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            num_key_value_heads=text.num_key_value_heads,
            vocab_size=text.vocab_size,
            rope_theta=text.rope_theta,
            sliding_window=text.sliding_window,
        )


@dataclass(frozen=True)
class Published:
    """One published checkpoint.

    hub_id: where it is. decoder: what its language model was made from. context: positions it was trained
    for. prompt_format: a key of `processor.prompts.TEMPLATES`. stop: tokens that end an answer, besides the
    checkpoint's end-of-text ids.
    """

    hub_id: str
    decoder: str
    context: int
    prompt_format: str
    structure: Structure
    stop: tuple[str, ...] = ()


# All share CLIP ViT-L/14 at 336 pixels, tapped after layer 23 of 24, and a two-layer projector with GELU.
PUBLISHED = (
    Published(
        hub_id="llava-hf/llava-v1.6-mistral-7b-hf",
        decoder="Mistral-7B-Instruct-v0.2",
        context=32768,
        prompt_format="mistral_instruct",
        structure=Structure(True, "mistral", 4096, 32, 8, 32064, 1e6),
    ),
    Published(
        hub_id="llava-hf/llava-v1.6-vicuna-7b-hf",
        decoder="Vicuna-7B-v1.5",
        context=4096,
        prompt_format="vicuna_v1",
        structure=Structure(True, "llama", 4096, 32, 32, 32064, 1e4),
    ),
    Published(
        hub_id="llava-hf/llava-v1.6-vicuna-13b-hf",
        decoder="Vicuna-13B-v1.5",
        context=4096,
        prompt_format="vicuna_v1",
        structure=Structure(True, "llama", 5120, 40, 40, 32064, 1e4),
    ),
    Published(
        hub_id="llava-hf/llava-v1.6-34b-hf",
        decoder="Nous-Hermes-2-Yi-34B",
        context=4096,
        prompt_format="chatml_direct",
        structure=Structure(True, "llama", 7168, 60, 8, 64064, 5e6),
        stop=("<|im_end|>",),
    ),
    Published(
        hub_id="llava-hf/llava-1.5-7b-hf",
        decoder="Vicuna-7B-v1.5",
        context=4096,
        prompt_format="vicuna_v1",
        structure=Structure(False, "llama", 4096, 32, 32, 32064, 1e4),
    ),
    Published(
        hub_id="llava-hf/llava-1.5-13b-hf",
        decoder="Vicuna-13B-v1.5",
        context=4096,
        prompt_format="vicuna_v1",
        structure=Structure(False, "llama", 5120, 40, 40, 32064, 1e4),
    ),
    Published(
        hub_id="llava-hf/bakLlava-v1-hf",
        decoder="Mistral-7B-v0.1",
        context=32768,
        prompt_format="bakllava",
        structure=Structure(False, "mistral", 4096, 32, 8, 32064, 1e4, sliding_window=4096),
    ),
)


def recipe_for(config: VLMConfig) -> Published | None:
    """The published model of this configuration's structure (no two share one), or None."""
    return {published.structure: published for published in PUBLISHED}.get(Structure.of(config))
