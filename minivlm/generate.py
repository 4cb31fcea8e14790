"""Generation: prefill the prompts, then choose one token a step for every row that still runs.

It knows nothing of files, pixels or chat templates; text is only what ids decode to. Gradients are switched off
here, and nowhere in the model. Rows that end leave the packed batch at once: no step computes anything for them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import torch
from torch import Tensor

from minivlm.answer import Alternative, FinishReason, Options, Reply, Token
from minivlm.errors import InputError
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rows import Rows
from minivlm.processor import Inputs
from minivlm.processor.tokens import Tokenizer
from minivlm.sampler import Choice
from minivlm.vlm import VLM

HEADROOM = 256  # positions that a cache first has for an answer without a limit; it grows when they are used
PREFILL_CHUNK = 8192  # packed positions that prefill computes at once, which bounds its memory


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
    """

    def __init__(
        self, inputs: Inputs, options: Options, vocabulary: Vocabulary, context: int, past: Sequence[int] = ()
    ):
        """inputs: new ids and pictures, to be prefilled behind `past`, the ids that the cache already holds.

        context: the most ids that the model can read. Raises InputError if prompt and answer do not fit.
        """
        self.inputs, self.options, self.vocabulary = inputs, options, vocabulary
        self.sampling = options.sampling.seeded()
        self.ids, self.cached = [*past, *inputs.ids], len(past)
        self.prompt_tokens = len(self.ids)
        self.limit = _limit(self.prompt_tokens, options.max_new_tokens, context)
        self.finish_reason: FinishReason | None = None
        self._stream = vocabulary.tokenizer.stream()
        self._stop = StopStrings(options.stop)

    def accept(self, choice: Choice) -> Token:
        """Append the chosen id; sets `finish_reason` if it was the last."""
        self.ids.append(choice.id)
        if choice.id in self.vocabulary.eos_ids:
            reason, text = "stop", ""
        else:
            reason = "length" if len(self.ids) == self.limit else None
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


def new_cache(model: VLM, rows: Sequence[Row]) -> KVCache:
    """A cache with a slot for each row, as long as the longest; answers without a limit and later turns grow it."""
    return model.language_model.new_cache(len(rows), max(_capacity(row) for row in rows))


def _capacity(row: Row) -> int:
    """The positions to have before its first step."""
    if row.options.max_new_tokens is None:
        return min(row.limit, row.prompt_tokens + HEADROOM)
    return row.limit


def generate(
    model: VLM, rows: Sequence[Row], cache: KVCache, chunk: int = PREFILL_CHUNK
) -> Iterator[tuple[int, Token]]:
    """Run the rows to their ends, row i in slot i; yields (i, token) as each is chosen.

    chunk: the most packed positions that prefill computes at once; the result does not depend on it. The
    iterator can be dropped at any time: `Row.ids` and `Row.cached` then say what was generated and how much
    of it the cache holds. Raises NumericError for logits that are not numbers.
    """
    if not rows:
        return
    backend = model.language_model.backend
    step = backend.decoding(model.language_model, cache)
    choose = backend.sampler(rows[0].vocabulary.allowed.to(cache.keys.device))
    logits = _prefill(model, rows, cache, chunk)  # [B, V]
    running = list(range(len(rows)))
    while True:
        states = [rows[i] for i in running]
        samplings, ids = [row.sampling for row in states], [row.ids for row in states]
        choices = choose(logits, samplings, [len(row) for row in ids], ids)
        tokens = [row.accept(choice) for row, choice in zip(states, choices, strict=True)]
        yield from zip(running, tokens, strict=True)
        running = [i for i in running if rows[i].finish_reason is None]
        if not running:
            return
        logits = _decode(model, rows, running, cache, step)


@torch.inference_mode()
def _prefill(model: VLM, rows: Sequence[Row], cache: KVCache, chunk: int) -> Tensor:
    """The prompts through the decoder; logits [B, V] of each row's last position."""
    decoder = model.language_model
    embeddings = model.embed([row.inputs for row in rows])  # [S, D]
    cache.grow(max(_capacity(row) for row in rows))
    lengths, starts = [len(row.inputs.ids) for row in rows], [row.cached for row in rows]
    last: dict[int, Tensor] = {}
    at = 0
    for part in parts(lengths, starts, chunk):
        size = sum(part.lengths)
        hidden = decoder(embeddings[at : at + size], part, cache)
        for slot, position in zip(part.slots, part.last, strict=True):
            last[slot] = hidden[position]  # a later part of the row replaces it
        at += size
    for row in rows:
        row.cached = len(row.ids)
    return decoder.logits(torch.stack([last[slot] for slot in range(len(rows))]))


@torch.inference_mode()
def _decode(model: VLM, rows: Sequence[Row], running: Sequence[int], cache: KVCache, step: Callable) -> Tensor:
    """The running rows' last ids through the decoder in one packed step; logits [B, V]."""
    starts = [rows[i].cached for i in running]
    cache.grow(max(starts) + 1)
    hidden = step([rows[i].ids[-1] for i in running], Rows.causal([1] * len(running), starts, running))  # [B, D]
    for i in running:
        rows[i].cached += 1
    return model.language_model.logits(hidden)


def parts(lengths: Sequence[int], starts: Sequence[int], size: int) -> Iterator[Rows]:
    """The packed prompts cut after every `size` positions.

    Lengths (3, 4) by 5 give lengths (3, 2) of slots (0, 1), then 2 of slot 1 that start at 2.
    """
    if size < 1:
        raise InputError(f"chunk: found {size}, expected at least 1")
    part: list[tuple[int, int, int]] = []  # (length, start, slot)
    room = size
    for slot, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        while length > 0:
            taken = min(length, room)
            part.append((taken, start, slot))
            length, start, room = length - taken, start + taken, room - taken
            if room == 0:
                yield Rows.causal(*zip(*part, strict=True))
                part, room = [], size
    if part:
        yield Rows.causal(*zip(*part, strict=True))


def collect(rows: Sequence[Row], tokens: Iterator[tuple[int, Token]]) -> list[Reply]:
    """The whole answers of rows from the iterator that `generate` returned for them."""
    began = perf_counter()
    answers: list[list[Token]] = [[] for _ in rows]
    times: list[list[float]] = [[] for _ in rows]
    for i, token in tokens:
        answers[i].append(token)
        times[i].append(perf_counter())
    return [
        Reply(tuple(answer), row.prompt_tokens, row.sampling.seed, when[0] - began, when[-1] - when[0])
        for row, answer, when in zip(rows, answers, times, strict=True)
    ]
