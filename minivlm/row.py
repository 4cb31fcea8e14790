"""One answer on its way: its ids, the text that they complete, and when it ends.

It knows nothing of models: an id comes from outside, and a token with its text goes out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minivlm.answer import Alternative, FinishReason, Options, Token
from minivlm.errors import InputError
from minivlm.processor import Inputs
from minivlm.processor.tokens import Tokenizer
from minivlm.sampler import Choice
from minivlm.warpers import check_bias


@dataclass(frozen=True)
class Vocabulary:
    """Ids to text, and which ids may come. size: rows V of the model's head, often more than tokens."""

    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    size: int

    @cached_property
    def allowed(self) -> Tensor:
        """bool [V]: ids that may be generated. Spare rows have no text, and a placeholder is not a word."""
        allowed = torch.zeros(self.size, dtype=torch.bool)
        ids = self.tokenizer.backend.get_vocab(with_added_tokens=True).values()
        allowed[[token_id for token_id in ids if token_id < self.size]] = True
        if self.tokenizer.image_token_id < self.size:
            allowed[self.tokenizer.image_token_id] = False
        return allowed

    def piece(self, token_id: int) -> str:
        """The text of one id in the middle of a sentence, where " cat" keeps its blank."""
        before = self.tokenizer.encode("a", add_bos=False)
        text = self.tokenizer.decode([*before, token_id], skip_special=False)
        return text[len(self.tokenizer.decode(before)) :]


class StopStrings:
    """Passes text on up to the first stop string, and holds back an end that could become one.

    With the stop string "END": "The E" gives "The ", then "Nd" gives "ENd".
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str, last: bool) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string ended it. last: no more text will follow."""
        text = self.held + text
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            return text[: min(found)], True
        keep = 0 if last else max((_overlap(text, stop) for stop in self.stops), default=0)
        shown, self.held = text[: len(text) - keep], text[len(text) - keep :]
        return shown, False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`: of "The E" and "END" it is 1."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


class Row:
    """One answer on its way.

    ids     past, prompt and answer so far
    cached  how many of them are in the cache; the last id of an answer never is
    before  ids behind which the answer's text is read: a blank that begins it is kept if there are any
    """

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        vocabulary: Vocabulary,
        context: int,
        past: Sequence[int] = (),
        verbatim: bool = False,
    ):
        """inputs: new ids and pictures, to be prefilled behind `past`, the ids that the cache already holds.

        context: the most ids that the model can read. verbatim: whether a blank that begins the answer is part of its
        text. Raises InputError if prompt and answer do not fit, or for the bias of an id beyond the vocabulary.
        """
        self.inputs, self.options, self.vocabulary = inputs, options, vocabulary
        self.sampling = options.sampling.seeded()
        check_bias(self.sampling.logit_bias, vocabulary.size)
        self.ids, self.cached = [*past, *inputs.ids], len(past)
        self.prompt_tokens = len(self.ids)
        self.limit = _limit(self.prompt_tokens, options.max_new_tokens, context)
        self.finish_reason: FinishReason | None = None
        tokenizer = vocabulary.tokenizer
        self.before = tuple(tokenizer.encode("a", add_bos=False)) if verbatim else ()
        self._stream = tokenizer.stream(before=self.before)
        self._stop = StopStrings(options.stop)

    def accept(self, choice: Choice, complete: bool = False) -> Token:
        """Append the chosen id; sets `finish_reason` if it was the last. complete: nothing can follow this id."""
        self.ids.append(choice.id)
        if choice.id in self.vocabulary.eos_ids:
            reason, text = "stop", ""
        else:
            reason = "stop" if complete else "length" if len(self.ids) == self.limit else None
            text = self._stream.push(choice.id)
        if reason is not None:
            text += self._stream.finish()
        text, stopped = self._stop.push(text, last=reason is not None)
        self.finish_reason = "stop_string" if stopped else reason
        return Token(
            id=choice.id,
            text=text,
            logprob=choice.logprob,
            sampled_logprob=choice.sampled_logprob,
            alternatives=tuple(Alternative(i, self.vocabulary.piece(i), logprob) for i, logprob in choice.alternatives),
            finish_reason=self.finish_reason,
        )


def _limit(prompt: int, max_new_tokens: int | None, context: int) -> int:
    """The number of ids, prompt and answer, at which a row ends."""
    if prompt < 1:
        raise InputError("prompt: found no tokens, expected at least 1")
    if prompt >= context:
        raise InputError(f"prompt: found {prompt} tokens, expected fewer than the model's context of {context}")
    if max_new_tokens is None:
        return context
    if prompt + max_new_tokens > context:
        raise InputError(
            f"max_new_tokens: found {max_new_tokens} after a prompt of {prompt} tokens, expected at most "
            f"{context - prompt}, which fills the model's context of {context}"
        )
    return prompt + max_new_tokens
