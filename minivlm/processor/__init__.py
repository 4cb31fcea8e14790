"""The processor: text and pictures to the model's inputs, and ids back to text. It imports no model code.

anyres.py counts image tokens, images.py opens pictures, pixels.py cuts them into tiles, tokens.py and
prompts.py handle text. Pixels equal those of transformers' PIL image processors, ids those of tokenizer.json.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from minivlm.errors import InputError
from minivlm.processor import prompts
from minivlm.processor.anyres import Size, VisionGeometry
from minivlm.processor.images import ImageSource, load_image
from minivlm.processor.pixels import ImageConfig, preprocess
from minivlm.processor.tokens import TextStream, Tokenizer, read_json

__all__ = ["ImageConfig", "Inputs", "Processor", "TextStream", "Tokenizer", "VisionGeometry"]

# Copied as they are when a processor that came from a folder is saved.
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class Inputs:
    """One row for the model: one prompt with its pictures.

    ids: S expanded ids, one image placeholder id per image token.
    tiles: [N, 3, T, T] float32, all pictures' tiles in reading order, base tiles first; N may be 0.
    image_sizes: original (height, width) of each picture. tile_counts: tiles of each picture, N in all.
    """

    ids: tuple[int, ...]
    tiles: torch.Tensor
    image_sizes: tuple[Size, ...]
    tile_counts: tuple[int, ...]


@dataclass(frozen=True)
class Processor:
    """Everything between a user and the model.

    chat_template is Jinja, or None where only raw prompts work. source is the folder that all of it was read
    from, None if it was made in code.
    """

    tokenizer: Tokenizer
    image_config: ImageConfig
    geometry: VisionGeometry
    chat_template: str | None
    source: Path | None = None

    def __post_init__(self) -> None:
        config, geometry = self.image_config, self.geometry
        for name, found, expected in (
            ("crop_size", config.tile, geometry.image_size),
            ("image_grid_pinpoints", config.image_grid_pinpoints, geometry.image_grid_pinpoints),
        ):
            if found != expected:
                raise InputError(f"preprocessor {name} {found} differs from the model's {expected}")

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        geometry: VisionGeometry,
        image_token_id: int,
        prompt_format: str | None = None,
    ) -> "Processor":
        """The processor of a checkpoint folder.

        geometry and image_token_id come from the model's config.json: the number of image tokens is the
        model's to say. A processor_config.json that contradicts it is refused, but for
        num_additional_image_tokens, which published folders omit and transformers then takes as 0, one token
        short.
        prompt_format: the built-in template (a key of prompts.TEMPLATES) for a folder without one.
        """
        folder = Path(folder)
        path = folder / "processor_config.json"
        values = read_json(path)
        tokenizer = Tokenizer.from_folder(folder, image_token_id)
        for key, expected in (
            ("patch_size", geometry.patch_size),
            ("vision_feature_select_strategy", geometry.vision_feature_select_strategy),
            ("image_token", tokenizer.image_token),
        ):
            if values.get(key) not in (None, expected):
                raise InputError(f"{path}: {key} = {values[key]!r} differs from the model's {expected!r}")
        image_values = values.get("image_processor")  # transformers 5 nests it here and then reads no other
        if image_values is None:
            path = folder / "preprocessor_config.json"
            image_values = read_json(path)
            if not image_values:
                raise InputError(f"{path}: missing or empty, and processor_config.json has no image_processor")
        anyres = geometry.image_grid_pinpoints is not None
        return cls(
            tokenizer=tokenizer,
            image_config=ImageConfig.from_hf(image_values, str(path), anyres),
            geometry=geometry,
            chat_template=prompts.template_of_folder(folder, prompt_format),
            source=folder,
        )

    def __call__(self, text: str, images: Sequence[ImageSource] = (), expanded: bool = False) -> Inputs:
        """A raw prompt with one placeholder (`<image>`) a picture, and the pictures in reading order.

        Special tokens that the text spells out are special, as in Hugging Face. expanded: the prompt holds
        one placeholder per image token already, and is checked instead. Raises InputError with both counts
        when placeholders and pictures do not match; nothing is ever truncated.
        """
        if not isinstance(text, str):
            raise InputError(f"prompt: expected a string, found {type(text).__name__}")
        return self._inputs(self.tokenizer.encode(text), images, expanded)

    def chat(
        self,
        messages: Sequence[prompts.Message],
        images: Sequence[ImageSource] = (),
        add_generation_prompt: bool = True,
    ) -> Inputs:
        """A dialogue through the chat template; its pictures are given in order, or named in the messages.

        As in Hugging Face, special tokens that a message spells out are special, `<image>` included.
        """
        images = _pictures(messages, images)
        return self._inputs(self.tokenizer.encode(self.render(messages, add_generation_prompt)), images)

    def chat_continuation(self, messages: Sequence[prompts.Message], images: Sequence[ImageSource] = ()) -> Inputs:
        """What a chat that keeps its cache appends after the words of the last answer, up to the next answer.

        messages: the dialogue with that answer and what came after it; images: pictures of what came after
        it. The ids usually begin with the end-of-text token, which the answer may have ended with already.
        """
        _, mark, text = self.render(prompts.mark_last_answer(messages)).rpartition(prompts.ANSWER_MARK)
        if not mark:
            raise InputError("chat template: it changes the assistant's words, no dialogue can be continued")
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return self._inputs(self.tokenizer.encode_after(text), _pictures(messages[last + 1 :], images))

    def render(self, messages: Sequence[prompts.Message], add_generation_prompt: bool = True) -> str:
        """The prompt text of a dialogue, one `<image>` a picture; InputError without a chat template."""
        if self.chat_template is None:
            raise InputError("the checkpoint has no chat template: give a raw prompt or name a prompt format")
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        return prompts.render(messages, self.chat_template, add_generation_prompt, bos, eos)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids."""
        return self.tokenizer.decode(ids, skip_special)

    def save(self, folder: str | Path) -> None:
        """Write what `from_folder` and transformers' LlavaNextProcessor or LlavaProcessor read back the same.

        Files of the folder it came from are copied as they are, but for the counts in processor_config.json.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.source is None:
                self._write(folder)
            elif folder.resolve() != self.source.resolve():
                for name in COPIED:
                    if (self.source / name).is_file():
                        shutil.copyfile(self.source / name, folder / name)
            self._write_processor_config(folder)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error})") from None

    def _inputs(self, ids: list[int], images: Sequence[ImageSource], expanded: bool = False) -> Inputs:
        check_images(images)
        sizes, tiles = [], []
        for image in images:  # one after another, so that only one is ever large
            picture = load_image(image)
            sizes.append((picture.height, picture.width))
            tiles.append(preprocess(picture, self.image_config))
            del picture
        counts = [self.geometry.image_token_count(size) for size in sizes]
        ids = self._checked(ids, counts) if expanded else self._expanded(ids, counts)
        side = self.geometry.image_size
        return Inputs(
            ids=tuple(ids),
            tiles=torch.cat(tiles) if tiles else torch.empty(0, 3, side, side),
            image_sizes=tuple(sizes),
            tile_counts=tuple(len(picture) for picture in tiles),
        )

    def _expanded(self, ids: list[int], counts: list[int]) -> list[int]:
        """Each placeholder repeated as often as its picture has image tokens."""
        image_id, name = self.tokenizer.image_token_id, self.tokenizer.image_token
        found = ids.count(image_id)
        if found != len(counts):
            hint = " (it looks expanded already: pass expanded=True)" if found == sum(counts) > 0 else ""
            raise InputError(f"prompt: {found} {name} for {len(counts)} pictures, expected one each{hint}")
        remaining = iter(counts)
        return [token for i in ids for token in ([i] * next(remaining) if i == image_id else [i])]

    def _checked(self, ids: list[int], counts: list[int]) -> list[int]:
        """The ids, if every run of placeholders holds whole pictures (adjacent pictures share a run)."""
        image_id, remaining = self.tokenizer.image_token_id, list(counts)
        runs = [len(list(run)) for is_image, run in groupby(ids, lambda i: i == image_id) if is_image]
        for i, length in enumerate(runs):
            while length > 0 and remaining:
                length -= remaining.pop(0)
            if length:
                raise InputError(f"prompt: runs of {runs} placeholders, run {i} does not fit pictures of {counts}")
        if remaining:
            raise InputError(f"prompt: runs of {runs} placeholders, expected pictures of {counts} image tokens")
        return ids

    def _write(self, folder: Path) -> None:
        """The files of a processor that was made in code."""
        tokenizer = self.tokenizer
        (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
        # A class of its own, such as LlamaTokenizer, would make transformers rebuild it differently.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "left",
            "model_max_length": 10**30,
        }
        tokens = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token}
        config |= {f"{role}_token": token for role, token in tokens.items() if token is not None}
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "preprocessor_config.json", self.image_config.to_hf())

    def _write_processor_config(self, folder: Path) -> None:
        """The counts, which the model has the say in, and the chat template if it was a built-in one."""
        geometry, source = self.geometry, self.source
        config = {} if source is None else read_json(source / "processor_config.json")
        anyres = geometry.image_grid_pinpoints is not None
        config["processor_class"] = "LlavaNextProcessor" if anyres else "LlavaProcessor"
        config["image_token"] = self.tokenizer.image_token
        config["patch_size"] = geometry.patch_size
        config["vision_feature_select_strategy"] = geometry.vision_feature_select_strategy
        config["num_additional_image_tokens"] = geometry.num_additional_image_tokens
        _write_json(folder / "processor_config.json", config)
        copied = source is not None and prompts.template_of_folder(source, None) is not None
        if self.chat_template is not None and not copied:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def check_images(images: Sequence[ImageSource]) -> None:
    """Refuse what is not a list of pictures, such as one picture alone."""
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise InputError(f"images: expected a list of pictures, found {type(images).__name__}")


def _pictures(messages: Sequence[prompts.Message], images: Sequence[ImageSource]) -> Sequence[ImageSource]:
    """The pictures given, or those that the messages name."""
    check_images(images)
    named = prompts.pictures(messages)
    if named and len(images):
        raise InputError(f"images: {len(images)} given and {len(named)} in the messages, expected one or other")
    return named or images


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
