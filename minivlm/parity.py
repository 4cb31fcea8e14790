"""Runs transformers and minivlm on the same picture and question and compares them stage by stage.

The models do not know of it: it looks inside through forward hooks of its own. At most one of the two is in
memory at a time; what is kept are copies of its stages on the CPU (of a 7B model in bfloat16 with 2,900 ids
1.2 GB for each). transformers is imported when it is needed, and nothing else of the package needs it.
"""

import gc
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from minivlm import hub
from minivlm.errors import InputError
from minivlm.pipeline import Pipeline, load
from minivlm.processor import Inputs
from minivlm.processor.images import ImageSource, load_image
from minivlm.processor.prompts import question_to_messages
from minivlm.stages import GREEDY_LOGITS, GREEDY_TOKENS, Report, Stages, compare, relative_differences
from minivlm.vlm import VLMConfig

QUESTION = "What is shown in this image?"
OLDEST = (5, 6)  # the first transformers in which the modules have the names that are looked for here
MARGIN = 2.0  # a measured limit, as a multiple of what transformers' sdpa differs from its own eager attention

# Stages that are not what a module gives; `stage_names` has them all. Those of the processors must be equal
# whatever the limit of the others is: neither type nor backend has a part in them.
PIXELS, SIZES, IDS = PROCESSED = ("pixels", "image sizes", "ids")
SELECTED, IMAGE_TOKENS, MERGED, LOGITS = "selected features", "image tokens", "merged embeddings", "logits"
NOT_MODULES = (*PROCESSED, SELECTED, IMAGE_TOKENS, MERGED, LOGITS, GREEDY_LOGITS, GREEDY_TOKENS)
ENTERED = {"multi_modal_projector": SELECTED, "language_model.layers.0": MERGED}  # what flows into a module

# What transformers raises where it does not understand a checkpoint.
ERRORS = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Case:
    """What both implementations are asked, and what they must be told to be asked the same.

    inputs: minivlm's; both models compute on them, so that the stages behind unequal pixels or ids still tell
    something. eos_ids end the answer; forbidden: ids without a text, which greedy decoding may not choose.
    """

    folder: Path
    config: VLMConfig
    template: str | None
    prompt: str
    raw: bool
    picture: Image.Image
    inputs: Inputs
    dtype: torch.dtype
    device: torch.device
    backend: str
    tokens: int
    eos_ids: tuple[int, ...]
    forbidden: tuple[int, ...]

    @classmethod
    def of(cls, pipeline: Pipeline, folder: Path, image: ImageSource, prompt: str, raw: bool, tokens: int) -> "Case":
        """A prompt about a picture, for a loaded checkpoint."""
        picture = load_image(image)
        weight = pipeline.model.language_model.embed_tokens.weight
        return cls(
            folder=folder,
            config=pipeline.model.config,
            template=pipeline.processor.chat_template,
            prompt=prompt,
            raw=raw,
            picture=picture,
            inputs=pipeline.inputs(prompt, [picture], raw),
            dtype=weight.dtype,
            device=weight.device,
            backend=pipeline.model.language_model.backend.name,
            tokens=tokens,
            eos_ids=tuple(sorted(pipeline.vocabulary.eos_ids)),
            forbidden=tuple((~pipeline.vocabulary.allowed).nonzero().flatten().tolist()),
        )


