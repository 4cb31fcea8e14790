"""What `minivlm train` makes: the sizes of minivlm-tiny and the stages that train it, as data."""

import json
from dataclasses import replace
from hashlib import sha256

from minivlm.train.loop import Stage

SEED = 0
TILE, PATCH = 96, 12

# A Hugging Face config.json without the vocabulary, whose size the tokenizer decides.
CONFIG = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_grid_pinpoints": [[96, 96], [96, 192], [192, 96], [192, 192]],
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": True,
    "use_image_newline_parameter": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": 192,
        "image_size": TILE,
        "intermediate_size": 768,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": 3,
        "num_channels": 3,
        "num_hidden_layers": 5,
        "patch_size": PATCH,
        "projection_dim": 192,
    },
    "text_config": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 768,
        "max_position_embeddings": 2048,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
}

ENCODER = Stage("encoder", ("vlm.vision_tower.", "heads."), steps=2000, batch=128, lr=2e-3, warmup=100)
PLACES = Stage("places", ENCODER.trains, steps=1500, batch=128, lr=2e-3, warmup=50)
_PROJECTOR = ("vlm.multi_modal_projector.", "vlm.image_newline")
_ALL = (*_PROJECTOR, "vlm.language_model.")
DECODER = Stage("decoder", _ALL, steps=500, batch=24, lr=2e-3, warmup=50)
PROJECTOR = Stage("projector", _PROJECTOR, steps=150, batch=24, lr=2e-3, warmup=20, renews=_PROJECTOR)
TUNE = Stage("tune", _ALL, steps=1800, batch=24, lr=2e-3, warmup=50)
STAGES = (ENCODER, PLACES, DECODER, PROJECTOR, TUNE)
# For a look at the machinery: every part runs and nothing is learned.
SMALL_STAGES = tuple(replace(stage, steps=4, batch=2, warmup=1) for stage in STAGES)
FIRST_SCENE = {"decoder": 0, "projector": 1_000_000, "tune": 2_000_000}  # no stage sees another's pictures


def fingerprint(stages: tuple[Stage, ...]) -> str:
    """Names a configuration and the stages so far, so that a run is never resumed under another recipe."""
    text = json.dumps([SEED, CONFIG, [repr(stage) for stage in stages]], sort_keys=True)
    return sha256(text.encode()).hexdigest()[:16]
