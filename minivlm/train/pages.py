"""Pages for the encoder's warm-up: one tile of drawings, and what each patch of it shows.

Half are crowded with shapes and characters, many cut by the border; half are tiles of ordinary scenes as the
any-resolution processor cuts them: the whole picture squashed to a square, or one tile of a 2x1, 1x2 or 2x2
grid with black bars. An encoder that names shape, colour and character patch by patch has something for the
projector to align (dense supervision in the manner of Zhou et al. 2019, arXiv:1904.07850, for the boxes).
"""

from dataclasses import dataclass

import numpy as np

from minivlm.train.draw import Patch, paint, scene_patches, shape_patches, text_patches
from minivlm.train.outlines import Box, extent, shifted
from minivlm.train.styles import (
    COLOURS,
    RGB,
    SHAPES,
    pick,
    random_background,
    random_finish,
    random_style,
    some,
    uniform,
)
from minivlm.train.world import (
    DIGITS,
    LETTERS,
    Scene,
    SceneObject,
    canvas,
    clashes,
    compose,
    random_string,
    random_text,
)

CHARACTERS = LETTERS + DIGITS
_NOWHERE: Box = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Table:
    """What the objects of a page are; row k is object k of the map, row 0 (all zero) the background.

    shape, colour, char: int64 [K + 1], one more than the index in SHAPES, COLOURS, CHARACTERS, 0 for none (a
    character has no shape, a shape no character). box: float32 [K + 1, 4], x1 y1 x2 y2 in the tile's pixels,
    cut at its border.
    """

    shape: np.ndarray
    colour: np.ndarray
    char: np.ndarray
    box: np.ndarray


@dataclass(frozen=True)
class View:
    """Where a scene's point lies in a tile: x * scale_x + shift_x, and the same for y."""

    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float


def table_of(rows: list[tuple[str, str, str]], boxes: list[Box], size: int) -> Table:
    """Rows (shape or "", colour, character or "") and pixel boxes of objects 1, 2, ..."""
    names = [(0, 0, 0)] + [
        (
            SHAPES.index(shape) + 1 if shape else 0,
            COLOURS.index(colour) + 1,
            CHARACTERS.index(char) + 1 if char else 0,
        )
        for shape, colour, char in rows
    ]
    shape, colour, char = np.array(names, np.int64).T
    box = np.array([(0.0, 0.0, 0.0, 0.0), *boxes], np.float32).clip(0, size)
    return Table(shape, colour, char, box)


def object_boxes(patches: list[Patch], objects: int) -> list[Box]:
    """The tight box in pixels of objects 1, 2, ... from the polygons that carry their numbers."""
    contours: list[list[np.ndarray]] = [[] for _ in range(objects + 1)]
    for points, number in patches:
        contours[number >> 1].append(points)
    return [extent(own) for own in contours[1:]]


def tile_view(rng: np.random.Generator, scene: Scene, size: int) -> View:
    """The whole scene squashed to the tile (four in ten), or one tile of the grid that suits its form."""
    if rng.random() < 0.4:
        return View(size / scene.width, size / scene.height, 0.0, 0.0)
    across = 1 if scene.height > 1.5 * scene.width else 2
    down = 1 if scene.width > 1.5 * scene.height else 2
    scale = min(across * size / scene.width, down * size / scene.height)
    left, top = (across * size - scale * scene.width) / 2, (down * size - scale * scene.height) / 2
    boxes = [item.box for item in scene.objects] + ([scene.text.box] if scene.text is not None else [])
    x1, y1, x2, y2 = pick(rng, boxes)
    x = left + scale * scene.width * uniform(rng, x1, x2)
    y = top + scale * scene.height * uniform(rng, y1, y2)
    column, row = min(across - 1, int(x / size)), min(down - 1, int(y / size))
    return View(scale, scale, left - column * size, top - row * size)


def scene_page(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, Table]:
    """A tile of an ordinary scene of the training split; what lies outside the scene is black."""
    scene = compose(rng, "train", *canvas(rng))
    view = tile_view(rng, scene, size)
    scale, shift = (view.scale_x, view.scale_y), (view.shift_x, view.shift_y)
    patches, colours = scene_patches(scene)
    patches = [(points * scale + shift, number) for points, number in patches]
    rows = [(item.shape, item.colour, "") for item in scene.objects]
    if scene.text is not None:
        rows += [("", scene.text.colour, character) for character in scene.text.string]
    picture, ids = paint(patches, colours, size, size, scene.finish)
    left, top = max(0, round(view.shift_x)), max(0, round(view.shift_y))
    right = round(view.shift_x + scene.width * view.scale_x)
    bottom = round(view.shift_y + scene.height * view.scale_y)
    for bar in (np.s_[:top], np.s_[max(0, bottom) :], np.s_[:, :left], np.s_[:, max(0, right) :]):
        picture[bar] = 0
    return picture, ids, table_of(rows, object_boxes(patches, len(rows)), size)


