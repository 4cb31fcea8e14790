"""Sampler: from a row of logits to the next id and its log-probability.

It knows nothing of models or text, and holds no state: the noise of a draw is a pure function of (seed,
position, token id), see noise.py.

Warpers: transformers' order and meaning (repetition penalty: Keskar et al. 2019, CTRL; top-k: Fan et al.
2018; top-p: Holtzman et al. 2020; min-p: Nguyen et al. 2024; typical-p: Meister et al. 2023). Frequency and presence
penalty and logit bias: OpenAI's definitions. Drawing: Gumbel-max, argmax(score + Gumbel noise) follows softmax(score).
"""

import dataclasses
import math
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from minivlm import warpers
from minivlm.errors import InputError, NumericError
from minivlm.noise import noises

NOISE = 2**15  # most ids of several rows whose noise is computed at once: more would leave the processor's caches

TINY, LARGEST = math.ulp(0.0), sys.float_info.max  # the smallest number above 0; the largest below infinity
LARGEST_BIAS = 100  # enough to forbid an id, or to force it
NOTHING_ALLOWED = "allowed: found no id of positive probability, expected at least one"
RANGES = {  # field of Sampling: type, lowest, highest, and both in words
    "temperature": (float, 0, LARGEST, "0 (greedy) or a positive finite number"),
    "top_k": (int, 1, math.inf, "an integer of at least 1, or None to keep every id"),
    "top_p": (float, TINY, 1, "a number above 0 and at most 1"),
    "min_p": (float, 0, 1, "a number from 0 to 1"),
    "typical_p": (float, TINY, 1, "a number above 0 and at most 1"),
    "repetition_penalty": (float, TINY, LARGEST, "a positive finite number (1 is no penalty)"),
    "frequency_penalty": (float, -2, 2, "a number from -2 to 2 (0 is no penalty)"),
    "presence_penalty": (float, -2, 2, "a number from -2 to 2 (0 is no penalty)"),
    "seed": (int, 0, 2**64 - 1, "an integer from 0 to 2**64 - 1"),
    "top_logprobs": (int, 0, 20, "an integer from 0 to 20"),
}


