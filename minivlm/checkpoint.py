"""A Hugging Face folder to a model and back: every parameter filled once, every stored tensor accounted for.

It knows the names that tensors were saved under, not what the model does with them. A folder holds
config.json, generation_config.json and safetensors files (shards.py).

Memory: a tensor that must change its type or device is converted alone and its source dropped, so there is
never a second copy of the weights. A tensor that is right as stored is not copied at all: it stays the mapped
file, whose pages the system may drop and read again.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minivlm.errors import InputError
from minivlm.filling import EMBEDDING, HEAD, STORED_DTYPES, Filling, Unfilled, nbytes
from minivlm.ops import joined
from minivlm.ops.backend import Backend
from minivlm.processor.tokens import read_json
from minivlm.quantisation import STORED, LogitChange, quantise_while_filling
from minivlm.shards import StoredTensor, find_tensors, others, staged, write_json, write_tensors
from minivlm.vlm import VLM, VLMConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 5 * 10**9

# From the names of every published layout to this model's, applied in order:
#   hub             language_model.model.norm  language_model.lm_head  vision_tower.vision_model.embeddings
#   transformers 5  the same, or with `model.` before all, without `vision_model.`, lm_head at the top
#   original LLaVA  model.norm  lm_head  model.mm_projector.0
#                   model.vision_tower.vision_tower.vision_model.embeddings
RENAMES = (
    (r"^model\.", ""),
    (r"^(layers|embed_tokens|norm)\.", r"language_model.\1."),
    (r"^language_model\.model\.", "language_model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^vision_tower\.vision_tower\.", "vision_tower."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)
# Stored tensors that are not parameters, and why nothing is lost without them.
IGNORED = {
    r".*\.embeddings\.position_ids": "the integers 0, 1, 2, ..., which the model does not need to be told",
    r".*\.rotary_emb\.inv_freq": "rotary frequencies, which the model computes from rope_theta",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """The ids that begin and end a text; any of eos_token_ids ends an answer."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None

    @classmethod
    def from_hf(cls, generation: Mapping[str, Any], values: Mapping[str, Any], where: str) -> "GenerationDefaults":
        """From generation_config.json ({} where there is none), else config.json, else bos 1 and eos 2."""
        sources = (generation, values.get("text_config") or {}, values)
        found = {}
        for key, default in (("eos_token_id", 2), ("bos_token_id", 1), ("pad_token_id", None)):
            given = [source[key] for source in sources if source.get(key) is not None]
            found[key] = given[0] if given else default
        eos = found["eos_token_id"]
        eos = tuple(eos) if isinstance(eos, list) else (eos,)
        for key, ids in (("eos_token_id", eos), ("bos_token_id", (found["bos_token_id"],))):
            if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                expected = "an id or a list of ids" if key == "eos_token_id" else "an id"
                raise InputError(f"{where}: {key} = {found[key]!r}, expected {expected}")
        return cls(eos, found["bos_token_id"], found["pad_token_id"])


@dataclass(frozen=True)
class CheckpointInfo:
    """What a folder said besides its weights.

    config_values, generation_values: config.json and generation_config.json ({} if there is none), as read.
    stored_dtype: safetensors' name for the type of the weights.
    ignored: stored tensors that are not parameters, each with the reason.
    not_run: parameters that LLaVA never reaches (the encoder's layers after the tapped one), kept for saving.
    change: what quantising while loading did, None for weights as stored.
    """

    folder: Path
    config_values: dict[str, Any]
    generation_values: dict[str, Any]
    generation: GenerationDefaults
    stored_dtype: str
    ignored: dict[str, str]
    not_run: tuple[str, ...]
    change: LogitChange | None


def read_config(folder: str | Path) -> VLMConfig:
    """The configuration of a folder; InputError where config.json is missing, damaged or not supported."""
    folder = Path(folder)
    return VLMConfig.from_hf(_config_values(folder), str(folder / "config.json"))


