"""Generation: prefill the prompts, then choose one token a step for every row that still runs.

A loop over batch.py, where the rows run. It knows nothing of files, pixels or chat templates.
"""

from collections.abc import Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor

from minivlm.answer import Reply, Token
from minivlm.batch import Batch, parts
from minivlm.ops.kv_cache import KVCache
from minivlm.row import Row, StopStrings, Vocabulary
from minivlm.vlm import VLM

__all__ = ["Row", "StopStrings", "Vocabulary", "collect", "generate", "new_cache", "parts"]

HEADROOM = 256  # positions that a cache first has for an answer without a limit; it grows when they are used
PREFILL_CHUNK = 8192  # packed positions that prefill computes at once, which bounds its memory


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
    batch = Batch(model, rows[0].vocabulary.allowed, cache, chunk)
    for slot, (row, embeddings) in enumerate(zip(rows, _embedded(model, rows), strict=True)):
        batch.join(row, slot, embeddings)
    cache.grow(max(_capacity(row) for row in rows))
    while batch.members:
        yield from [(member.slot, token) for member, token in batch.step()]


@torch.inference_mode()
def _embedded(model: VLM, rows: Sequence[Row]) -> Sequence[Tensor]:
    """The embeddings [S, D] of each row's new ids; all pictures are encoded together."""
    return model.embed([row.inputs for row in rows]).split([len(row.inputs.ids) for row in rows])


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
