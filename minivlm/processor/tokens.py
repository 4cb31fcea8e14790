"""Text to ids and back: a `tokenizer.json`, its special tokens, and a detokeniser for streams of ids.

It knows nothing of pictures, except that one special token stands for an image token. The ids are those of
the `tokenizer.json` itself (Hugging Face `tokenizers`); transformers' AutoTokenizer rebuilds the tokenizer of
some class names and then differs on text that begins with a space.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from minivlm.errors import InputError

REPLACEMENT = "\ufffd"  # stands in decoded text for bytes that are not UTF-8


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens named; any but the image token may be None."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        image_token: str = "<image>",
        bos_token: str | None = "<s>",
        eos_token: str | None = "</s>",
        pad_token: str | None = None,
    ):
        # A file may carry truncation and padding from its training; both would change image tokens.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.image_token, self.image_token_id = image_token, self._id(image_token)
        self.bos_token, self.bos_token_id = bos_token, self._id(bos_token)
        self.eos_token, self.eos_token_id = eos_token, self._id(eos_token)
        self.pad_token, self.pad_token_id = pad_token, self._id(pad_token)
        if image_token in (bos_token, eos_token, pad_token):
            raise InputError(f"tokenizer: the image token {image_token!r} is also the bos, eos or pad token")
        if self._encode(backend, image_token) != [self.image_token_id]:
            raise InputError(f"tokenizer: the image token {image_token!r} is not an added token")
        added = backend.encode("", add_special_tokens=True).ids
        if added not in ([], [self.bos_token_id]):
            raise InputError(f"tokenizer: its post-processor adds ids {added}, expected only {bos_token!r}")
        self._adds_bos = bool(added)
        self._plain: tokenizers.Tokenizer | None = None
        tokens = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in tokens.items() if token.special)
        self.byte_ids = _byte_ids(backend)

    @classmethod
    def from_folder(cls, folder: Path, image_token_id: int) -> "Tokenizer":
        """From tokenizer.json, tokenizer_config.json and special_tokens_map.json of a checkpoint folder.

        image_token_id is the model's (`image_token_index` of config.json), so text and model cannot disagree.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file (a tokenizer.model alone is not read)")
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(path))
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises Exception itself, no subclass
                raise
            raise InputError(f"{path}: not a tokenizer.json ({' '.join(str(error).split())})") from None
        path = folder / "tokenizer_config.json"
        config = read_json(path)
        added = config.get("added_tokens_decoder") or {}
        if not isinstance(added, Mapping):
            raise InputError(f"{path}: added_tokens_decoder is a {type(added).__name__}, expected an object")
        for token_id, token in added.items():
            text = _text_of(token, f"{path}: added_tokens_decoder {token_id}")
            if text is None or str(backend.token_to_id(text)) != token_id:
                raise InputError(f"{path}: has {text!r} as id {token_id}, tokenizer.json does not")
        image_token = backend.id_to_token(image_token_id)
        if image_token is None:
            raise InputError(f"{folder}: tokenizer.json has no id {image_token_id}, the model's image token")
        names = read_json(folder / "special_tokens_map.json")
        if not names and not config:
            raise InputError(f"{path}: not there or empty, as special_tokens_map.json: which token ends an answer?")
        names |= {key: value for key, value in config.items() if value is not None}
        keys = ("bos_token", "eos_token", "pad_token")
        return cls(backend, image_token, **{key: _text_of(names.get(key), f"{path}: {key}") for key in keys})

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of a text, the bos token in front exactly once if tokenizer.json's post-processor adds it.

        A text that spells the bos token at its start (as some chat templates do) gets no second one.
        parse_special: whether "</s>" in the text is the special token, as in Hugging Face, or characters.
        """
        ids = self._encode(self.backend if parse_special else self._without_special(), text)
        if add_bos and self._adds_bos and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        return ids

    def encode_after(self, text: str) -> list[int]:
        """The ids of a text that continues another: no bos, and no blank put before the text.

        Example (Mistral): " yes" alone is encoded as "▁▁yes", after other text as "▁yes".
        """
        before, whole = self._encode(self.backend, "\n"), self._encode(self.backend, "\n" + text)
        if whole[: len(before)] != before:
            raise InputError(f"tokenizer: it joins a line break with what follows it, here {text!r:.40}")
        return whole[len(before) :]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids. Ids without a token (rows that pad the embedding) give nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True, before: Sequence[int] = ()) -> "TextStream":
        """A detokeniser for ids that arrive one at a time. before: ids that they follow, so a first blank is kept."""
        return TextStream(self, skip_special, before)

    def _id(self, token: str | None) -> int | None:
        token_id = None if token is None else self.backend.token_to_id(token)
        if token is not None and token_id is None:
            raise InputError(f"tokenizer: the special token {token!r} is not in tokenizer.json")
        return token_id

    def _encode(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"text: character {error.start} is half of a surrogate pair") from None
        return backend.encode(text, add_special_tokens=False).ids

    def _without_special(self) -> tokenizers.Tokenizer:
        if self._plain is None:  # a copy, because the switch belongs to the whole tokenizer
            self._plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
            self._plain.encode_special_tokens = True
        return self._plain


class TextStream:
    """Text from ids that arrive one at a time: never half a character, in all equal to `decode` of all ids.

    Text is held back only while a later id could still change it. With byte fallback a run of byte tokens is
    decoded as a whole (one bad byte turns every byte of the run into U+FFFD), so it is held until a token
    that is no byte ends it: <0xF0> <0x9F> <0x8E> <0x89> give nothing, then "!" gives "🎉!". A byte-level
    decoder is held while the text ends in U+FFFD, which a further byte could complete.
    Each step decodes only what is held and the token before it, whose presence keeps a leading blank.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, before: Sequence[int] = ()):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._anchor: list[int] = list(before)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this id completes; often empty."""
        tokenizer = self._tokenizer
        skipped = self._skip_special and token_id in tokenizer.special_ids
        if skipped or tokenizer.backend.id_to_token(token_id) is None:
            return ""  # decode leaves it out too, and the bytes around it join
        self._held.append(token_id)
        if token_id in tokenizer.byte_ids:
            return ""
        text = self._text()
        if text.endswith(REPLACEMENT):
            return ""
        self._anchor, self._held = [token_id], []
        return text

    def finish(self) -> str:
        """What is still held, with U+FFFD for an unfinished character. The stream then starts afresh."""
        text = self._text()
        self._anchor, self._held = [], []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._anchor, self._skip_special)
        return self._tokenizer.decode(self._anchor + self._held, self._skip_special)[len(before) :]


def _byte_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Ids of <0x00> to <0xFF> if the decoder joins them; refuses decoders that no window can reproduce."""
    if backend.decoder is None:
        raise InputError("tokenizer: tokenizer.json has no decoder, expected one")
    state = json.loads(backend.decoder.__getstate__())
    steps = [step["type"] for step in state["decoders"]] if state["type"] == "Sequence" else [state["type"]]
    supported = ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "ByteLevel")
    if unknown := [step for step in steps if step not in supported]:
        raise InputError(f"tokenizer: decoder {unknown[0]} is not supported, only {', '.join(supported)}")
    if "ByteFallback" not in steps:
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)


def _text_of(token: Any, where: str) -> str | None:
    """A token is written as a string or as {"content": string}."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where} is {token!r:.80}, expected a string")
    return text


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; InputError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} where there is no such file; InputError where it is anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # also an integer of 4,300 digits, and a thousand open brackets
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
