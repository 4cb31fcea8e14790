"""Two runs of one computation compared stage by stage: how far apart they are, and where they first part.

It knows nothing of models: a stage is a name and a tensor. Ours is minivlm's run; theirs is transformers', the
truth that differences are measured against.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

GREEDY_TOKENS, GREEDY_LOGITS = "greedy tokens", "greedy logits"  # ids [T], and the logits they were chosen by

Verdict = Literal["equal", "within", "departs", "missing"]


@dataclass(frozen=True)
class Stages:
    """What one run computed: tensors on the CPU in the order of computation; notes for the reader."""

    values: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """One stage compared.

    absolute: the largest difference of two numbers; relative: that divided by the largest magnitude that theirs
    has in this stage; None where there is nothing to subtract. limit bounds relative. detail: how it departs.
    """

    stage: str
    shape: tuple[int, ...]
    absolute: float | None
    relative: float | None
    limit: float
    verdict: Verdict
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the stage agrees."""
        return self.verdict in ("equal", "within")


@dataclass(frozen=True)
class Report:
    """All stages in order; setting: what was run; notes: what a reader should know besides."""

    setting: Mapping[str, str]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Difference | None:
        """The first stage that departs, or None."""
        return next((difference for difference in self.differences if not difference.ok), None)

    @property
    def ok(self) -> bool:
        """Whether every stage agrees."""
        return self.first is None

    def lines(self) -> list[str]:
        """The report as text: a table, the notes, and the verdict as the last line."""
        lines = [", ".join(f"{key} {value}" for key, value in self.setting.items())]
        width = max(len(difference.stage) for difference in self.differences)
        lines.append(f"{'stage':<{width}}  {'shape':<14}  absolute  relative     limit  verdict")
        for d in self.differences:
            numbers = "  ".join(f"{_short(number):>8}" for number in (d.absolute, d.relative, d.limit))
            shape = "x".join(map(str, d.shape))
            detail = f": {d.detail}" if d.absolute is None and d.detail else ""  # the numbers say the rest
            lines.append(f"{d.stage:<{width}}  {shape:<14}  {numbers}  {d.verdict}{detail}")
        lines += [f"note: {note}" for note in self.notes]
        total, equal = len(self.differences), sum(d.verdict == "equal" for d in self.differences)
        if self.first is not None:
            lines.append(f"parity fails, first at {self.first.stage}: {self.first.detail}")
        elif equal == total:
            lines.append(f"parity: all {total} stages are equal bit for bit")
        else:
            lines.append(f"parity: all {total} stages agree, {equal} bit for bit and the rest within the limits")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The report as plain data for `json.dumps`. A number that is infinite or not a number is null."""
        stages = [asdict(difference) for difference in self.differences]
        for stage in stages:
            for key in ("absolute", "relative"):
                if stage[key] is not None and not math.isfinite(stage[key]):
                    stage[key] = None
        first = None if self.first is None else self.first.stage
        return {
            "ok": self.ok,
            "first_departure": first,
            **self.setting,
            "notes": list(self.notes),
            "stages": stages,
        }


def _short(number: float | None) -> str:
    """`0` is exactly zero, `-` no number."""
    return "-" if number is None else "0" if number == 0 else f"{number:.1e}"


def compare(ours: Stages, theirs: Stages, limits: float | Mapping[str, float]) -> tuple[Difference, ...]:
    """Every stage that either run has, in order; one that the other lacks is missing, which is a departure.

    limits: the largest relative difference that agrees, of all stages or of each; a stage without one has 0.
    Where greedy tokens differ, greedy logits are compared up to that step: behind it the texts are different.
    """
    if not isinstance(limits, Mapping):
        limits = dict.fromkeys((*ours.values, *theirs.values), limits)
    a, b = dict(ours.values), dict(theirs.values)
    if {GREEDY_TOKENS, GREEDY_LOGITS} <= a.keys() & b.keys():
        steps = _same(a[GREEDY_TOKENS], b[GREEDY_TOKENS]) + 1
        a[GREEDY_LOGITS], b[GREEDY_LOGITS] = a[GREEDY_LOGITS][:steps], b[GREEDY_LOGITS][:steps]
    differences = []
    for stage in a | b:
        limit = limits.get(stage, 0.0)
        if stage not in a or stage not in b:
            lacks, found = ("transformers", a[stage]) if stage in a else ("minivlm", b[stage])
            detail = f"{lacks} has no such stage"
            differences.append(Difference(stage, tuple(found.shape), None, None, limit, "missing", detail))
        elif stage == GREEDY_TOKENS:
            logits = a[GREEDY_LOGITS], b[GREEDY_LOGITS]
            differences.append(_compare_tokens(a[stage], b[stage], *logits, limits.get(GREEDY_LOGITS, 0.0)))
        else:
            differences.append(_compare(stage, a[stage], b[stage], limit))
    return tuple(differences)


def relative_differences(ours: Stages, theirs: Stages) -> dict[str, float]:
    """The largest relative difference of every stage that both runs have in the same shape and type."""
    found = {d.stage: d.relative for d in compare(ours, theirs, math.inf)}
    return {stage: relative for stage, relative in found.items() if relative is not None}


def _compare(stage: str, ours: Tensor, theirs: Tensor, limit: float) -> Difference:
    """Numbers against numbers. NaN equals NaN and infinity itself: both runs overflowed alike."""
    shape = tuple(ours.shape)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        kinds = (f"{kind.dtype} {list(kind.shape)}" for kind in (ours, theirs))
        detail = "{} in minivlm, {} in transformers".format(*kinds)
        return Difference(stage, shape, None, None, limit, "departs", detail)
    wide = torch.float32 if ours.dtype.is_floating_point else torch.float64  # holds every id exactly
    a, b = ours.to(wide), theirs.to(wide)
    distance = (a - b).abs_()
    distance[(a == b) | (a.isnan() & b.isnan())] = 0
    at = int(distance.argmax())  # of NaN, if there is one
    absolute = float(distance.flatten()[at])
    relative = absolute / _scale(b) if absolute else 0.0
    if absolute == 0:
        return Difference(stage, shape, absolute, relative, limit, "equal")
    if relative <= limit:
        return Difference(stage, shape, absolute, relative, limit, "within")
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), ours.shape)]
    values = f"{float(a.flatten()[at]):.7g} in minivlm, {float(b.flatten()[at]):.7g} in transformers"
    return Difference(stage, shape, absolute, relative, limit, "departs", f"farthest at {place}: {values}")


def _compare_tokens(ours: Tensor, theirs: Tensor, our_logits: Tensor, their_logits: Tensor, limit: float) -> Difference:
    """Ids against ids. The first that differs is within the limit of the logits if the two best were that near.

    Example: logits of at most 20 that may be off by 1e-3 of that, 0.02, can exchange two that lie 0.04 apart.
    """
    at, shape = _same(ours, theirs), tuple(ours.shape)
    if at == len(ours) == len(theirs):
        return Difference(GREEDY_TOKENS, shape, None, None, limit, "equal")
    if at == min(len(ours), len(theirs)):
        detail = f"{len(ours)} tokens in minivlm, {len(theirs)} in transformers"
        return Difference(GREEDY_TOKENS, shape, None, None, limit, "departs", detail)
    gaps = [float(-logits[at].float().topk(2).values.diff()) for logits in (our_logits, their_logits)]
    detail = (
        f"token {at} is {int(ours[at])} in minivlm (its two best logits {gaps[0]:.2g} apart), "
        f"{int(theirs[at])} in transformers ({gaps[1]:.2g} apart)"
    )
    near = gaps[1] <= 2 * limit * _scale(their_logits)
    return Difference(GREEDY_TOKENS, shape, None, None, limit, "within" if near else "departs", detail)


def _scale(values: Tensor) -> float:
    """The largest finite magnitude; 1 where there is none, so that a relative difference is never 0 / 0."""
    finite = values[values.isfinite()].abs()
    return float(finite.max()) or 1.0 if finite.numel() else 1.0


def _same(ours: Tensor, theirs: Tensor) -> int:
    """How many ids agree from the start."""
    n = min(len(ours), len(theirs))
    return int((ours[:n] == theirs[:n]).cumprod(0).sum())