def run(
    model: str | Path | None = None,
    image: ImageSource | None = None,
    prompt: str = QUESTION,
    dtype: str = "auto",
    backend: str = "reference",
    tokens: int = 20,
    tolerance: float | None = None,
    device: str = "cpu",
    raw: bool = False,
) -> Report:
    """Compare a checkpoint as minivlm runs it with the same checkpoint as transformers runs it, attention eager.

    image: None is a drawn sample picture. prompt: a question, which goes through the chat template, or, if raw,
    the prompt itself with `<image>` in it. tokens: how many greedy tokens to generate.
    tolerance: the largest relative difference of a stage that agrees. None is 0, bit for bit, for backend
    "reference" on a CPU; for any other backend or device it is measured stage by stage, in a third run: MARGIN
    times what transformers' sdpa attention differs from its own eager attention on this very prompt, and at
    least the spacing of the type's numbers at 1 (float32 1.2e-07, bfloat16 7.8e-03). Pixels, sizes and ids must
    be equal in any case.
    Raises InputError for bad input, and where transformers is missing, too old or cannot load the weights.
    """
    _transformers()  # first: a missing one should not wait for gigabytes of weights
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance: found {tolerance}, expected a number of at least 0")
    if tokens < 1:
        raise InputError(f"tokens: found {tokens}, expected at least 1")
    folder = hub.resolve(model)
    with tqdm(desc="parity", total=3, delay=1, unit="run") as bar:
        pipeline = load(folder, device=device, dtype=dtype, backend=backend)
        case = Case.of(pipeline, folder, sample_picture() if image is None else image, prompt, raw, tokens)
        ours = capture_ours(pipeline, case)
        del pipeline
        _forget()
        bar.update()
        theirs = capture_transformers(case, "eager")
        bar.update()
        if tolerance is None and (case.backend, case.device.type) != ("reference", "cpu"):
            limits = measured_limits(theirs, capture_transformers(case, "sdpa"), case.dtype)
        else:
            limits = dict.fromkeys(theirs.values, tolerance or 0.0)
        bar.update()
    limits |= dict.fromkeys(PROCESSED, 0.0)
    return Report(_setting(case), compare(ours, theirs, limits), theirs.notes)


def _setting(case: Case) -> dict[str, str]:
    """What was run, for the head of the report."""
    height, width = case.inputs.image_sizes[0]
    return {
        "model": str(case.folder),
        "picture": f"{height}x{width}",
        "dtype": str(case.dtype).removeprefix("torch."),
        "backend": case.backend,
        "device": str(case.device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": _transformers().__version__,
    }


def stage_names(config: VLMConfig) -> tuple[str, ...]:
    """The stages in the order of computation; those not in NOT_MODULES are what the module of that name gives."""
    return (
        PIXELS,
        *([] if config.image_grid_pinpoints is None else [SIZES]),  # LLaVA-1.5 does not look at them
        IDS,
        "vision_tower.embeddings.patch_embedding",
        "vision_tower.embeddings",
        "vision_tower.pre_layrnorm",
        *(f"vision_tower.encoder.layers.{i}" for i in range(max(config.depths))),
        SELECTED,
        "multi_modal_projector",
        IMAGE_TOKENS,
        "language_model.embed_tokens",
        MERGED,
        *(f"language_model.layers.{i}" for i in range(config.text.num_hidden_layers)),
        "language_model.norm",
        LOGITS,
        GREEDY_LOGITS,
        GREEDY_TOKENS,
    )


def capture_ours(pipeline: Pipeline, case: Case) -> Stages:
    """Every stage of the case as minivlm computes it. Freezes the model's weights."""
    model, inputs, names = pipeline.model.requires_grad_(False), case.inputs, stage_names(case.config)
    with _tapped(model, "", names) as seen:
        logits = model([inputs])
    tiles = inputs.tiles.to(case.device)
    image_tokens = model.encode_images(tiles, inputs.image_sizes, inputs.tile_counts)
    with _tapped(model, "language_model.", ["lm_head"]) as steps:
        reply = pipeline.generate(inputs, max_new_tokens=case.tokens)
    values = {name: outputs[0] for name, outputs in seen.items()} | {
        PIXELS: inputs.tiles,
        SIZES: torch.tensor(inputs.image_sizes),
        IDS: torch.tensor(inputs.ids),
        IMAGE_TOKENS: torch.cat(image_tokens).cpu(),
        LOGITS: logits.cpu(),
        GREEDY_LOGITS: _choosable(torch.cat(steps["lm_head"]), case),
        GREEDY_TOKENS: torch.tensor([token.id for token in reply.tokens]),
    }
    return Stages({name: values[name] for name in names})


def capture_transformers(case: Case, attention: str) -> Stages:
    """Every stage of the case as transformers computes it. attention: "eager" or "sdpa".

    Pixels and ids come from its own processor; where that fails they are missing, and a note says why.
    Raises InputError where the folder does not fill every weight of its model.
    """
    processed, notes = _process(case)
    with _blamed(f"does not run {case.folder} with {attention} attention"):
        stages = _run_transformers(case, attention)
    _forget()
    names = [name for name in stage_names(case.config) if name not in PROCESSED or name in processed]
    values = {**stages, **processed}
    return Stages({name: values[name] for name in names}, notes)


def _run_transformers(case: Case, attention: str) -> dict[str, Tensor]:
    """The stages of the model by name; the model is gone when this returns."""
    model, inputs, names = _load_transformers(case, attention), case.inputs, stage_names(case.config)
    ids = torch.tensor([inputs.ids], device=case.device)  # [1, S]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["pixel_values"] = inputs.tiles.to(case.device)
    if SIZES in names:
        batch["pixel_values"] = batch["pixel_values"][None]  # [1, N, 3, T, T]
        batch["image_sizes"] = torch.tensor(inputs.image_sizes)
    with _tapped(model, "model.", names) as seen:
        output = model(**batch, use_cache=False)
    # Its prefill gives the head a row with the stride of the whole prompt. Of such a row in float16 PyTorch's
    # product has other last bits than of the same numbers in a tensor of their own.
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(memory_format=torch.contiguous_format),))
    with _tapped(model, "", ["lm_head"]) as steps:
        answer = model.generate(**batch)  # as its generation_config says, see `_load_transformers`
    decoder = {name: outputs[0] for name, outputs in seen.items() if name.startswith("language_model.")} | {
        MERGED: seen[MERGED][0],
        LOGITS: output.logits.cpu(),
        GREEDY_LOGITS: _choosable(torch.cat(steps["lm_head"], dim=1), case),
        GREEDY_TOKENS: answer[:, ids.shape[1] :].cpu(),
    }
    values = {name: outputs[0] for name, outputs in seen.items()}
    values |= {name: value[0] for name, value in decoder.items()}  # a single prompt needs no batch axis
    values[IMAGE_TOKENS] = output.image_hidden_states.cpu()
    return values


