"""Draws a scene with Pillow, by numbers: polygons filled with numbers, numbers turned into colours.

The picture and the map of which object owns each pixel are therefore one drawing and always agree.
"""

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from minivlm.train.outlines import within
from minivlm.train.styles import RGB, Finish
from minivlm.train.world import Scene, SceneObject, Text, object_outline, text_outlines

# Number of a pixel while drawing: 0 background, 2k the inside of object k, 2k + 1 its border.
Patch = tuple[np.ndarray, int]
FINE = 3


def shape_patches(item: SceneObject, k: int) -> tuple[list[Patch], list[RGB]]:
    """Polygons of object k from back to front, with the two colours of numbers 2k and 2k + 1."""
    style, outer = item.style, object_outline(item)
    if style.edge == 0.0:
        return [(outer, 2 * k)], [style.rgb, style.rgb]
    inner = within(item.shape, outer, max(1.0, style.edge * item.radius))
    return [(outer, 2 * k + 1), (inner, 0 if style.hollow else 2 * k)], [style.rgb, style.edge_rgb]


def text_patches(text: Text, k: int) -> tuple[list[Patch], list[RGB]]:
    """Polygons of a string whose characters are objects k, k + 1, ...; holes are painted as background."""
    patches = [
        (points, 2 * (k + i) if solid else 0)
        for i, contours in enumerate(text_outlines(text))
        for points, solid in contours
    ]
    return patches, [text.rgb] * (2 * len(text.string))


def scene_patches(scene: Scene) -> tuple[list[Patch], list[RGB]]:
    """Every polygon of a scene and the colour of every number; shapes first, then the characters."""
    patches, colours = [], [scene.background, scene.background]
    for k, item in enumerate(scene.objects, 1):
        more, two = shape_patches(item, k)
        patches += more
        colours += two
    if scene.text is not None:
        more, two = text_patches(scene.text, len(scene.objects) + 1)
        patches += more
        colours += two
    return patches, colours


def paint(patches: list[Patch], colours: list[RGB], width: int, height: int, finish: Finish):
    """-> picture uint8 [height, width, 3] and object map uint8 [height, width].

    Polygons are filled on a grid three times finer: an anti-aliased picture is its mean, a hard-edged one and
    the map take the middle of each 3 x 3 cell. Pillow's vertices are whole pixels, named by their middles,
    hence the half: the point 2.5, in the middle of pixel 2, is 2.5 * 3 - 0.5 = 7, the middle of 6, 7, 8.
    """
    canvas = Image.new("P", (width * FINE, height * FINE))
    canvas.putpalette(np.array(colours, np.uint8).tobytes())
    pen = ImageDraw.Draw(canvas)
    for points, number in patches:
        pen.polygon(np.rint(points * FINE - 0.5).ravel().tolist(), fill=number)
    numbers = np.asarray(canvas)[FINE // 2 :: FINE, FINE // 2 :: FINE]
    if finish.smooth:
        picture = canvas.convert("RGB").reduce(FINE)
    else:
        picture = Image.fromarray(np.array(colours, np.uint8)[numbers])
    return finished(picture, finish), numbers >> 1


def finished(picture: Image.Image, finish: Finish) -> np.ndarray:
    """Blur, noise and JPEG, in the order a camera has them; uint8 [H, W, 3]."""
    if finish.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(finish.blur))
    if finish.noise:
        rng = np.random.default_rng(finish.seed)
        pixels = np.asarray(picture, np.int16)
        noise = rng.integers(-finish.noise, finish.noise, pixels.shape, np.int16, endpoint=True)
        picture = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
    if finish.jpeg:
        data = BytesIO()
        picture.save(data, "JPEG", quality=finish.jpeg)
        picture = Image.open(data)
    return np.array(picture)


def draw(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """-> picture uint8 [height, width, 3] and object map uint8 [height, width]: 0 background, k object k.

    Shapes are objects 1, 2, ... in the scene's order, then the printed characters from left to right.
    """
    patches, colours = scene_patches(scene)
    return paint(patches, colours, scene.width, scene.height, scene.finish)