@dataclass(frozen=True)
class Sampling:
    """How one row chooses its ids. `Sampling()` is greedy.

    The one rule of when ids are drawn: **giving any of `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`
    or `seed` asks for sampling**, at temperature 1 unless one is given. `temperature=0` is greedy spelled out; beside
    one of the others it is a contradiction and an InputError. So is any value outside its range (RANGES).

    temperature         divides the scores
    top_k               keeps the k best scores
    top_p               keeps the smallest set of best scores with at least this probability
    min_p               keeps what has at least min_p times the probability of the best
    typical_p           keeps the smallest set of ids with at least this probability whose surprise, -log p, is nearest
                        to the one expected, the entropy: the best may be among those that go
    repetition_penalty  of ids in the row so far: divides positive scores, multiplies negative; greedy too
    frequency_penalty   taken from an id's score as often as the id stands in the answer so far; greedy too
    presence_penalty    taken from it once if the id stands there at all; greedy too
    logit_bias          ids with what is added to their scores, from -100 to 100; greedy too. Given as a mapping, kept
                        as pairs in the order of ids, without zeros: equal biases are equal, and can be hashed
    seed                64 bits; a row that draws needs one, see `seeded`
    top_logprobs        the number of alternatives to report
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0
    typical_p: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | warpers.Bias = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in RANGES or (value is None and field.default is None):
                continue
            kind, lowest, highest, expected = RANGES[field.name]
            if not _within(value, kind, lowest, highest):
                raise InputError(f"{field.name}: found {value!r}, expected {expected}")
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        if self.temperature == 0 and self._drawing():
            raise InputError(
                f"temperature: found 0, which is greedy, beside {', '.join(self._drawing())}, which asks for "
                "sampling; expected a positive temperature, or 0 without them"
            )

    def _drawing(self) -> list[str]:
        """The given fields, other than the temperature, that matter only when ids are drawn."""
        given = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p", "typical_p", "seed")}
        return [f"{name}={value}" for name, value in given.items() if value is not None]

    @property
    def greedy(self) -> bool:
        """True when the best score is taken and nothing is drawn."""
        return self.temperature == 0 or (self.temperature is None and not self._drawing())

    @property
    def plain(self) -> bool:
        """True when nothing is asked for but the best score."""
        return self.greedy and self.repetition_penalty == 1 and self.top_logprobs == 0 and not self.shifted

    @property
    def shifted(self) -> bool:
        """True when a bias, a frequency or a presence penalty is added to scores."""
        return bool(self.logit_bias or self.frequency_penalty or self.presence_penalty)

    def seeded(self) -> "Sampling":
        """Itself, or a copy with a fresh seed if it draws and has none; once a request, so it can be told."""
        if self.greedy or self.seed is not None:
            return self
        return dataclasses.replace(self, seed=secrets.randbits(64))


def _within(value: object, kind: type, lowest: float, highest: float) -> bool:
    """An int may stand for a float, a bool (to Python an int) for neither. NaN compares false."""
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and lowest <= value <= highest


def _pairs(bias: Mapping[int, float] | warpers.Bias) -> warpers.Bias:
    """{7: 1, 3: -5, 4: 0} -> ((3, -5.0), (7, 1.0)), which stays itself. Raises InputError for what is no bias."""
    pairs = tuple(bias.items()) if isinstance(bias, Mapping) else bias
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise InputError(f"logit_bias: found {bias!r}, expected a mapping of ids to numbers")
    for token_id, value in pairs:
        if not _within(token_id, int, 0, math.inf):
            raise InputError(f"logit_bias: found id {token_id!r}, expected an integer of at least 0")
        if not _within(value, float, -LARGEST_BIAS, LARGEST_BIAS):
            expected = f"a number from {-LARGEST_BIAS} to {LARGEST_BIAS}"
            raise InputError(f"logit_bias of id {token_id}: found {value!r}, expected {expected}")
    if len({token_id for token_id, _ in pairs}) < len(pairs):
        raise InputError("logit_bias: found an id twice, expected each once")
    return tuple(sorted((token_id, float(value)) for token_id, value in pairs if value != 0))


@dataclass(frozen=True)
class Choice:
    """The next id of one row. Log-probabilities are natural logarithms.

    logprob          of the raw distribution: log_softmax of the logits as the model gave them, over all of V
    sampled_logprob  of the distribution that was chosen from: log_softmax of the warped scores. A greedy row
                     is warped by `allowed`, bias and penalties alone: without them it is `logprob`
    alternatives     the `top_logprobs` best allowed (id, logprob) of the raw distribution, best first, equals
                     by id; the chosen id is among them if it ranks. Ids of probability zero are left out, so
                     there may be fewer
    """

    id: int
    logprob: float
    sampled_logprob: float
    alternatives: tuple[tuple[int, float], ...]


def sample(
    logits: torch.Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    seen: Sequence[Sequence[int]],
    allowed: torch.Tensor | None = None,
    starts: Sequence[int] | None = None,
) -> tuple[Choice, ...]:
    """Choose the next id of every row.

    logits:    [B, V], any floating type; all arithmetic on them is float32
    samplings: B settings; rows may differ
    positions: B indices, each that of the chosen token in its row: the number of ids before it
    seen:      B rows of ids so far, prompt included; read only for penalties
    allowed:   [V] or [B, V] bool, or None for all: the ids that may be chosen. A vocabulary padded beyond the
               tokenizer's needs `torch.arange(V) < tokens` here, or an id that has no text can be chosen
    starts:    B numbers of prompt ids, behind which a row's answer begins; None: all of each row is its answer

    Raises NumericError when logits hold NaN, +inf or nothing finite; InputError when arguments do not fit.
    """
    rows, vocabulary = logits.shape
    lengths = (len(samplings), len(positions), len(seen))
    if lengths != (rows, rows, rows):
        raise InputError(f"samplings, positions, seen: found {lengths} rows, expected {rows} of each")
    starts = [0] * rows if starts is None else starts
    if len(starts) != rows or not all(0 <= start <= len(ids) for start, ids in zip(starts, seen, strict=True)):
        expected = f"{rows} numbers of prompt ids, each at most those of its row, {[len(ids) for ids in seen]}"
        raise InputError(f"starts: found {list(starts)}, expected {expected}")
    if allowed is None:
        allowed = torch.ones(vocabulary, dtype=torch.bool, device=logits.device)
    if allowed.dtype != torch.bool or allowed.shape not in ((vocabulary,), (rows, vocabulary)):
        raise InputError(
            f"allowed: found {allowed.dtype} {list(allowed.shape)}, "
            f"expected torch.bool [{vocabulary}] or [{rows}, {vocabulary}]"
        )
    if all(sampling.plain for sampling in samplings):
        return _best_of_each(logits.detach().float(), positions, allowed)
    largest = logits.amax(dim=-1).tolist()  # one transfer for all rows; a maximum passes NaN on
    require_finite(largest, positions)
    so_far = list(zip(seen, starts, strict=True))
    return _choices(logits.detach().float(), samplings, positions, so_far, allowed.expand(rows, vocabulary))


def require_finite(largest: Sequence[float], positions: Sequence[int]) -> None:
    """Raises NumericError that names the first row whose largest logit is no finite number, and its position."""
    for row, (found, position) in enumerate(zip(largest, positions, strict=True)):
        if not math.isfinite(found):
            raise NumericError(
                f"logits of row {row}, position {position}: the largest is {found}, expected a finite number"
            )


def _best_of_each(logits: torch.Tensor, positions: Sequence[int], allowed: torch.Tensor) -> tuple[Choice, ...]:
    """What `_choose` gives for plain greedy rows, of all of them at once: ten small operators, where a row takes 20."""
    scores = logits.where(allowed, -math.inf)  # [B, V]
    ids = scores.argmax(dim=-1, keepdim=True)  # [B, 1]
    both = torch.stack((logits, scores)).log_softmax(dim=-1)
    raw, sampled = both.gather(-1, ids.expand(2, -1, -1)).squeeze(-1).tolist()
    if any(map(math.isnan, raw)):  # one NaN, one +inf or nothing finite makes every logarithm NaN
        require_finite(logits.amax(dim=-1).tolist(), positions)
    if any(map(math.isnan, sampled)):
        raise InputError(NOTHING_ALLOWED)
    chosen = ids.squeeze(-1).tolist()
    return tuple(Choice(*row, ()) for row in zip(chosen, raw, sampled, strict=True))


def _choices(
    logits: torch.Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    so_far: Sequence[tuple[Sequence[int], int]],
    allowed: torch.Tensor,
) -> tuple[Choice, ...]:
    """Of any rows: what is asked for alike is computed of all rows that ask for it at once.

    so_far: of each row its ids, and how many of them are the prompt.
    """
    alike: dict[tuple, list[int]] = {}
    for row, s in enumerate(samplings):
        if not s.greedy and s.seed is None:
            raise InputError("seed: found None in a row that draws, expected one (see Sampling.seeded)")
        settings = (s.greedy, s.temperature, s.top_k, s.top_p, s.min_p, s.typical_p, s.repetition_penalty)
        settings += (s.frequency_penalty, s.presence_penalty, s.logit_bias)
        alike.setdefault(settings, []).append(row)
    if len(alike) == 1:
        scores = _warp_rows(logits, so_far, samplings[0], allowed)
    else:
        scores = torch.empty_like(logits)
        for rows in alike.values():
            part = [so_far[row] for row in rows]
            scores[rows] = _warp_rows(logits[rows], part, samplings[rows[0]], allowed[rows])
    drawing = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    drawn = _draw([scores[i] for i in drawing], [samplings[i].seed for i in drawing], [positions[i] for i in drawing])
    # Of equals the lowest id, as torch documents argmax.
    ids = drawn if len(drawn) == len(samplings) else scores.argmax(dim=-1).tolist()
    for row, token_id in zip(drawing, drawn, strict=True):
        ids[row] = token_id
    places = torch.tensor(ids, device=logits.device)[:, None]
    logprobs = logits.log_softmax(dim=-1)
    raw, sampled = (x.gather(-1, places).squeeze(-1).tolist() for x in (logprobs, scores.log_softmax(dim=-1)))
    numbers = zip(ids, raw, sampled, strict=True)
    return tuple(
        Choice(*of_row, _best(logprobs[row], allowed[row], samplings[row].top_logprobs))
        for row, of_row in enumerate(numbers)
    )


def _draw(scores: Sequence[torch.Tensor], seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    """An id of each row by Gumbel-max; scores [V] of each.

    Only what was kept needs noise, at top_k=50 that is 50 ids of 32,064. It is drawn on the CPU: not every device has
    float64, and logarithms may differ in the last bit between devices.
    """
    kept = [row.isfinite().nonzero().squeeze(-1) for row in scores]
    ids = [places.cpu() for places in kept]
    drawn, first = [], 0
    while first < len(ids):  # as many rows at once as have few ids: noise costs its 150 operators, whatever they are of
        end, count = first + 1, len(ids[first])
        while end < len(ids) and count + len(ids[end]) <= NOISE:
            count, end = count + len(ids[end]), end + 1
        noise = noises(seeds[first:end], positions[first:end], ids[first:end])
        for row, of_row in enumerate(noise, first):
            noisy = scores[row][kept[row]].cpu().double() + of_row
            drawn.append(int(ids[row][noisy.argmax()]))
        first = end
    return drawn


def _best(logprobs: torch.Tensor, allowed: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    logprobs = logprobs.masked_fill(~allowed, -math.inf)
    values, ids = logprobs.sort(descending=True, stable=True)  # topk promises no order among equals
    pairs = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
    return tuple((token_id, value) for token_id, value in pairs if value > -math.inf)


def warp(
    logits: torch.Tensor, seen: Sequence[int], sampling: Sampling, allowed: torch.Tensor | None = None, start: int = 0
) -> torch.Tensor:
    """The scores one row chooses from: logits [V] float32 -> [V] float32, -inf where an id may not be chosen.

    In this order: `allowed`, logit bias, repetition penalty, frequency and presence penalty, temperature, top-k, top-p,
    min-p, typical-p. Each reads the result of the one before, so top-p is a share of what top-k kept. A greedy row
    stops before the temperature. start: the number of prompt ids in `seen`.

    Equal scores share one fate: if the last kept score has equals, all of them are kept, and the result does
    not depend on the order in which a sort leaves them. Probabilities .4 .2 .2 .2 with top_p=0.5 keep all
    four; transformers keeps .4 and the one .2 that its sort put last. Without such ties the kept set is
    transformers'.

    Ids in `seen` at or beyond V (an image placeholder that the head cannot produce) have no score to
    penalise. Raises InputError when `allowed` leaves nothing, the scores overflow float32, or an id that has no score
    shall get a bias.
    """
    mask = None if allowed is None else allowed[None]
    return _warp_rows(logits[None], [(seen, start)], sampling, mask)[0]


def _warp_rows(
    scores: torch.Tensor, so_far: Sequence[tuple[Sequence[int], int]], sampling: Sampling, allowed: torch.Tensor | None
) -> torch.Tensor:
    """`warp` of rows with the same settings: [B, V] -> [B, V]."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
        if -math.inf in scores.amax(dim=-1).tolist():
            raise InputError(NOTHING_ALLOWED)
    if sampling.logit_bias:
        scores = warpers.biased(scores, sampling.logit_bias)
    if sampling.repetition_penalty != 1:
        scores = warpers.without_repetition(scores, [ids for ids, _ in so_far], float(sampling.repetition_penalty))
    if sampling.frequency_penalty or sampling.presence_penalty:
        answers = [ids[start:] for ids, start in so_far]
        penalties = float(sampling.frequency_penalty), float(sampling.presence_penalty)
        scores = warpers.without_frequent(scores, answers, *penalties)
    if sampling.temperature is not None and not sampling.greedy:
        scores = scores / float(sampling.temperature)
    if not all(map(math.isfinite, scores.amax(dim=-1).tolist())):
        raise InputError(
            f"temperature={sampling.temperature}, repetition_penalty={sampling.repetition_penalty}: "
            "found scores beyond the range of float32, expected settings nearer to 1"
        )
    if sampling.greedy:
        return scores
    if sampling.top_k is not None:
        scores = warpers.top_k(scores, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        scores = warpers.top_p(scores, sampling.top_p)
    if sampling.min_p is not None:
        scores = warpers.min_p(scores, sampling.min_p)
    if sampling.typical_p is not None and sampling.typical_p < 1:
        scores = warpers.typical_p(scores, sampling.typical_p)
    return scores