def load(
    folder: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | str,
    backend: Backend,
    progress: bool = True,
    weights: str = STORED,
    probe: Sequence[int] = (),
) -> tuple[VLM, CheckpointInfo]:
    """The model of a folder, on `device` in `dtype`, and what else the folder says.

    dtype: float32, float16, bfloat16, or "auto", the checkpoint's own; but on a CPU, where float16 is 20
    times slower, float16 becomes bfloat16 if the processor multiplies that in hardware, else float32.
    progress: a bar on stderr. weights: "stored", or what the decoder's are quantised to, "int8" or "int4"; then probe
    is the ids of a text on which the change is measured. Raises InputError, one line, before anything is converted
    where files or tensors are missing, unexpected, damaged or of another shape or type; and for NaN or infinity in a
    tensor.
    """
    folder, device = Path(folder), torch.device(device)
    values = _config_values(folder)
    config = VLMConfig.from_hf(values, str(folder / "config.json"))
    generation_values = read_json(folder / "generation_config.json")
    generation = GenerationDefaults.from_hf(generation_values, values, str(folder))
    stored = find_tensors(folder)
    layers = config.text.num_hidden_layers + config.vision.num_hidden_layers
    if layers > len(stored):  # a config.json that asks for 10**9 layers would be built for hours before it failed
        raise InputError(f"{folder / 'config.json'}: asks for {layers} layers, the files hold {len(stored)} tensors")
    with torch.device("meta"), Unfilled():
        model = VLM(config, backend)
    sources, ignored = account(model, stored, folder)
    stored_dtype = _most_bytes(sources.values())
    dtype = _choose_dtype(dtype, values, stored_dtype, device, folder)
    not_run = _not_run(model)
    with Filling(sources, device, dtype, f"loading {folder.name}" if progress else None) as fill:
        if weights == STORED:
            fill(model)
            backend.prepare(model)
            change = None
        else:
            change = quantise_while_filling(model, fill, weights, probe)
    return model, CheckpointInfo(folder, values, generation_values, generation, stored_dtype, ignored, not_run, change)


