"""Any-resolution tiling: the canvas of a picture, the number of its image tokens, the packing of features.

Pure geometry; it knows nothing of pixels or text, and of the model only how many patches a tile has. Every size is
(height, width) in Python ints.
Source: LLaVA-NeXT (Liu et al. 2024), in the form of Hugging Face's `llava_next`. That form differs from the
original code in one place: the original reads the pinpoints as (width, height). The published set is
symmetric, so only ties are affected: a picture of at most 336x336 gets the canvas 336 high and 672 wide here,
672 high and 336 wide there.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from minivlm.errors import InputError

Size = tuple[int, int]


@dataclass(frozen=True)
class VisionGeometry:
    """What the model's config.json says about image tokens; the processor counts by it.

    image_size: side T of a tile in pixels; patch_size: side of a patch in pixels;
    image_grid_pinpoints: the canvases (height, width) of LLaVA-NeXT, None for LLaVA-1.5's one tile a picture;
    vision_feature_select_strategy: "default" drops the class token, "full" keeps it;
    num_additional_image_tokens: class tokens that the encoder puts before its patches: CLIP 1, SigLIP 0.
    """

    image_size: int
    patch_size: int
    image_grid_pinpoints: tuple[Size, ...] | None
    vision_feature_select_strategy: str = "default"
    num_additional_image_tokens: int = 1

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise InputError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        strategy, extra = self.vision_feature_select_strategy, self.num_additional_image_tokens
        if strategy not in ("default", "full"):
            raise InputError(f"vision_feature_select_strategy = {strategy!r}, expected 'default' or 'full'")
        if strategy == "default" and extra != 1:
            raise InputError(f"vision_feature_select_strategy 'default' drops one class token, the encoder has {extra}")
        if self.image_grid_pinpoints is not None:
            check_pinpoints(self.image_grid_pinpoints, self.image_size)
            if strategy == "full" and extra:
                raise InputError("vision_feature_select_strategy 'full' keeps a class token: no grid can hold it")

    def tile_count(self, image_size: Any) -> int:
        """Tiles of a picture of this (height, width), the base tile included."""
        if self.image_grid_pinpoints is None:
            return 1
        return tile_count(image_size, self.image_grid_pinpoints, self.image_size)

    def image_token_count(self, image_size: Any) -> int:
        """Image tokens of a picture of this (height, width): LLaVA-1.5 576, LLaVA-NeXT 576 to 2928."""
        if self.image_grid_pinpoints is None:
            whole = self.vision_feature_select_strategy == "full"
            patches = (self.image_size // self.patch_size) ** 2
            return patches + (self.num_additional_image_tokens if whole else 0)
        return image_token_count(image_size, self.image_grid_pinpoints, self.image_size, self.patch_size)


def as_size(image_size: Any) -> Size:
    """(height, width) as Python ints, from a list, tensor or array (whose arithmetic rounds differently)."""
    try:
        height, width = (operator.index(side) for side in image_size)
    except (TypeError, ValueError):
        raise InputError(f"image size {image_size!r}, expected (height, width)") from None
    if height < 1 or width < 1:
        raise InputError(f"image size {height}x{width} (height x width) has no pixels")
    return height, width


def check_pinpoints(pinpoints: Sequence[Size], tile: int) -> None:
    """Refuse an empty list and any canvas that whole tiles of side `tile` pixels do not fill."""
    if not pinpoints:
        raise InputError("image_grid_pinpoints is empty, expected at least one (height, width)")
    for height, width in pinpoints:
        if height < tile or width < tile or height % tile or width % tile:
            raise InputError(f"image_grid_pinpoints holds ({height}, {width}), not a multiple of the tile size {tile}")


def select_best_resolution(image_size: Any, pinpoints: Sequence[Size]) -> Size:
    """The canvas that keeps most of the picture's pixels, then wastes least; the first wins a tie.

    Example: 480x640 (height x width) fits (672, 672) as 504x672, more than its own 307200 pixels, so nothing
    is lost; in (336, 672) it would shrink to 336x448. A 300x300 picture keeps all its pixels in every canvas,
    and (336, 672) is the first of the two smallest.
    """
    height, width = as_size(image_size)
    best, best_kept, best_wasted = None, -1, 0
    for canvas_height, canvas_width in pinpoints:
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_height * canvas_width - kept
        if kept > best_kept or (kept == best_kept and wasted < best_wasted):
            best, best_kept, best_wasted = (canvas_height, canvas_width), kept, wasted
    if best is None:
        raise InputError("image_grid_pinpoints is empty, expected at least one (height, width)")
    return best


def fitted_size(image_size: Any, canvas: Size) -> Size:
    """The size to which a picture is scaled so that it just fits the canvas, its proportions kept.

    Example: 899x1024 in (672, 672) becomes 590x672 (899 * 672/1024 = 589.97, rounded up).
    """
    height, width = as_size(image_size)
    scale_height, scale_width = canvas[0] / height, canvas[1] / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_height), canvas[1])


def margins(fitted: Size, canvas: Size) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) pixels that centre the fitted picture; an odd one goes bottom or right.

    Example: 589x672 in (672, 672) has 83 rows to spare: 41 above and 42 below.
    """
    rows, columns = canvas[0] - fitted[0], canvas[1] - fitted[1]
    return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2


