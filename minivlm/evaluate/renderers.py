"""The world's scenes drawn by another program: has the model learned shapes, or one renderer's habits?

matplotlib draws the same outlines with its own anti-aliasing at another resolution; strings come in fonts
that training never used. Knows nothing of questions: a scene's answers stay true in every variant, except
that the string's box is only nearly that of the scene.
"""

from dataclasses import replace
from io import BytesIO
from zlib import crc32

import numpy as np
from PIL import Image

from minivlm.errors import InputError
from minivlm.train.outlines import within
from minivlm.train.styles import RGB
from minivlm.train.world import Scene, Text, object_outline, solid_extent, text_outlines

VARIANTS = ("matplotlib", "jpeg", "outline")
OTHER_FONTS = ("STIXGeneral", "STIXGeneralBol", "cmr10", "cmb10", "cmss10")
LONG_SIDE = 480  # pixels
JPEG_QUALITY = 30
BORDER, CROSS_BORDER = 0.2, 0.14  # of a shape's radius, in the variant "outline"

Layer = tuple[list[np.ndarray], RGB]  # closed contours in the scene's pixels, holes turning the other way; colour


def _in_other_font(text: Text) -> list[np.ndarray]:
    """The string's contours in a font chosen by the string, as large as its box allows and centred in it."""
    font = OTHER_FONTS[crc32(text.string.encode()) // 5 % len(OTHER_FONTS)]
    was = solid_extent(text_outlines(text))
    characters = text_outlines(replace(text, font=font, weight=0.0))
    now = solid_extent(characters)
    scale = min((was[2] - was[0]) / (now[2] - now[0]), (was[3] - was[1]) / (now[3] - now[1]))
    middle = np.array([now[0] + now[2], now[1] + now[3]]) / 2
    target = np.array([was[0] + was[2], was[1] + was[3]]) / 2
    return [(points - middle) * scale + target for contours in characters for points, _ in contours]


def _layers(scene: Scene, outline: bool) -> list[Layer]:
    """What to fill, from back to front."""
    layers: list[Layer] = []
    for item in scene.objects:
        outer, style = object_outline(item), item.style
        if not (outline or style.hollow):
            layers.append(([outer], style.rgb))
        if outline or style.edge:
            thick = CROSS_BORDER if item.shape == "cross" else BORDER
            inner = within(item.shape, outer, (thick if outline else style.edge) * item.radius)
            layers.append(([outer, inner[::-1]], style.rgb if outline else style.edge_rgb))
    if scene.text is not None:
        layers.append((_in_other_font(scene.text), scene.text.rgb))
    return layers


def render(scene: Scene, variant: str) -> np.ndarray:
    """A scene as uint8 [H, W, 3], its long side 480 pixels, by one of VARIANTS.

    "matplotlib": as styled. "jpeg": the same through JPEG at quality 30. "outline": every shape as a thick
    line in its colour. Raises InputError for another name or where matplotlib is missing.
    """
    if variant not in VARIANTS:
        raise InputError(f"unknown renderer {variant!r}: expected one of {', '.join(VARIANTS)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path
    except ImportError as error:
        raise InputError("drawing with another program needs matplotlib: pip install 'minivlm[train]'") from error
    scale = LONG_SIDE / max(scene.width, scene.height)
    width, height = round(scene.width * scale), round(scene.height * scale)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, scene.width), ylim=(scene.height, 0))
    axes.axis("off")
    figure.patch.set_facecolor([level / 255 for level in scene.background])
    for contours, rgb in _layers(scene, variant == "outline"):
        path = Path.make_compound_path(*(Path(np.vstack([points, points[:1]]), closed=True) for points in contours))
        axes.add_patch(PathPatch(path, facecolor=[level / 255 for level in rgb], linewidth=0))
    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    picture = np.asarray(drawn.buffer_rgba())[..., :3].copy()
    if variant != "jpeg":
        return picture
    data = BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=JPEG_QUALITY)
    return np.array(Image.open(data))
