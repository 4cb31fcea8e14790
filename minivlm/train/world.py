"""The small world the shipped checkpoint learns: scenes of coloured shapes and short printed strings.

A scene is a pure function of (split, index, seed); it knows nothing of pixels drawn (draw.py) or questions
(questions.py). Nothing is stored: the same three numbers give the same scene anywhere.

Printed strings are all letters or all digits, never mixed, so that O and 0, I and 1 are told apart by their
neighbours; in scenes O, I, 0 and 1 are never printed alone. A string of two or more characters is held out when
crc32(string) is divisible by 5: split "train" never prints one, split "test" prints nothing else.
"""

from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from minivlm.errors import InputError
from minivlm.train.outlines import FONTS, Box, Warp, extent, glyph, inset, shifted, turned, warped
from minivlm.train.styles import (
    COLOURS,
    RGB,
    SHAPES,
    Finish,
    Style,
    colour_rgb,
    pick,
    random_background,
    random_finish,
    random_style,
    random_warp,
    shape_outline,
    some,
    uniform,
)
from minivlm.train.words import WORDS

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
SPLITS = ("train", "test")

# Largest radius of one of n shapes, as a share of the short side: 0.30 is a shape 0.6 of the side wide.
_LARGEST_RADIUS = {1: 0.30, 2: 0.24, 3: 0.21, 4: 0.185, 5: 0.165}


@dataclass(frozen=True)
class SceneObject:
    """One shape. `box` is the tight extent of what is drawn, as shares of the picture's width and height."""

    shape: str
    colour: str
    box: Box
    centre: tuple[float, float]  # pixels
    radius: float  # pixels
    style: Style


@dataclass(frozen=True)
class Text:
    """One printed string. `height`: a capital letter's, in pixels; `spacing`, `weight`: shares of it."""

    string: str
    colour: str
    box: Box
    font: str
    rgb: RGB
    centre: tuple[float, float]  # pixels, of the letters' extent
    height: float
    degrees: float
    slant: float
    stretch: float
    spacing: float
    weight: float
    warp: Warp | None


@dataclass(frozen=True)
class Scene:
    """A picture as data: sizes in pixels, the background, what lies on it, and the finish."""

    width: int
    height: int
    background: RGB
    objects: tuple[SceneObject, ...]
    text: Text | None
    finish: Finish


def held_out(string: str) -> bool:
    """Whether a printed string belongs to the test split: about one in five of two or more characters."""
    return len(string) >= 2 and crc32(string.encode()) % 5 == 0


def object_outline(item: SceneObject) -> np.ndarray:
    """The outer edge of a shape: points [n, 2] in pixels, clockwise."""
    return shape_outline(item.shape, item.style) * item.radius + item.centre


def text_outlines(text: Text) -> list[list[tuple[np.ndarray, bool]]]:
    """Per character its contours (points [n, 2] in pixels, solid or hole), outermost first.

    The string is laid out with capital height 1, slanted, rotated and scaled about the middle of its extent.
    """
    pen, placed = 0.0, []
    for character in text.string:
        outline = glyph(text.font, character)
        placed.append(outline.points + (pen, 0.0))
        pen += outline.advance + text.spacing
    points = turned(np.concatenate(placed), text.degrees, text.stretch, 1.0, text.slant)
    low, high = points.min(0), points.max(0)
    points = warped(points - (low + high) / 2, text.warp) * text.height + text.centre
    characters, start = [], 0
    for character in text.string:
        outline, contours, first = glyph(text.font, character), [], start
        for end, solid in zip(outline.ends, outline.solid, strict=True):
            contour = points[start : first + end]
            contours.append((inset(contour, -text.weight * text.height) if text.weight else contour, solid))
            start = first + end
        characters.append(contours)
    return characters


def solid_extent(characters: list[list[tuple[np.ndarray, bool]]]) -> Box:
    """The tight box of the ink, without the holes inside characters."""
    return extent([points for contours in characters for points, solid in contours if solid])


def random_string(rng: np.random.Generator, split: str) -> str:
    """A word, random letters or a number, on this side of the held-out rule."""
    while True:
        kind, length = rng.random(), 1 + int(rng.random() * 4)
        if kind < 0.25:
            string = pick(rng, WORDS)
        elif kind < 0.7:
            string = "".join(pick(rng, LETTERS) for _ in range(length))
        else:
            string = str(int(rng.random() * 10**length))
        if string in ("O", "I", "0", "1") or (split == "test" and len(string) < 2):
            continue
        if held_out(string) == (split == "test"):
            return string


def random_text(rng: np.random.Generator, string: str, colour: str, height: float) -> Text:
    """A string in a random font and pose; its centre and box are still to be set."""
    hand = random_warp(rng, 0.15, 0.05)
    return Text(
        string, colour, (0.0, 0.0, 0.0, 0.0), pick(rng, FONTS), colour_rgb(rng, colour), (0.0, 0.0), height,
        degrees=uniform(rng, -8, 8) if rng.random() < 0.4 else 0.0,
        slant=uniform(rng, -0.1, 0.25) if rng.random() < 0.2 else 0.0,
        stretch=uniform(rng, 0.85, 1.15),
        spacing=uniform(rng, 0.0, 0.22) if rng.random() < 0.5 else 0.0,
        weight=uniform(rng, 0.0, 0.035) if rng.random() < 0.4 else 0.0,
        warp=hand,
    )  # fmt: skip


