"""What may be done to scores before an id is chosen: bias, penalties, top-k, top-p, min-p, typical-p; each a function.

Scores are float32 [B, V], those of B rows that ask for the same, -inf where an id may not be chosen. What comes out is
new: nothing is written to. In which order, and what it means, is said in sampler.py.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch

from minivlm.errors import InputError

Bias = tuple[tuple[int, float], ...]  # (id, what is added to its score), in the order of ids, each once


def biased(scores: torch.Tensor, bias: Bias) -> torch.Tensor:
    """Each id of the bias with its number added. Raises InputError for an id at or beyond V."""
    check_bias(bias, scores.shape[-1])
    added = torch.zeros(scores.shape[-1])
    added[[token_id for token_id, _ in bias]] = torch.tensor([value for _, value in bias])
    return scores + added.to(scores.device)


def check_bias(bias: Bias, vocabulary: int) -> None:
    """Raises InputError for the bias of an id that a head of so many rows has no score for."""
    if bias and bias[-1][0] >= vocabulary:
        raise InputError(f"logit_bias: found id {bias[-1][0]}, expected ids below {vocabulary}, the vocabulary's size")


def without_repetition(scores: torch.Tensor, seen: Sequence[Collection[int]], penalty: float) -> torch.Tensor:
    """Every id of a row's `seen` made less likely, once however often it occurs. By 2: 3 -> 1.5, -3 -> -6."""
    occurs = occurring(seen, scores.shape[-1]).to(scores.device)
    return torch.where(occurs, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def occurring(seen: Sequence[Collection[int]], vocabulary: int) -> torch.Tensor:
    """bool [B, V] on the CPU: which of the ids that have a score stand in each row's `seen`."""
    occurs = torch.zeros(len(seen), vocabulary, dtype=torch.bool)
    for row, of_row in enumerate(seen):
        occurs[row, _scored(set(of_row), vocabulary)] = True
    return occurs


def without_frequent(
    scores: torch.Tensor, answers: Sequence[Collection[int]], frequency: float, presence: float
) -> torch.Tensor:
    """Of an id that stands n > 0 times in its row's answer, n * frequency + presence is taken away."""
    counts = torch.zeros(scores.shape)  # [B, V]
    for row, answer in enumerate(answers):
        found = Counter(answer)
        ids = _scored(found, scores.shape[-1])
        counts[row, ids] = torch.tensor([float(found[token_id]) for token_id in ids])
    counts = counts.to(scores.device)
    return scores - (frequency * counts + presence * (counts > 0))


def _scored(ids: Collection[int], vocabulary: int) -> list[int]:
    """Those of the ids that have a score."""
    if ids and min(ids) < 0:
        raise InputError(f"seen: found id {min(ids)}, expected ids of at least 0")
    return [token_id for token_id in ids if token_id < vocabulary]


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k best, and those that equal the last of them."""
    worst = scores.topk(min(k, scores.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
    return scores.masked_fill(scores < worst, -math.inf)


def top_p(scores: torch.Tensor, mass: float) -> torch.Tensor:
    """The smallest set of best scores whose probability reaches `mass`, and those that equal the last of them.

    Summed from the worst upward, as transformers does, so that float32 rounds alike. Probabilities .5 .3 .15
    .05 and mass=0.7 give sums .05 .2 .5 1.0 against 1 - 0.7: the first two go, and .3, which crosses 0.7,
    stays.
    """
    ordered = scores.sort(dim=-1).values
    sums = ordered.softmax(dim=-1).cumsum(dim=-1)
    dropped = (sums <= 1 - mass).sum(dim=-1, keepdim=True)  # [B, 1]
    worst = ordered.gather(-1, dropped.clamp(max=scores.shape[-1] - 1))  # the best score is always kept
    return scores.masked_fill(scores < worst, -math.inf)


def min_p(scores: torch.Tensor, share: float) -> torch.Tensor:
    """What has at least `share` times the probability of the best."""
    probabilities = scores.softmax(dim=-1)
    least = share * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < least, -math.inf)


def typical_p(scores: torch.Tensor, mass: float) -> torch.Tensor:
    """The smallest set of typical ids whose probability reaches `mass`, and those as typical as the last of them.

    Typical is a surprise, -log p, near to the one expected, the entropy. Probabilities .5 .25 .125 .125 have an
    entropy of 1.75 bits and surprises of 1, 2, 3 and 3: .25 comes first, then .5, then both others. Summed in this
    order, as transformers does, so that float32 rounds alike.
    """
    logprobs = scores.log_softmax(dim=-1)
    entropy = -(logprobs * logprobs.exp()).nansum(dim=-1, keepdim=True)  # an id of probability 0 adds 0, not -inf * 0
    distance = (-logprobs - entropy).abs()
    ordered, ids = distance.sort(dim=-1)
    sums = scores.gather(-1, ids).softmax(dim=-1).cumsum(dim=-1)
    last = (sums < mass).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)  # [B, 1]
    return scores.masked_fill(distance > ordered.gather(-1, last), -math.inf)
