"""What is asked of generation and what it gives: options, tokens, answers. Plain data.

It knows nothing of models or prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from minivlm.errors import InputError
from minivlm.sampler import Sampling

FinishReason = Literal["stop", "stop_string", "length"]


class Settings(TypedDict, total=False):
    """The keyword arguments of every way of generating; `Options` and `Sampling` say what they mean."""

    max_new_tokens: int | None
    stop: Sequence[str]
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    top_logprobs: int


@dataclass(frozen=True)
class Options:
    """How long an answer may be and how its ids are chosen.

    max_new_tokens  at least 1; None is until the model ends its answer or the context is full
    stop            the answer ends before the first of these strings, which is not part of its text
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        limit, stop = self.max_new_tokens, self.stop
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise InputError(f"max_new_tokens: found {limit!r}, expected an integer of at least 1, or None")
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop: found {stop!r}, expected a list of strings that are not empty")

    @classmethod
    def of(cls, settings: Settings) -> "Options":
        """From keyword arguments. Raises InputError for an unknown name or a bad value."""
        names = list(Settings.__annotations__)
        if unknown := [name for name in settings if name not in names]:
            raise InputError(f"{unknown[0]}: not a setting, expected one of {', '.join(names)}")
        own = {name: value for name, value in settings.items() if name in ("max_new_tokens", "stop")}
        sampling = Sampling(**{name: value for name, value in settings.items() if name not in own})
        return cls(sampling, **own)


@dataclass(frozen=True)
class Alternative:
    """An id that could have been chosen; logprob is of the raw distribution."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """One generated token. Log-probabilities are natural logarithms.

    text             what this token completes: a character's first bytes give "", its last byte the whole
                     character. The texts of an answer's tokens, joined, are the answer
    logprob          of the raw distribution, the model's softmax over the whole vocabulary
    sampled_logprob  of the distribution that was chosen from, after bias, penalties, temperature and filters
    alternatives     the `top_logprobs` likeliest ids, best first
    finish_reason    None but for the last token. "stop": it is an end-of-text id; "stop_string": its text
                     completed a stop string; "length": max_new_tokens are reached or the context is full
    """

    id: int
    text: str
    logprob: float
    sampled_logprob: float
    alternatives: tuple[Alternative, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Reply:
    """A whole answer.

    tokens           at least one; the last has the finish_reason
    prompt_tokens    ids that the answer followed, image tokens and earlier turns included
    seed             what its ids were drawn with, None if greedy
    prefill_seconds  to the first token; decode_seconds: from there to the last. Rows of a batch share them
    """

    tokens: tuple[Token, ...]
    prompt_tokens: int
    seed: int | None
    prefill_seconds: float
    decode_seconds: float

    @property
    def text(self) -> str:
        """The answer, without special tokens and without the stop string that ended it."""
        return "".join(token.text for token in self.tokens)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; see `Token`."""
        return self.tokens[-1].finish_reason
