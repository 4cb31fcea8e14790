"""How things look: shades that a person would call by the same name, borders, tilt, shaky edges, backgrounds.

Draws from a random generator that it is handed; knows nothing of where things are put.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import TypeVar

import numpy as np

from minivlm.train.outlines import Warp, densified, turned, unit_shape, warped

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black")

RGB = tuple[int, int, int]
T = TypeVar("T")

# Hue in degrees, saturation, value: from, to. Wide enough for a paint program's palette, with gaps between.
_HSV = {
    "red": ((-10, 7), (0.80, 1.0), (0.72, 1.0)),
    "orange": ((24, 38), (0.82, 1.0), (0.90, 1.0)),
    "yellow": ((50, 61), (0.72, 1.0), (0.90, 1.0)),
    "green": ((95, 146), (0.60, 1.0), (0.40, 0.90)),
    "blue": ((205, 240), (0.66, 1.0), (0.55, 1.0)),
    "purple": ((274, 302), (0.52, 1.0), (0.50, 0.80)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.16)),
}


@dataclass(frozen=True)
class Style:
    """How one shape is drawn. `edge` is the border's width as a share of the radius, inside the outline."""

    rgb: RGB
    edge_rgb: RGB
    edge: float
    hollow: bool
    degrees: float
    aspect: float
    detail: float
    warp: Warp | None


@dataclass(frozen=True)
class Finish:
    """What is done to the picture: anti-aliasing, blur radius in pixels, noise in levels, JPEG quality."""

    smooth: bool
    blur: float
    noise: int
    jpeg: int
    seed: int


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, all equally likely."""
    return items[int(rng.random() * len(items))]


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high)."""
    return low + (high - low) * float(rng.random())


def colour_rgb(rng: np.random.Generator, colour: str) -> RGB:
    """A shade that a person would call by this name."""
    (h0, h1), (s0, s1), (v0, v1) = _HSV[colour]
    hue, saturation, value = uniform(rng, h0, h1) % 360 / 60, uniform(rng, s0, s1), uniform(rng, v0, v1)
    channels = []
    for shift in (5, 3, 1):
        k = (shift + hue) % 6
        channels.append(round(255 * value * (1 - saturation * max(0.0, min(k, 4 - k, 1.0)))))
    return tuple(channels)


def some(rng: np.random.Generator, items: tuple[str, ...]) -> list[str]:
    """The names a scene may use: all in six scenes of ten, otherwise one to three, so that some repeat."""
    if rng.random() < 0.6:
        return list(items)
    return [pick(rng, items) for _ in range(1 + int(rng.random() * 3))]


def random_warp(rng: np.random.Generator, chance: float, depth: float) -> Warp | None:
    """With this chance a warp of at most this depth, in units of the shape, else None."""
    if rng.random() >= chance:
        return None
    return Warp(
        depth * uniform(rng, 0.5, 1.0),
        uniform(rng, 1.5, 4.0),
        uniform(rng, 0, 2 * pi),
        uniform(rng, 0, 2 * pi),
    )


def random_style(rng: np.random.Generator, shape: str, colour: str) -> Style:
    """How one object is drawn: colour, border, tilt, proportions; never so far that its shape or colour is in doubt."""
    rgb = colour_rgb(rng, colour)
    kind = rng.random()
    hollow = bool(kind < 0.2)
    edge = uniform(rng, 0.16, 0.28) if hollow else uniform(rng, 0.06, 0.14) if kind < 0.38 else 0.0
    detail = float(rng.random())
    if shape == "cross":  # the two borders of its arm, 0.26 to 0.42 from the arm's middle, must not meet
        edge = min(edge, 0.55 * (0.26 + 0.16 * detail))
    if shape == "heart":
        edge = min(edge, 0.22)
    shade = uniform(rng, 0.45, 0.8)
    edge_rgb = rgb if hollow else tuple(int(shade * channel) for channel in rgb)
    tilt = 8 if shape in ("square", "cross") else 20
    degrees = uniform(rng, -tilt, tilt) if rng.random() < 0.6 else 0.0
    even = shape in ("circle", "square")  # a person would call a long one an ellipse or a rectangle
    aspect = uniform(rng, 0.94, 1.07) if even else uniform(rng, 0.86, 1.16)
    warp = random_warp(rng, 0.2, 0.035 if even else 0.055)
    return Style(rgb, edge_rgb, edge, hollow, degrees, aspect, detail, warp)


def shape_outline(shape: str, style: Style) -> np.ndarray:
    """The points [n, 2] of a shape of radius 1 about the origin, as this style draws it."""
    points = unit_shape(shape, style.detail)
    if style.warp is not None and len(points) < 40:
        points = densified(points, 48 // len(points))
    return turned(warped(points, style.warp), style.degrees, style.aspect**0.5, style.aspect**-0.5)


def random_finish(rng: np.random.Generator) -> Finish:
    """What happens to a whole picture after drawing: more than half get none of blur, noise and JPEG."""
    smooth, kind = bool(rng.random() < 0.5), rng.random()
    return Finish(
        smooth,
        blur=uniform(rng, 0.4, 0.9) if kind < 0.12 else 0.0,
        noise=2 + int(rng.random() * 11) if 0.08 < kind < 0.35 else 0,
        jpeg=45 + int(rng.random() * 50) if 0.3 < kind < 0.42 else 0,
        seed=int(rng.random() * 2**31),
    )


def random_background(rng: np.random.Generator, inks: list[RGB]) -> RGB:
    """White, light grey, a pastel or, one time in eight and where every ink stands out, a darker colour."""
    for _ in range(8):
        kind = rng.random()
        if kind < 0.12:
            value = uniform(rng, 25, 150)
            background = tuple(int(min(255, max(0, value + uniform(rng, -25, 25)))) for _ in range(3))
            enough = 190
        elif kind < 0.4:
            background = tuple(int(uniform(rng, 205, 255)) for _ in range(3))
            enough = 130
        elif kind < 0.6:
            background = (int(uniform(rng, 215, 255)),) * 3
            enough = 130
        else:
            return (255, 255, 255)
        if all(sum(abs(a - b) for a, b in zip(background, ink, strict=True)) >= enough for ink in inks):
            return background
    return (255, 255, 255)
