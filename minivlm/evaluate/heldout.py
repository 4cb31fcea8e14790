"""Held-out questions, answered by greedy generation and scored: the table of what a checkpoint knows.

Pictures, questions and true answers come from the world's test split (train/questions.py), so nothing is stored;
another program can draw the same scenes (renderers.py). An answer is the text that a user would read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from minivlm.errors import InputError
from minivlm.evaluate.renderers import VARIANTS, render
from minivlm.pipeline import Pipeline
from minivlm.train.answers import score
from minivlm.train.draw import draw
from minivlm.train.questions import heldout
from minivlm.train.world import Scene

SCENE = "scene"  # the renderer that training used
RENDERERS = (SCENE, *VARIANTS)
COUNT = 180  # of a kind: the answers of presence (2), count (6) and position (9) come equally often
MAX_NEW_TOKENS = 96  # the longest true answer, a description of six things, has about 60
HALF = "IoU >= 0.5"  # the row for the share of boxes that are at least half right

# (kind, group) -> least mean score; the group "" is the whole kind. Pictures by the renderer SCENE only.
REQUIRED = {
    ("shape", ""): 0.9,
    ("colour", ""): 0.9,
    ("presence", "yes"): 0.9,
    ("presence", "no"): 0.9,
    ("count", ""): 0.9,
    ("position", ""): 0.9,
    ("box", ""): 0.7,
    ("text", ""): 0.8,
}
GROUPED = ("presence", "count", "count_of", "position", "text")  # kinds whose groups are reported


@dataclass(frozen=True)
class Answer:
    """One answered question. group: "yes", "4", "top left", "3 characters"; score: 0 to 1 (train/answers.py)."""

    kind: str
    group: str
    question: str
    expected: str
    answer: str
    score: float


@dataclass(frozen=True)
class Row:
    """n answers of a kind and a group ("" is all of the kind); score is their mean."""

    kind: str
    group: str
    n: int
    score: float


def evaluate(
    pipeline: Pipeline, kinds: Sequence[str], count: int, renderer: str = SCENE, seed: int = 0, batch: int = 16
) -> tuple[Answer, ...]:
    """Ask held-out questions 0 to count - 1 of every kind, `batch` at a time; a progress bar goes to stderr.

    The batch is a matter of speed and memory only. Raises InputError for an unknown kind or renderer.
    """
    for name, number, least in (("count", count, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if number < least:
            raise InputError(f"{name}: found {number}, expected at least {least}")
    answers = []
    with tqdm(desc=f"eval, {renderer}", total=count * len(kinds), unit="question", delay=1, leave=False) as bar:
        for kind in kinds:
            for first in range(0, count, batch):
                asked = [heldout(kind, index, seed) for index in range(first, min(first + batch, count))]
                requests = [(qa.question, [drawn(scene, renderer)]) for scene, qa in asked]
                replies = pipeline.generate_batch(requests, max_new_tokens=MAX_NEW_TOKENS)
                for (_, qa), reply in zip(asked, replies, strict=True):
                    right = score(kind, reply.text, qa.answer)
                    answers.append(Answer(kind, qa.extra, qa.question, qa.answer, reply.text, right))
                bar.update(len(asked))
    return tuple(answers)


def drawn(scene: Scene, renderer: str) -> np.ndarray:
    """The picture of a scene, uint8 [height, width, 3], by one of RENDERERS."""
    return draw(scene)[0] if renderer == SCENE else render(scene, renderer)


def rows(answers: Sequence[Answer]) -> list[Row]:
    """The table's rows: every kind in the order asked, each followed by its groups."""
    found = []
    for kind in dict.fromkeys(answer.kind for answer in answers):
        scores = {"": [answer.score for answer in answers if answer.kind == kind]}
        if kind == "box":
            scores[HALF] = [float(share >= 0.5) for share in scores[""]]
        if kind in GROUPED:
            for answer in answers:
                if answer.kind == kind:
                    scores.setdefault(answer.group, []).append(answer.score)
        names = sorted(scores) if kind == "text" else list(scores)  # the others are asked in the order to show
        found += [Row(kind, name, len(scores[name]), sum(scores[name]) / len(scores[name])) for name in names]
    return found


@dataclass(frozen=True)
class Report:
    """The answers of one checkpoint by renderer, on the same questions."""

    model: str
    seed: int
    answers: Mapping[str, tuple[Answer, ...]]

    @property
    def measured(self) -> list[Row]:
        """The rows that REQUIRED sets a score for."""
        return [row for row in rows(self.answers.get(SCENE, ())) if (row.kind, row.group) in REQUIRED]

    @property
    def short(self) -> list[Row]:
        """The required rows that were measured and fall short."""
        return [row for row in self.measured if row.score < REQUIRED[row.kind, row.group]]

    @property
    def ok(self) -> bool:
        """Whether something required was measured and nothing of it fell short."""
        return bool(self.measured) and not self.short

    def lines(self) -> list[str]:
        """The table in percent: a row per kind and group, a column per renderer, and what is required."""
        columns = {renderer: rows(answers) for renderer, answers in self.answers.items()}
        widths = {renderer: max(6, len(renderer)) for renderer in columns}
        heading = "".join(f"  {renderer:>{widths[renderer]}}" for renderer in columns)
        lines = [f"{self.model}: % right; box: mean IoU", "", f"{'':16}{'n':>5}{heading}  required"]
        verdicts = {(row.kind, row.group): "FAIL" if row in self.short else "pass" for row in self.measured}
        for cells in zip(*columns.values(), strict=True):
            key, n = (cells[0].kind, cells[0].group), cells[0].n
            line = f"{'  ' + key[1] if key[1] else key[0]:16}{n:5}"
            for cell, width in zip(cells, widths.values(), strict=True):
                line += f"  {100 * cell.score:{width}.1f}"
            lines.append(line + (f"  {100 * REQUIRED[key]:3.0f} {verdicts[key]}" if key in verdicts else ""))
        if verdicts:
            lines += ["", f"{len(verdicts) - len(self.short)} of {len(verdicts)} required scores reached"]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Scores with what is required of them, and every answer, for json.dumps."""
        scores = {}
        for renderer, answers in self.answers.items():
            required = REQUIRED if renderer == SCENE else {}
            table = [asdict(row) | {"required": required.get((row.kind, row.group))} for row in rows(answers)]
            scores[renderer] = table
        answers = {renderer: [asdict(one) for one in answers] for renderer, answers in self.answers.items()}
        return {"model": self.model, "seed": self.seed, "ok": self.ok, "scores": scores, "answers": answers}
