"""Answers as text: boxes, the nine parts of a picture, and how an answer is scored."""

import re

from minivlm.errors import InputError
from minivlm.train.outlines import Box

CELLS = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip


def box_text(box: Box) -> str:
    """A box in the world's coordinates: (0.1234, ...) -> "[0.12, ...]", each a multiple of 0.02."""
    return "[" + ", ".join(f"{min(50, max(0, round(50 * share))) / 50:.2f}" for share in box) + "]"


def cell(box: Box, margin: float) -> str | None:
    """The ninth of the picture that holds the box's centre; None if within `margin` of a dividing line."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    if min(abs(x - 1 / 3), abs(x - 2 / 3), abs(y - 1 / 3), abs(y - 2 / 3)) < margin:
        return None
    return CELLS[3 * min(2, int(3 * y)) + min(2, int(3 * x))]


_BOX = re.compile(r"\[\s*(\d\.\d+),\s*(\d\.\d+),\s*(\d\.\d+),\s*(\d\.\d+)\s*\]")


def parsed_box(answer: str) -> Box | None:
    """The box that an answer is, or None: "[0.10, 0.20, 0.30, 0.40]" and nothing else."""
    found = _BOX.fullmatch(answer.strip())
    return tuple(float(share) for share in found.groups()) if found else None


def score(kind: str, answer: str, expected: str) -> float:
    """1.0 for the expected answer, else 0.0: case counts for text only. Boxes: intersection over union."""
    if kind == "box":
        a, b = parsed_box(answer), parsed_box(expected)
        if b is None:
            raise InputError(f"expected answer {expected!r} is not a box such as [0.10, 0.20, 0.30, 0.40]")
        if a is None or a[2] <= a[0] or a[3] <= a[1]:
            return 0.0
        shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
    answer, expected = answer.strip(), expected.strip()
    return float(answer == expected) if kind == "text" else float(answer.lower() == expected.lower())