def measured_limits(eager: Stages, sdpa: Stages, dtype: torch.dtype) -> dict[str, float]:
    """Each stage's limit from two runs of transformers, as `run` says."""
    differences = relative_differences(sdpa, eager)
    return {stage: max(torch.finfo(dtype).eps, MARGIN * found) for stage, found in differences.items()}


@contextmanager
def _tapped(model: nn.Module, prefix: str, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Copies on the CPU of what the named modules give, and of what enters those in ENTERED, call by call."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str, value: Tensor) -> None:
        seen[name].append(value.detach().to("cpu", copy=True))

    handles = []
    for name in (name for name in names if name not in NOT_MODULES):
        module = model.get_submodule(prefix + name)
        handles.append(module.register_forward_hook(lambda _, inputs, output, name=name: keep(name, output)))
        if name in ENTERED:
            stage = ENTERED[name]
            handles.append(module.register_forward_pre_hook(lambda _, inputs, stage=stage: keep(stage, inputs[0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _choosable(logits: Tensor, case: Case) -> Tensor:
    """logits [.., V] without the ids that may not be chosen, on the CPU."""
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[list(case.forbidden)] = False
    return logits.cpu()[..., allowed]


def _process(case: Case) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Pixels, image sizes and ids as transformers' processor makes them; notes on what needs saying."""
    transformers = _transformers()
    notes = []
    try:
        with _blamed("does not process the prompt"):
            # Its other image backend, torchvision, rounds pixels differently.
            processor = transformers.AutoProcessor.from_pretrained(case.folder, backend="pil")
            of_file = transformers.PreTrainedTokenizerFast.from_pretrained(case.folder)
            if processor.chat_template is None and not case.raw:
                processor.chat_template = case.template
                notes.append("transformers' processor has no chat template; both are given minivlm's")
            chosen = type(processor.tokenizer).__name__
            other_ids = _apply(processor, case)["input_ids"][0]
            processor.tokenizer = of_file
            batch = _apply(processor, case)
    except InputError as error:
        return {}, (str(error),)
    ids, pixels = batch["input_ids"][0], batch["pixel_values"]
    if not torch.equal(ids, other_ids):
        notes.append(
            f"AutoTokenizer chose {chosen}, which does not give the ids of tokenizer.json ({len(other_ids)} ids "
            f"instead of {len(ids)} for this prompt); what is compared are the ids of tokenizer.json"
        )
    values = {PIXELS: pixels.reshape(-1, *pixels.shape[-3:]), IDS: ids}  # [1, N, 3, T, T] -> [N, 3, T, T]
    if "image_sizes" in batch:
        values[SIZES] = batch["image_sizes"]
    return values, tuple(notes)


def _apply(processor: Any, case: Case) -> Mapping[str, Tensor]:
    if case.raw:
        return processor(text=case.prompt, images=case.picture, return_tensors="pt")
    messages = question_to_messages(case.prompt, 1)
    messages[0]["content"][0]["image"] = case.picture
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _load_transformers(case: Case, attention: str) -> nn.Module:
    """transformers' model, set to generate as the case says and not as generation_config.json may."""
    transformers = _transformers()
    # dtype= leaves the rotary frequencies in float32; `.to(dtype)` afterwards would round them as well.
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        case.folder,
        dtype=case.dtype,
        attn_implementation=attention,
        output_loading_info=True,
    )
    if unfilled := sorted(str(key) for key in (*loading["missing_keys"], *loading["mismatched_keys"])):
        raise InputError(f"{case.folder}: transformers fills {len(unfilled)} weights at random, as {unfilled[0]}")
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=case.tokens,
        eos_token_id=list(case.eos_ids) or None,
        pad_token_id=0,  # asked for, but a single row is never padded
        suppress_tokens=list(case.forbidden) or None,
    )
    return model.to(case.device).requires_grad_(False)


def _transformers() -> ModuleType:
    """transformers, or an InputError that says what to install."""
    try:
        import transformers
    except ImportError as error:  # also raised where its own requirements are not met
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"parity needs transformers ({reason}): pip install 'minivlm[test]'") from None
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise InputError(f"parity needs transformers {oldest} or newer, found {transformers.__version__}")
    return transformers


@contextmanager
def _blamed(fault: str) -> Iterator[None]:
    """One line instead of whatever transformers raises for a checkpoint or a version that it cannot handle."""
    try:
        yield
    except InputError:
        raise
    except ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"transformers {fault}: {type(error).__name__}: {reason}") from error


def _forget() -> None:
    """Give back the memory of a model that nothing refers to any more."""
    gc.collect()  # modules may refer to one another in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sample_picture() -> Image.Image:
    """480 x 640 pixels (height x width): a house on a hill, a sun, a shaded sky; the same on every machine."""
    rows = torch.arange(480)[:, None, None].expand(480, 640, 3)
    sky = torch.tensor([90, 150, 220]) + rows // torch.tensor([4, 6, 16])
    picture = Image.fromarray(sky.to(torch.uint8).numpy())
    draw = ImageDraw.Draw(picture)
    draw.ellipse((470, 50, 560, 140), fill=(250, 220, 60))
    draw.ellipse((-200, 330, 840, 700), fill=(70, 140, 60))
    draw.rectangle((180, 240, 340, 380), fill=(190, 80, 60), outline=(40, 20, 20), width=4)
    draw.polygon(((160, 240), (260, 150), (360, 240)), fill=(90, 50, 40))
    draw.rectangle((240, 300, 285, 380), fill=(60, 40, 30))
    draw.text((30, 440), "MINIVLM 640 x 480", fill=(255, 255, 255))
    return picture