def tile_grid(image_size: Any, pinpoints: Sequence[Size], tile: int) -> tuple[int, int]:
    """(rows, columns) of tiles.

    Example: 400x900 (height x width) has the canvas (336, 1008), 1 row of 3 tiles; 900x400 has 3 rows of 1.
    """
    height, width = select_best_resolution(image_size, pinpoints)
    return height // tile, width // tile


def tile_count(image_size: Any, pinpoints: Sequence[Size], tile: int) -> int:
    """Tiles of a picture, the base tile included. Example: 336x336 gives 1 + 1 * 2 = 3."""
    rows, columns = tile_grid(image_size, pinpoints, tile)
    return 1 + rows * columns


def unpadded_grid(image_size: Any, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches left of a grid when the margins are cut off again, evenly on both sides.

    The margins are counted from the picture's proportions, not from the pixels that were padded; an odd
    remainder keeps one row or column of padding.
    Example: 480x640 in 48x48 keeps 480 * 48/640 = 36 rows: (48 - 36) // 2 = 6 are cut above and 6 below.
    Rounding to 7 digits is part of it: 88x55 in 24x48 keeps 55 * 24/88 = 15 columns, in floating point
    14.999999999999998. Of the 33 others 16 are cut on each side, so 16 columns stay.
    """
    height, width = as_size(image_size)
    rows, columns = grid
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return rows - (rows - kept) // 2 * 2, columns
    kept = int(round(width * (rows / height), 7))
    return rows, columns - (columns - kept) // 2 * 2


def image_token_count(image_size: Any, pinpoints: Sequence[Size], tile: int, patch: int) -> int:
    """Image tokens I of a picture: the base tile's patches, then the unpadded grid with one newline per row.

    Example (tile 336, patch 14, so 24x24 patches a tile): 480x640 gives 576 + 36 * 48 + 36 = 2340.
    """
    side = tile // patch
    rows, columns = tile_grid(image_size, pinpoints, tile)
    rows, columns = unpadded_grid(image_size, (rows * side, columns * side))
    return side * side + rows * columns + rows


def pack_image_features(
    features: Tensor, image_newline: Tensor, image_size: Any, pinpoints: Sequence[Size], tile: int, patch: int
) -> Tensor:
    """The image tokens [I, D] of one picture from the features [N, P, D] of its tiles, the base tile first.

    The inverse of `image_token_count`: I always equals it. image_newline [D] ends every row of the grid, not
    of the base tile. Only copies, so it is exact in any dtype. Raises InputError when N or P is not what the
    size asks for.
    """
    side = tile // patch
    rows, columns = tile_grid(image_size, pinpoints, tile)
    expected = (1 + rows * columns, side * side)
    if features.shape[:2] != expected:
        raise InputError(
            f"features {tuple(features.shape)}, expected {expected[0]} tiles of {expected[1]} patches "
            f"for a picture of {as_size(image_size)}"
        )
    base, tiles = features[0], features[1:]  # [P, D], [N-1, P, D]
    grid = rearrange(tiles, "(rows columns) (h w) d -> (rows h) (columns w) d", rows=rows, h=side)
    kept_rows, kept_columns = unpadded_grid(image_size, grid.shape[:2])
    top, left = (grid.shape[0] - kept_rows) // 2, (grid.shape[1] - kept_columns) // 2
    grid = grid[top : top + kept_rows, left : left + kept_columns]
    newlines = image_newline.to(grid).expand(kept_rows, 1, -1)
    grid = torch.cat([grid, newlines], dim=1)
    return torch.cat([base, rearrange(grid, "h w d -> (h w) d")])  # [I, D]