def _drawing(rng: np.random.Generator, k: int, colour: str, shapes: list[str], small: float, unit: float):
    """A shape or a string about the origin, objects k and on: its polygons, their colours, its table rows."""
    if rng.random() < 0.4:
        shape = pick(rng, shapes)
        style = random_style(rng, shape, colour)
        radius = max(6.0, small * 7.0 * (30 / 7) ** rng.random()) * unit
        patches, colours = shape_patches(SceneObject(shape, colour, _NOWHERE, (0.0, 0.0), radius, style), k)
        return patches, colours, [(shape, colour, "")]
    string = random_string(rng, "train") if rng.random() < 0.6 else pick(rng, CHARACTERS)
    height = max(9.0, small * 10.0 * 3.4 ** rng.random()) * unit
    patches, colours = text_patches(random_text(rng, string, colour, height), k)
    return patches, colours, [("", colour, character) for character in string]


def crowded_page(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, Table]:
    """A tile full of shapes 12 to 60 pixels wide and strings 9 to 34 tall (for size 96), some cut off."""
    shapes, colours = some(rng, SHAPES), some(rng, COLOURS)
    unit, taken = size / 96, []
    patches: list[Patch] = []
    inks: list[RGB] = []
    rows: list[tuple[str, str, str]] = []
    for trial in range(16 + int(rng.random() * 18)):
        small = max(0.45, 1.0 - trial / 24)  # large things first, small ones in the gaps
        drawn, two, named = _drawing(rng, len(rows) + 1, pick(rng, colours), shapes, small, unit)
        x1, y1, x2, y2 = extent([points for points, _ in drawn])
        for _ in range(8):
            x = -x1 - 0.3 * (x2 - x1) + (size - 0.4 * (x2 - x1)) * float(rng.random())
            y = -y1 - 0.3 * (y2 - y1) + (size - 0.4 * (y2 - y1)) * float(rng.random())
            box = shifted((x1, y1, x2, y2), x, y)
            if not clashes(box, taken, 1.5 * unit):
                taken.append(box)
                patches += [(points + (x, y), number) for points, number in drawn]
                inks += two
                rows += named
                break
    background = random_background(rng, inks)
    picture, ids = paint(patches, [background, background, *inks], size, size, random_finish(rng))
    return picture, ids, table_of(rows, object_boxes(patches, len(rows)), size)


def page(rng: np.random.Generator, size: int = 96) -> tuple[np.ndarray, np.ndarray, Table]:
    """-> picture uint8 [size, size, 3], object map uint8 [size, size], and the table of its objects."""
    return crowded_page(rng, size) if rng.random() < 0.5 else scene_page(rng, size)


def patch_labels(ids: np.ndarray, table: Table, patch: int = 12) -> dict[str, np.ndarray]:
    """What each patch shows, patches in reading order: P = (size / patch)^2.

    "shape", "colour", "char": int64 [P], the class of the object that covers most of the patch, 0 where none
    covers a fifth of it. "box": float32 [P, 4], from the patch's centre to that object's left, top, right and
    bottom side, outwards positive, in units of the tile: a centre at x = 18 and a side at 6 of 96 is 0.125.
    "valid": bool [P], where there is an object.
    """
    size = ids.shape[0]
    side, kinds = size // patch, len(table.shape)
    cells = np.arange(side).repeat(patch)
    flat = (cells[:, None] * side + cells[None, :]) * kinds + ids
    counts = np.bincount(flat.ravel(), minlength=side * side * kinds).reshape(side * side, kinds)
    counts[:, 0] = 0
    owner = counts.argmax(1)
    owner[counts.max(1) < 0.2 * patch * patch] = 0
    centre = np.arange(side, dtype=np.float32) * patch + patch / 2
    x, y = np.tile(centre, side), centre.repeat(side)
    box = table.box[owner]
    box = np.stack([x - box[:, 0], y - box[:, 1], box[:, 2] - x, box[:, 3] - y], 1) / size
    return {
        "shape": table.shape[owner],
        "colour": table.colour[owner],
        "char": table.char[owner],
        "box": np.where(owner[:, None] > 0, box, 0).astype(np.float32),
        "valid": owner > 0,
    }
