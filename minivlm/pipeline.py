"""What `minivlm.load` returns: a model with its processor, to be asked in one line.

It knows nothing of tensors: text and pictures go through the processor, tokens come from generate.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch

from minivlm import checkpoint, hub
from minivlm.answer import Options, Reply, Settings, Token
from minivlm.chat import Chat
from minivlm.checkpoint import CheckpointInfo
from minivlm.errors import InputError
from minivlm.generate import collect, generate, new_cache
from minivlm.models import recipe_for
from minivlm.ops import backend as backends
from minivlm.processor import Inputs, Processor, VisionGeometry, check_images
from minivlm.processor.images import ImageSource
from minivlm.processor.prompts import Message, question_to_messages
from minivlm.quantisation import MOST_IDS, STORED, TEXT, check
from minivlm.row import Row, Vocabulary
from minivlm.vlm import VLM, VLMConfig

Prompt = str | Sequence[Message] | Inputs


class Pipeline:
    """A vision-language model that answers.

    A prompt is one of
    - a question, which goes through the model's chat template behind its pictures;
    - a list of messages in Hugging Face's chat format: {"role": "user", "content": [{"type": "image"},
      {"type": "text", "text": "Why?"}]}. An image part may name its picture (`image`, `url` or `path`); where
      none does, `images` has them in reading order;
    - with raw=True, the prompt text itself, `<image>` where a picture belongs;
    - what `processor(text, images)` returned.

    Pictures are paths, bytes, PIL images, `data:` URIs or http(s) URLs. The settings are the fields of
    `Options` and `Sampling` as keyword arguments; without any the answer is greedy and ends where the model
    ends it. Bad input raises InputError before anything is computed; nothing is truncated.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        eos_ids: Iterable[int] = (),
        info: CheckpointInfo | None = None,
    ):
        """eos_ids end an answer, as the tokenizer's end-of-text token does; info: of the folder, if any."""
        self.model, self.processor, self.info = model, processor, info
        eos = {*eos_ids, processor.tokenizer.eos_token_id} - {None}
        self.vocabulary = Vocabulary(processor.tokenizer, frozenset(eos), model.config.text.vocab_size)

    @property
    def context(self) -> int:
        """The most ids, prompt and answer, that the model can read."""
        return self.model.config.text.max_position_embeddings

    def inputs(self, prompt: Prompt, images: Sequence[ImageSource] = (), raw: bool = False) -> Inputs:
        """What the model gets for a prompt and its pictures."""
        check_images(images)
        if isinstance(prompt, Inputs):
            if len(images) or raw:
                raise InputError("prompt: found Inputs beside images or raw=True, expected Inputs alone")
            return prompt
        if raw:
            return self.processor(prompt, images)
        if isinstance(prompt, str):
            return self.processor.chat(question_to_messages(prompt, len(images)), images)
        if not isinstance(prompt, Sequence):
            found = type(prompt).__name__
            raise InputError(f"prompt: expected a question, a list of messages or Inputs, found {found}")
        return self.processor.chat(prompt, images)

    def generate(
        self,
        prompt: Prompt,
        images: Sequence[ImageSource] = (),
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> Reply:
        """The whole answer."""
        row = self._row(self.inputs(prompt, images, raw), Options.of(settings))
        return self._collect([row])[0]

    def stream(
        self,
        prompt: Prompt,
        images: Sequence[ImageSource] = (),
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> Iterator[Token]:
        """The answer's tokens as they are generated. The iterator may be dropped at any time."""
        row = self._row(self.inputs(prompt, images, raw), Options.of(settings))
        return (token for _, token in generate(self.model, [row], new_cache(self.model, [row])))

    def generate_batch(
        self,
        requests: Iterable[tuple[Prompt, Sequence[ImageSource]]],
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> list[Reply]:
        """The answers to several (prompt, images) pairs, computed together; all share the settings.

        Each is the answer that `generate` gives to its pair alone, wherever the best two logits differ by more than
        rounding: a packed batch may sum in another order (1e-5 in float32).
        """
        options = Options.of(settings)
        rows = [self._row(self.inputs(*_pair(request, i), raw), options) for i, request in enumerate(requests)]
        return self._collect(rows)

    def chat(self, system: str | None = None) -> Chat:
        """A dialogue of several turns that keeps what it has computed."""
        return Chat(self.model, self.processor, self.vocabulary, system)

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint folder that `load` and transformers read."""
        if self.info is not None:
            values, generation = self.info.config_values, self.info.generation_values
        else:
            values, tokenizer = None, self.processor.tokenizer
            generation = {
                "eos_token_id": sorted(self.vocabulary.eos_ids),
                "bos_token_id": tokenizer.bos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            }
        checkpoint.save(self.model, folder, values, generation)
        self.processor.save(folder)

    def _row(self, inputs: Inputs, options: Options) -> Row:
        return Row(inputs, options, self.vocabulary, self.context)

    def _collect(self, rows: list[Row]) -> list[Reply]:
        return collect(rows, generate(self.model, rows, new_cache(self.model, rows))) if rows else []


def _pair(request: Any, index: int) -> tuple[Prompt, Sequence[ImageSource]]:
    if not isinstance(request, tuple | list) or len(request) != 2:
        raise InputError(f"requests[{index}]: expected a pair (prompt, images), found {request!r:.80}")
    return request[0], request[1]


def load(
    model: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    prompt_format: str | None = None,
    weights: str = STORED,
) -> Pipeline:
    """Load a checkpoint folder, a hub id, or (None) the shipped checkpoint.

    device: "auto" is CUDA where there is one, else the CPU. dtype: "float32", "bfloat16", "float16", or
    "auto", the checkpoint's own, but on a CPU never float16, which is 20 times slower there. backend: "auto"
    or a name in `minivlm.ops.backend`; to train, "sdpa" or "reference": "cpu" and "triton", which "auto" is, have no
    gradients. prompt_format: the built-in chat template for a folder that has none; None takes that of the
    published model of this structure. weights: "stored", or "int8" or "int4" to quantise the decoder's while loading;
    `info.change` then says what that did to its logits. Raises InputError, one line, for whatever is missing, damaged
    or not supported.
    """
    place = choose_device(device)
    folder = hub.resolve(model)
    config = checkpoint.read_config(folder)
    check(weights, config.text)
    recipe = recipe_for(config)
    if prompt_format is None and recipe is not None:
        prompt_format = recipe.prompt_format
    # The processor first: what is wrong with the small files should not wait for gigabytes of weights.
    processor = Processor.from_folder(folder, geometry(config), config.image_token_id, prompt_format)
    dtype = checkpoint.compute_dtype(folder, dtype, place)
    chosen = backends.choose(backend, place, dtype, None if weights == STORED else weights)
    probe = processor.tokenizer.encode(TEXT)[: min(MOST_IDS, config.text.max_position_embeddings)]
    vlm, info = checkpoint.load(folder, place, dtype, chosen, weights=weights, probe=probe)
    ends = () if recipe is None else tuple(map(processor.tokenizer.backend.token_to_id, recipe.stop))
    return Pipeline(vlm, processor, [*info.generation.eos_token_ids, *ends], info)


def geometry(config: VLMConfig) -> VisionGeometry:
    """What the processor must know of the model to count image tokens."""
    return VisionGeometry(
        image_size=config.vision.image_size,
        patch_size=config.vision.patch_size,
        image_grid_pinpoints=config.image_grid_pinpoints,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )


def choose_device(name: str | torch.device) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises InputError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device: found {name!r}, expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name}: PyTorch {torch.__version__} finds no CUDA device, expected auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices, numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device {name}: PyTorch {torch.__version__} finds no Metal device, expected auto or cpu")
    return device