def compute_dtype(folder: Path, dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The type that `load` computes in; for "auto" it reads config.json and the headers of the weights."""
    if dtype != "auto":
        return _choose_dtype(dtype, {}, "", device, folder)
    return _choose_dtype(dtype, _config_values(folder), _most_bytes(find_tensors(folder).values()), device, folder)


def rename(name: str) -> str:
    """The parameter that a stored name means: `model.mm_projector.0.bias` is the bias of `linear_1`."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def published_name(parameter: str) -> str:
    """The name under which a parameter is saved: the hub's, which every version of transformers reads."""
    if parameter != HEAD:
        parameter = re.sub(r"^language_model\.", "language_model.model.", parameter)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", parameter)


def account(
    model: VLM, stored: Mapping[str, StoredTensor], folder: Path
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The stored tensor of every parameter, and the ignored ones with the reason. Reads no values.

    Raises InputError unless every parameter has exactly one tensor of its shape and no tensor is left over.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    sources: dict[str, StoredTensor] = {}
    ignored: dict[str, str] = {}
    unexpected = []
    for tensor in stored.values():
        reasons = [reason for pattern, reason in IGNORED.items() if re.fullmatch(pattern, tensor.name)]
        name = rename(tensor.name)
        if reasons:
            ignored[tensor.name] = reasons[0]
        elif name not in shapes:
            unexpected.append(f"{tensor.name} {list(tensor.shape)} in {tensor.file.name}")
        elif name in sources:
            raise InputError(f"{folder}: {sources[name].name} and {tensor.name} both stand for {name}")
        else:
            sources[name] = tensor
    if model.config.text.tie_word_embeddings:  # one tensor serves both; `_fill` compares where there are two
        for name, twin in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
            if name not in sources and twin in sources:
                sources[name] = sources[twin]
    missing = [f"{published_name(name)} {list(shapes[name])}" for name in shapes if name not in sources]
    if missing or unexpected:
        parts = [f"no tensor for {missing[0]}{others(missing)}"] if missing else []
        parts += [f"unexpected tensor {unexpected[0]}{others(unexpected)}"] if unexpected else []
        raise InputError(f"{folder}: {'; '.join(parts)}")
    if wrong := [name for name, tensor in sources.items() if tensor.shape != shapes[name]]:
        tensor, shape = sources[wrong[0]], list(shapes[wrong[0]])
        found = f"{tensor.name} has shape {list(tensor.shape)}"
        raise InputError(f"{tensor.file}: {found}, config.json asks for {shape}{others(wrong)}")
    if odd := [tensor for tensor in sources.values() if tensor.dtype not in STORED_DTYPES]:
        expected = f"expected {', '.join(STORED_DTYPES)}; quantised weights are not supported"
        raise InputError(f"{odd[0].file}: {odd[0].name} is {odd[0].dtype}{others(odd)}, {expected}")
    return sources, ignored


def save(
    model: VLM,
    folder: str | Path,
    config_values: Mapping[str, Any] | None = None,
    generation_values: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json and the weights, in the model's dtype, for transformers.

    config_values, generation_values: what `CheckpointInfo` kept, written back unchanged but for the dtype.
    Without them config.json is made from the model's configuration and no generation_config.json is written.
    Weights that the backend packed are unpacked, one shard at a time.
    All files appear together or, with an InputError, none does. Weights that were quantised cannot be saved.
    """
    dtype = model.language_model.embed_tokens.weight.dtype
    named = [name for name, value in DTYPES.items() if value == dtype]
    if not named:
        raise InputError(f"the model is {dtype}, expected one of {', '.join(DTYPES)} to save it")
    if joined.quantised(model):
        raise InputError("the model's weights were quantised while loading, expected weights as stored to save it")
    if config_values is None:
        config_values = to_hf(model.config)
    elif VLMConfig.from_hf(config_values, "config_values") != model.config:
        raise InputError("config_values: differ from the configuration of the model to be saved")
    # Versions 4.56 and later prefer `dtype`; all of them read `torch_dtype`.
    config_values = {key: value for key, value in config_values.items() if key != "dtype"}
    config_values["torch_dtype"] = named[0]
    with staged(Path(folder)) as part:
        write_json(part / "config.json", config_values)
        if generation_values:
            write_json(part / "generation_config.json", generation_values)
        # A tied head is the embedding itself, and `joined.weights` names it once.
        write_tensors(part, ((published_name(name), tensor) for name, tensor in joined.weights(model)), shard_bytes)


def to_hf(config: VLMConfig) -> dict[str, Any]:
    """config.json for a model that was made here, in the spelling that transformers 4 and 5 both read."""
    anyres, layers = config.image_grid_pinpoints is not None, config.vision_feature_layers
    text = {"hidden_act": "silu", **asdict(config.text)}
    if config.text.model_type == "llama":  # has no such key
        del text["sliding_window"]
    values = {
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "image_token_index": config.image_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", **asdict(config.vision)},
    }
    if config.image_grid_pinpoints is not None:
        values["image_grid_pinpoints"] = [list(size) for size in config.image_grid_pinpoints]
    return values


def _config_values(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        found = "no config.json" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {found}, expected the folder of a checkpoint")
    values = read_json(path)
    if "mm_vision_tower" in values:
        raise InputError(
            f"{path}: written by the original LLaVA code (it has mm_vision_tower), "
            "expected Hugging Face's form: model_type 'llava' or 'llava_next', text_config, vision_config"
        )
    if "quantization_config" in values:
        raise InputError(f"{path}: has a quantization_config; quantised weights are not supported")
    return values


def _choose_dtype(
    dtype: torch.dtype | str,
    values: Mapping[str, Any],
    stored_dtype: str,
    device: torch.device,
    folder: Path,
) -> torch.dtype:
    """The type to compute in, as `load` says; config.json's top level goes before the tensors' own type."""
    if dtype in DTYPES.values():
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}, expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    named = values.get("dtype") or values.get("torch_dtype")
    if named not in (None, *DTYPES):
        raise InputError(f"{folder / 'config.json'}: dtype = {named!r}, expected one of {', '.join(DTYPES)}")
    own = STORED_DTYPES[stored_dtype] if named is None else DTYPES[named]
    if device.type == "cpu" and own == torch.float16:
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return own


def _most_bytes(tensors: Iterable[StoredTensor]) -> str:
    """The stored type that holds most of the weights."""
    totals = dict.fromkeys(STORED_DTYPES, 0)
    for tensor in tensors:
        if tensor.dtype in totals:  # the others are ignored, or refused by `account`
            totals[tensor.dtype] += nbytes(tensor)
    return max(totals, key=lambda name: totals[name])


def _not_run(model: VLM) -> tuple[str, ...]:
    deepest, layers = max(model.config.depths), model.config.vision.num_hidden_layers
    prefixes = [f"vision_tower.encoder.layers.{i}." for i in range(deepest, layers)]
    prefixes.append("vision_tower.post_layernorm.")
    return tuple(name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes)))
