"""The sampler of backend `triton`: the fused kernel behind the plain sampler's arguments and results.

One launch chooses for all rows, and one transfer brings what was chosen. The kernel reads every setting from tensors;
what they mean, and what is an error, is said in minivlm/sampler.py.

It has no typical_p, frequency_penalty, presence_penalty and logit_bias: rows that ask for any of them are chosen by the
plain sampler, the others of the step by the kernel.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minivlm.errors import InputError, NumericError
from minivlm.kernels.sampling import BROKEN, NOTHING_ALLOWED, sample
from minivlm.ops import backend
from minivlm.sampler import Choice, Sampling, require_finite
from minivlm.warpers import occurring


def sampler(allowed: Tensor) -> Callable:
    """Chooses ids among the allowed, bool [V]: a function (logits [B, V], samplings, positions, seen) -> choices.

    Two arguments may follow: bitmasks, int32 [B, ceil(V / 32)] on the CPU, and-ed with the allowed; and how many ids of
    each row are its prompt, which only the plain sampler reads.
    """
    words = packed_bits(allowed)  # [ceil(V / 32)]
    plain = backend.sampler(allowed)

    def choose(
        logits: Tensor,
        samplings: Sequence[Sampling],
        positions: Sequence[int],
        seen: Sequence[Sequence[int]],
        bitmasks: Tensor | None = None,
        starts: Sequence[int] | None = None,
    ) -> tuple[Choice, ...]:
        rows, vocabulary = logits.shape
        if allowed.shape != (vocabulary,):
            raise InputError(f"allowed: found {list(allowed.shape)}, expected [{vocabulary}], as the logits are wide")
        lengths = (len(samplings), len(positions), len(seen))
        if lengths != (rows, rows, rows):
            raise InputError(f"samplings, positions, seen: found {lengths} rows, expected {rows} of each")
        masks = words.expand(rows, -1)
        if bitmasks is not None:
            if bitmasks.dtype != torch.int32 or bitmasks.shape != masks.shape:
                found = f"{bitmasks.dtype} {list(bitmasks.shape)}"
                raise InputError(f"bitmasks: found {found}, expected torch.int32 {list(masks.shape)}")
            masks = masks & bitmasks.to(logits.device)
        beyond = [row for row, sampling in enumerate(samplings) if sampling.typical_p is not None or sampling.shifted]
        if not beyond:
            return _fused(logits, samplings, positions, seen, masks)
        require_finite(logits.amax(dim=-1).tolist(), positions)  # here, where row numbers are those of the step
        arguments = _taken(beyond, logits, samplings, positions, seen, bitmasks, starts)
        found = dict(zip(beyond, plain(*arguments), strict=True))
        if others := [row for row in range(rows) if row not in found]:
            arguments = _taken(others, logits, samplings, positions, seen, masks)
            found |= zip(others, _fused(*arguments), strict=True)
        return tuple(found[row] for row in range(rows))

    return choose


def _taken(rows: list[int], *given: Tensor | Sequence | None) -> list:
    """Some rows of each of the arguments; None stays None."""

    def part(one: Tensor | Sequence | None) -> Tensor | list | None:
        if one is None or isinstance(one, Tensor):
            return None if one is None else one[rows]
        return [one[row] for row in rows]

    return [part(one) for one in given]


def _fused(
    logits: Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    seen: Sequence[Sequence[int]],
    masks: Tensor,
) -> tuple[Choice, ...]:
    """The kernel's choices; masks int32 [B, ceil(V / 32)]."""
    count = max((s.top_logprobs for s in samplings), default=0)
    arguments = (*settings(samplings, positions, logits.device), penalised(samplings, seen, logits))
    found = sample(logits, *arguments, masks, count)
    ids, logprobs, sampled, top_ids, top_logprobs, errors = (result.tolist() for result in found)
    for row, error in enumerate(errors):
        if error:
            _refuse(row, error, samplings[row], positions[row])
    choices = []
    for row, settings_of_row in enumerate(samplings):
        pairs = list(zip(top_ids[row], top_logprobs[row], strict=True))[: settings_of_row.top_logprobs]
        alternatives = tuple((i, value) for i, value in pairs if value > -torch.inf)
        choices.append(Choice(ids[row], logprobs[row], sampled[row], alternatives))
    return tuple(choices)


def packed_bits(allowed: Tensor) -> Tensor:
    """bool [V] -> int32 [ceil(V / 32)], bit i % 32 of word i // 32: (1, 0, 1, 1) is 13."""
    padded = torch.nn.functional.pad(allowed, (0, -len(allowed) % 32)).view(-1, 32).long()
    words = (padded << torch.arange(32, device=allowed.device)).sum(-1)  # [ceil(V / 32)], from 0 to 2^32 - 1
    return torch.where(words < 2**31, words, words - 2**32).int()


def settings(samplings: Sequence[Sampling], positions: Sequence[int], device) -> tuple[Tensor, ...]:
    """seeds, positions, temperature, top_k, top_p, min_p, repetition_penalty: one tensor [B] of each."""
    seeds = []
    for sampling in samplings:
        if not sampling.greedy and sampling.seed is None:
            raise InputError("seed: found None in a row that draws, expected one (see Sampling.seeded)")
        seed = sampling.seed or 0
        seeds.append(seed - 2**64 if seed >= 2**63 else seed)  # the same 64 bits
    heats = [0.0 if s.greedy else 1.0 if s.temperature is None else float(s.temperature) for s in samplings]
    columns = (
        (seeds, torch.int64),
        (positions, torch.int64),
        (heats, torch.float64),
        ([min(s.top_k or 0, 2**31 - 1) for s in samplings], torch.int32),
        ([1.0 if s.top_p is None else float(s.top_p) for s in samplings], torch.float64),
        ([0.0 if s.min_p is None else float(s.min_p) for s in samplings], torch.float64),
        ([float(s.repetition_penalty) for s in samplings], torch.float64),
    )
    return tuple(torch.tensor(list(column), dtype=dtype, device=device) for column, dtype in columns)


def penalised(samplings: Sequence[Sampling], seen: Sequence[Sequence[int]], logits: Tensor) -> Tensor | None:
    """bool [B, V]: the ids so far of rows with a repetition penalty; None where no row has one."""
    if all(s.repetition_penalty == 1 for s in samplings):
        return None
    read = [ids if s.repetition_penalty != 1 else () for s, ids in zip(samplings, seen, strict=True)]
    return occurring(read, logits.shape[1]).to(logits.device)


def _refuse(row: int, error: int, sampling: Sampling, position: int) -> None:
    """The plain sampler's errors."""
    if error == BROKEN.value:
        raise NumericError(
            f"logits of row {row}, position {position}: found NaN, infinity or nothing finite, expected finite numbers"
        )
    if error == NOTHING_ALLOWED.value:
        raise InputError("allowed: found no id of positive probability, expected at least one")
    raise InputError(
        f"temperature={sampling.temperature}, repetition_penalty={sampling.repetition_penalty}: "
        "found scores beyond the range of float32, expected settings nearer to 1"
    )