def clashes(box: Box, others: list[Box], margin: float) -> bool:
    """Whether a box comes nearer than the margin to any of the others."""
    return any(
        box[0] < other[2] + margin and other[0] < box[2] + margin
        and box[1] < other[3] + margin and other[1] < box[3] + margin
        for other in others
    )  # fmt: skip


def _place(rng: np.random.Generator, size: Box, width: int, height: int, taken: list[Box], gap: float):
    """A shift (x, y) in pixels that puts a box inside the picture clear of `taken`; None after 30 trials."""
    x1, y1, x2, y2 = size
    room_x, room_y = width - (x2 - x1) - gap, height - (y2 - y1) - gap
    if room_x < 0 or room_y < 0:
        return None
    for _ in range(30):
        x, y = gap / 2 - x1 + room_x * rng.random(), gap / 2 - y1 + room_y * rng.random()
        if not clashes(shifted(size, x, y), taken, gap):
            return float(x), float(y)
    return None


def _shares(box: Box, width: int, height: int) -> Box:
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _place_text(rng: np.random.Generator, text: Text, width: int, height: int, gap: float) -> tuple[Text, Box]:
    """The text somewhere in an empty picture, made smaller where it would not fit; and its box in pixels."""
    x1, y1, x2, y2 = solid_extent(text_outlines(text))
    shrink = min(1.0, 0.94 * width / (x2 - x1), 0.94 * height / (y2 - y1))
    size = (x1 * shrink, y1 * shrink, x2 * shrink, y2 * shrink)
    room_x, room_y = width - (size[2] - size[0]), height - (size[3] - size[1])
    gap = min(gap, 0.5 * room_x, 0.5 * room_y)
    x = gap / 2 - size[0] + (room_x - gap) * float(rng.random())
    y = gap / 2 - size[1] + (room_y - gap) * float(rng.random())
    box = shifted(size, x, y)
    return replace(text, height=text.height * shrink, centre=(x, y), box=_shares(box, width, height)), box


def canvas(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels: 35 % small squares, 20 % about 2:1 or 1:2, 45 % between square and 4:3."""
    kind = rng.random()
    if kind < 0.35:
        side = 72 + int(rng.random() * 25)
        return side, min(96, max(72, side + int(rng.random() * 9) - 4))
    if kind < 0.55:
        short = 64 + int(rng.random() * 65)
        long = min(256, max(128, round(short * uniform(rng, 1.7, 2.3))))
    else:
        short = 128 + int(rng.random() * 113)
        long = min(320, round(short * uniform(rng, 1.0, 1.34)))
    return (long, short) if rng.random() < 0.5 else (short, long)


def compose(rng: np.random.Generator, split: str, width: int, height: int) -> Scene:
    """A scene for a canvas: 55 % one to five shapes, 25 % a string, 20 % a string and one to three shapes."""
    short, kind = min(width, height), rng.random()
    gap, text, taken, inks = 0.04 * short, None, [], []
    shapes, colours = some(rng, SHAPES), some(rng, COLOURS)
    count = 1 + int(rng.random() * 5) if kind < 0.55 else 0 if kind < 0.8 else 1 + int(rng.random() * 3)
    if kind >= 0.55:
        colour = "black" if rng.random() < 0.65 else pick(rng, COLOURS)
        tall = uniform(rng, 0.16, 0.45) if kind < 0.8 else uniform(rng, 0.16, 0.30)
        text = random_text(rng, random_string(rng, split), colour, tall * short)
        text, box = _place_text(rng, text, width, height, gap)
        taken.append(box)
        inks.append(text.rgb)
    largest = _LARGEST_RADIUS[min(5, count + (text is not None))] if count else 0.0
    objects, shrink = [], 1.0
    while len(objects) < count:
        shape, colour = pick(rng, shapes), pick(rng, colours)
        style = random_style(rng, shape, colour)
        radius = max(0.08, shrink * uniform(rng, 0.09, largest)) * short
        size = tuple(radius * side for side in extent([shape_outline(shape, style)]))
        at = _place(rng, size, width, height, taken, gap)
        if at is None:
            shrink *= 0.85
            if shrink < 0.3:  # a string left no room: give up one shape rather than squeeze it
                count -= 1
            continue
        taken.append(shifted(size, *at))
        inks.append(style.rgb)
        objects.append(SceneObject(shape, colour, _shares(taken[-1], width, height), at, radius, style))
    return Scene(width, height, random_background(rng, inks), tuple(objects), text, random_finish(rng))


def scene(split: str, index: int, seed: int) -> Scene:
    """Scene number `index` of a split: the same arguments always give the same scene."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: expected train or test")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return compose(rng, split, *canvas(rng))
