"""Outlines of the world's shapes and printed characters: closed polygons; knows nothing of pictures.

Everything that is ever drawn is a polygon, so the true bounding box of an object is the extent of its points
and any renderer can draw the same scene. Letters come from the font files' own outlines (TrueType curves
flattened to polygons): x to the right, y down, capital height 1.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, radians, sin
from pathlib import Path

import numpy as np

from minivlm.errors import InputError

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "Aileron",
)  # fmt: skip


Box = tuple[float, float, float, float]  # x1, y1, x2, y2


@dataclass(frozen=True)
class Warp:
    """A smooth shake of the pen: x += depth sin(turns y + phase), y likewise; the radius is 1."""

    depth: float
    turns: float
    phase_x: float
    phase_y: float


@dataclass(frozen=True)
class Glyph:
    """Outline of one character: `points` [n, 2] float, contour i is points[ends[i-1]:ends[i]].

    `solid[i]` tells an outer contour from a hole; contours come outermost first. `advance`: to the next one.
    """

    points: np.ndarray
    ends: tuple[int, ...]
    solid: tuple[bool, ...]
    advance: float


def _circle() -> np.ndarray:
    turn = np.linspace(0, 2 * pi, 40, endpoint=False)
    return np.stack([np.cos(turn), np.sin(turn)], 1)


def _heart() -> np.ndarray:
    # Straight lines to the notch at 0 and the tip at pi, which are thus single corners.
    side = np.linspace(0.3, pi - 0.75, 20)
    t = np.concatenate([[0.0], side, [pi], 2 * pi - side[::-1]])
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 16, (y - 2.5) / 14.5], 1)


_CIRCLE, _HEART = _circle(), _heart()
_SQUARE = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])


def unit_shape(shape: str, detail: float) -> np.ndarray:
    """Points [n, 2] of a shape about the origin, clockwise on the screen, within [-1, 1].

    `detail` in [0, 1] is the shape's free proportion: a star's inner radius (0.40 to 0.52), the width of a
    cross's arms, how far a triangle's apex is from the middle.
    """
    if shape == "circle":
        return _CIRCLE
    if shape == "heart":
        return _HEART
    if shape == "square":
        return _SQUARE
    if shape == "triangle":
        return np.array([[1.2 * (detail - 0.5), -1], [1, 0.85], [-1, 0.85]])
    if shape == "cross":
        a = 0.26 + 0.16 * detail
        return np.array([[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a],
                         [a, 1], [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a]])  # fmt: skip
    if shape == "star":
        turn = np.arange(10) * (pi / 5) - pi / 2
        reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.40 + 0.12 * detail)
        return np.stack([reach * np.cos(turn), reach * np.sin(turn)], 1)
    raise InputError(f"unknown shape {shape!r}: expected circle, square, triangle, star, cross or heart")


def _following(points: np.ndarray) -> np.ndarray:
    """The next corner of each corner of a closed polygon [n, 2]."""
    return np.concatenate((points[1:], points[:1]))


def densified(points: np.ndarray, pieces: int) -> np.ndarray:
    """Every edge of a closed polygon [n, 2] cut into equal pieces: [n * pieces, 2]."""
    step = np.arange(pieces) / pieces
    return (points[:, None] + (_following(points) - points)[:, None] * step[:, None]).reshape(-1, 2)


def warped(points: np.ndarray, warp: Warp | None) -> np.ndarray:
    """Points [n, 2] as an unsteady hand would have drawn them; None leaves them as they are."""
    if warp is None:
        return points
    x, y = points[:, 0], points[:, 1]
    shake = np.stack([np.sin(warp.turns * y + warp.phase_x), np.sin(warp.turns * x + warp.phase_y)], 1)
    return points + warp.depth * shake


def turned(points: np.ndarray, degrees: float, scale_x: float, scale_y: float, slant: float = 0.0) -> np.ndarray:
    """Points scaled, slanted (x -= slant * y) and then rotated about the origin."""
    c, s = cos(radians(degrees)), sin(radians(degrees))
    matrix = np.array([[c, s], [-s, c]])  # row vectors: [x, y] @ matrix
    shear = np.array([[scale_x, 0.0], [-slant * scale_y, scale_y]])
    return points @ (shear @ matrix)


def inset(points: np.ndarray, distance: float) -> np.ndarray:
    """A clockwise polygon [n, 2] with each edge moved inwards by `distance` pixels (negative: outwards).

    Each corner moves along its bisector by distance / cos(half the turn); the divisor is held above 0.2 so
    that a needle-sharp corner does not fly away.
    """
    edge = _following(points) - points
    length = np.maximum(np.hypot(edge[:, :1], edge[:, 1:]), 1e-9)
    normal = edge[:, ::-1] * (-1.0, 1.0) / length
    before = np.concatenate((normal[-1:], normal[:-1]))
    spread = 1 + np.einsum("ni,ni->n", normal, before)[:, None]
    return points + distance * (normal + before) / np.maximum(spread, 0.2)


def within(shape: str, points: np.ndarray, width: float) -> np.ndarray:
    """The inner side of a border `width` pixels thick along a shape's outline [n, 2], never outside of it.

    A triangle and a star are scaled about the point equally far from their sides, which moves every side by
    the same distance and, unlike `inset`, cannot fold a sharp corner over when a shaky edge has many points.
    """
    if shape not in ("triangle", "star"):
        return inset(points, width)
    centre, corner = points.mean(0), len(points) // 3
    if shape == "triangle":
        a, b, c = points[0], points[corner], points[2 * corner]
        sides = np.sqrt([((b - c) ** 2).sum(), ((c - a) ** 2).sum(), ((a - b) ** 2).sum()])
        centre = sides @ np.stack([a, b, c]) / sides.sum()
    out, edge = points - centre, _following(points) - points
    apart = np.abs(out[:, 0] * edge[:, 1] - out[:, 1] * edge[:, 0]) / np.maximum(np.hypot(*edge.T), 1e-9)
    reach = float(np.median(apart))
    return centre + out * max(0.3, 1 - width / max(reach, 1e-9))


def shifted(box: Box, x: float, y: float) -> Box:
    """The box moved by x to the right and y down."""
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def extent(contours: list[np.ndarray]) -> Box:
    """The tight box of some contours [n, 2], in their own units."""
    points = np.concatenate(contours)
    return *points.min(0).tolist(), *points.max(0).tolist()


def _font_file(font: str):
    """What FT2Font opens: a path of matplotlib's data folder, or the bytes of Pillow's own font."""
    if font == "Aileron":
        from PIL import ImageFont

        return io.BytesIO(ImageFont.load_default(size=16).font_bytes)
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf")


@lru_cache(maxsize=32)
def _face(font: str):
    """A FreeType face at 100 pixels per em, and the height of its capital H."""
    try:
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise InputError("drawing text needs matplotlib's fonts: pip install 'minivlm[train]'") from error
    face = FT2Font(_font_file(font))
    face.set_size(100, 72)
    face.load_char(ord("H"))
    return face, face.get_path()[0][:, 1].max()


@lru_cache(maxsize=4096)
def glyph(font: str, character: str) -> Glyph:
    """The outline of one character, its pen position at the origin, standing on y = 0, capital height 1."""
    face, capital = _face(font)
    from matplotlib.path import Path as Outline

    advance = face.load_char(ord(character)).linearHoriAdvance / 65536 / capital
    vertices, codes = face.get_path()
    contours = []
    for polygon in Outline(vertices, codes).to_polygons(closed_only=True):
        polygon = polygon[:-1] * [1 / capital, -1 / capital]
        moved = np.abs(polygon - np.roll(polygon, 1, 0)).sum(1) > 1e-6
        polygon = polygon[moved]
        x, y = polygon[:, 0], polygon[:, 1]
        contours.append((float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2, polygon))
    contours.sort(key=lambda contour: -abs(contour[0]))
    outward = contours[0][0] > 0  # a font's outer contours all turn one way, its holes the other
    polygons = [polygon if outward else polygon[::-1] for _, polygon in contours]
    return Glyph(
        points=np.concatenate(polygons),
        ends=tuple(np.cumsum([len(polygon) for polygon in polygons]).tolist()),
        solid=tuple((area > 0) == outward for area, _ in contours),
        advance=advance,
    )
