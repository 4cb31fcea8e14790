"""`minivlm train`: the stages of the recipe one after the other, from nothing to a checkpoint folder.

Stages: the encoder learns to see (encoder.py); the decoder learns to answer questions about what it sees, through a
projector of the moment; then LLaVA's two: a new projector alone, then projector and decoder (dialogues.py).
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minivlm.checkpoint import save
from minivlm.decoder.mistral import MistralAttention
from minivlm.errors import InputError
from minivlm.ops.backend import REFERENCE, SDPA
from minivlm.processor import Processor
from minivlm.processor.anyres import VisionGeometry
from minivlm.processor.pixels import ImageConfig
from minivlm.processor.prompts import TEMPLATES
from minivlm.processor.tokens import Tokenizer
from minivlm.train import recipe
from minivlm.train.dialogues import Dialogues, DialogueStage
from minivlm.train.encoder import EncoderStage, PatchHeads
from minivlm.train.loop import Stage, run_stage
from minivlm.train.state import Progress, alone, is_unused, load_modules, read_progress, save_state, truncate_log
from minivlm.train.tokenizer import IMAGE, PAD, build_tokenizer
from minivlm.vlm import VLM, VLMConfig

# Forward and backward over the 65 tokens of a tile take 1.5 times as long with the fused attention (on a CPU).
BACKEND = replace(SDPA, vision_attention=REFERENCE.vision_attention)


def new_processor() -> Processor:
    """The processor of minivlm-tiny around a tokenizer built for it."""
    pinpoints = tuple((height, width) for height, width in recipe.CONFIG["image_grid_pinpoints"])
    return Processor(
        tokenizer=Tokenizer(build_tokenizer(), image_token=IMAGE, pad_token=PAD),
        image_config=ImageConfig(tile=recipe.TILE, image_grid_pinpoints=pinpoints, resize=recipe.TILE),
        geometry=VisionGeometry(recipe.TILE, recipe.PATCH, pinpoints),
        chat_template=TEMPLATES["mistral_instruct"],
    )


def config_values(processor: Processor) -> dict[str, Any]:
    """The config.json of minivlm-tiny: the recipe's with the tokenizer's numbers."""
    tokenizer, values = processor.tokenizer, dict(recipe.CONFIG)
    text = dict(values["text_config"], vocab_size=tokenizer.backend.get_vocab_size())
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return values | {"text_config": text, "image_token_index": tokenizer.image_token_id}


def new_modules(processor: Processor) -> nn.ModuleDict:
    """The untrained model and the encoder's temporary heads, initialised from the recipe's seed."""
    torch.manual_seed(recipe.SEED)
    vlm = VLM(VLMConfig.from_hf(config_values(processor), "recipe"), BACKEND)
    for module in vlm.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, MistralAttention):
            begin_by_matching(module)
    return nn.ModuleDict({"vlm": vlm, "heads": PatchHeads(vlm.config.vision.hidden_size)})


def begin_by_matching(attention: MistralAttention) -> None:
    """Set the query weights to the keys': at first a token attends to those like it, at any distance.

    Most answers are look-ups: "circle" in the question must find the circle among the image tokens. Query and key
    weights whose product is near the identity do so before any training, and small transformers with little data learn
    much faster from there (mimetic initialisation, Trockman and Kolter 2023, arXiv:2305.09828).
    """
    keys = attention.k_proj.weight.detach().unflatten(0, (-1, attention.head_dim))  # [K, C, D]
    groups = attention.q_proj.out_features // attention.k_proj.out_features
    with torch.no_grad():
        attention.q_proj.weight.copy_(keys.repeat_interleave(groups, 0).flatten(0, 1))  # query head h reads key h // G


def renew(modules: nn.ModuleDict, prefixes: tuple[str, ...], processor: Processor) -> None:
    """Give the parameters under these prefixes their untrained values again."""
    untrained = dict(new_modules(processor).named_parameters())
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            if name.startswith(prefixes):
                parameter.copy_(untrained[name])


def task_of(stage: Stage, working: nn.ModuleDict, processor: Processor) -> EncoderStage | DialogueStage:
    """What a stage trains on; stages of dialogues begin at scenes of their own."""
    if stage.name in ("encoder", "places"):
        tower, heads, in_tile = working["vlm"].vision_tower, working["heads"], stage.name == "places"
        return EncoderStage(tower, heads, processor.image_config, recipe.PATCH, stage.batch, recipe.SEED, in_tile)
    first = recipe.FIRST_SCENE[stage.name]
    dialogues = Dialogues(processor, recipe.SEED, stage.batch, first)
    return DialogueStage(working["vlm"], dialogues)


def standing(folder: Path, stages: tuple[Stage, ...]) -> Progress | None:
    """Where the run of these stages in `folder` stands; None where one can begin: in a new folder or an empty one.

    Raises InputError for a folder that holds something else, which a run would write over.
    """
    progress = read_progress(folder)
    if progress is None:
        if not is_unused(folder):
            raise InputError(f"{folder}: holds no training run, and is not an empty folder to begin one in")
        return None
    names = [stage.name for stage in stages]
    at = names.index(progress.stage) if progress.stage in names else -1
    if at < 0 or progress.recipe != recipe.fingerprint(stages[: at + 1]) or progress.step > stages[at].steps:
        raise InputError(f"{folder}: holds a run of another recipe; name another folder or delete this one")
    return progress


def train(folder: Path, stages: tuple[Stage, ...], device: str, workers: int, save_seconds: float) -> Path:
    """Run or resume the stages in `folder`; returns the finished checkpoint's folder, `folder / "checkpoint"`."""
    standing(folder, stages)  # before anything is made in the folder
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        return _train(folder, stages, device, workers, save_seconds)


def _train(folder: Path, stages: tuple[Stage, ...], device: str, workers: int, save_seconds: float) -> Path:
    progress = standing(folder, stages)
    processor = new_processor()
    modules = new_modules(processor).to(device)
    if progress is None:
        progress = Progress(recipe.fingerprint(stages[:1]), stages[0].name, 0)
        save_state(folder, progress, modules, [])  # from here on the folder is known as a run's
    else:
        load_modules(folder, modules)
    names = [stage.name for stage in stages]
    at = names.index(progress.stage)
    truncate_log(folder, lambda stage, step: (names.index(stage), step) <= (at, progress.step))
    working = copy.deepcopy(modules).to(torch.bfloat16)
    for i, stage in enumerate(stages[at:], at):
        first = progress.step if i == at else 0
        if first < stage.steps:
            if stage.renews and first == 0:
                renew(modules, stage.renews, processor)
            task = task_of(stage, working, processor)
            fingerprint = recipe.fingerprint(stages[: i + 1])
            run_stage(stage, first, fingerprint, folder, modules, working, task, save_seconds, workers)
    checkpoint = folder / "checkpoint"
    write_checkpoint(checkpoint, modules, processor)
    return checkpoint


def write_checkpoint(folder: Path, modules: nn.ModuleDict, processor: Processor) -> None:
    """Write the model in bfloat16, as it was trained to run, with its processor: what transformers and `load` read."""
    vlm = copy.deepcopy(modules["vlm"]).to(device="cpu", dtype=torch.bfloat16)
    tokenizer = processor.tokenizer
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    generation["pad_token_id"] = tokenizer.pad_token_id
    save(vlm, folder, config_values(processor), generation)
    processor.save(folder)
