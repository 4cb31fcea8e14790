"""Stages "encoder" and "places": a vision tower that sees, trained to name what every patch of a drawn page shows.

A published LLaVA starts from CLIP's tower; where none can be downloaded this dense supervision replaces it. First the
box of a patch's object is told relative to the patch, which is easy to learn; then as places in the tile, each one of
51 classes: what a question "where" asks for, in the form in which a decoder answers, so that the projector and the
decoder have only linear maps to find. The heads here exist during training only.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from minivlm.processor.pixels import ImageConfig
from minivlm.train.loop import HELD_OUT_BATCHES, mean_report
from minivlm.train.pages import CHARACTERS, page, patch_labels
from minivlm.train.world import COLOURS, SHAPES
from minivlm.vision.clip import CLIPVisionModel

CLASSES = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "char": len(CHARACTERS) + 1}
BOX_SCALE = 10.0  # brings a box side (shares of a tile) near the size of the class losses
PLACES = 51  # places along a tile's side, 0.02 apart: the steps of a box in words (answers.py)
# Sharpens the places' logits: without it the tower makes its states sharp instead, five sixths of their variance is
# place, and a decoder can hardly find the colour in them.
PLACES_SCALE = 5.0
TRAIN_PAGES, HELD_OUT_PAGES, TILE_PAGES = 10, 11, 12  # names of random streams


class PatchHeads(nn.Module):
    """One linear layer per question about a patch."""

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.ModuleDict({name: nn.Linear(width, n) for name, n in CLASSES.items()})
        self.box = nn.Linear(width, 4)
        self.places = nn.Linear(width, 4 * PLACES)


@dataclass(frozen=True)
class PageBatch:
    """N pages: tiles float32 [N, 3, T, T], labels int64 [N, P] by name, box float32 [N, P, 4], valid bool [N, P].

    box, in shares of the tile: from the patch's centre to its object's left, top, right and bottom side, outwards
    positive; or, `in_tile`, the places of those sides in the tile.
    """

    tiles: Tensor
    labels: dict[str, Tensor]
    box: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> "PageBatch":
        """The same pages on a device; they are drawn on the CPU."""
        labels = {name: label.to(device) for name, label in self.labels.items()}
        return PageBatch(self.tiles.to(device), labels, self.box.to(device), self.valid.to(device))


def normalised(pictures: np.ndarray, config: ImageConfig) -> Tensor:
    """uint8 [N, T, T, 3] -> float32 [N, 3, T, T], as the processor normalises a tile."""
    mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
    tiles = (torch.from_numpy(pictures).float() / 255 - mean) / std
    return tiles.permute(0, 3, 1, 2).contiguous()


def page_batch(rng: np.random.Generator, n: int, config: ImageConfig, patch: int, in_tile: bool) -> PageBatch:
    """Draw n pages of one tile each."""
    pictures, labels = [], []
    for _ in range(n):
        picture, ids, table = page(rng, config.tile)
        pictures.append(picture)
        labels.append(patch_labels(ids, table, patch))
    stacked = {key: torch.from_numpy(np.stack([label[key] for label in labels])) for key in labels[0]}
    box, valid = stacked.pop("box"), stacked.pop("valid")
    if in_tile:  # a patch at x = 0.125 whose object ends 0.05 to its left and 0.2 to its right: 0.075, 0.325
        side = torch.arange(0.5 * patch, config.tile, patch) / config.tile
        centre = torch.cartesian_prod(side, side).flip(-1)  # [P, 2] as x, y, patches in reading order
        box = torch.cat((centre - box[..., :2], centre + box[..., 2:]), dim=-1)
    return PageBatch(normalised(np.stack(pictures), config), stacked, box, valid)


def patch_loss(
    tower: CLIPVisionModel, heads: PatchHeads, batch: PageBatch, depth: int, in_tile: bool
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of shape, colour and character over patches, and the box's loss; with patch accuracies and the
    mean error of a box side in shares of the tile.

    The box's loss is smooth L1, or `in_tile` the mean cross-entropy over the places of the four sides.
    Background patches count for the classes (label 0) and not for the accuracies reported, nor for the box.
    """
    features = tower(batch.tiles, (depth,))[0][:, 1:]  # [N, P, Dv]
    loss, report = torch.zeros((), device=features.device), {}
    for name, head in heads.classes.items():
        logits = head(features).float()  # [N, P, classes]
        labels = batch.labels[name]
        loss = loss + cross_entropy(logits.flatten(0, 1), labels.flatten())
        named = labels > 0
        report[name] = ((logits.argmax(-1) == labels) & named).sum().item() / max(1, named.sum().item())
    features, truth = features[batch.valid], batch.box[batch.valid]  # [M, Dv], [M, 4]
    if in_tile:
        logits = PLACES_SCALE * heads.places(features).float().unflatten(-1, (4, PLACES))
        labels = (truth * (PLACES - 1)).round().long().clamp(0, PLACES - 1)
        loss = loss + 0.5 * cross_entropy(logits.flatten(0, -2), labels.flatten())
        box = logits.argmax(-1) / (PLACES - 1)
    else:
        box = heads.box(features).float()
        loss = loss + BOX_SCALE * smooth_l1_loss(box, truth, beta=0.02)
    report["box_error"] = (box.detach() - truth).abs().mean().item()
    return loss, report


@dataclass(frozen=True)
class EncoderStage:
    """Batches and loss of the stage; batch `step` is a function of the seed and the step alone."""

    tower: CLIPVisionModel
    heads: PatchHeads
    images: ImageConfig
    patch: int
    batch: int
    seed: int
    in_tile: bool  # whether the box is told as places in the tile

    def make_batch(self, step: int) -> PageBatch:
        return self.pages(TILE_PAGES if self.in_tile else TRAIN_PAGES, step)

    def pages(self, stream: int, step: int) -> PageBatch:
        """Batch `step` of one of the random streams."""
        rng = np.random.default_rng([self.seed, stream, step])
        return page_batch(rng, self.batch, self.images, self.patch, self.in_tile)

    def loss(self, batch: PageBatch) -> tuple[Tensor, dict[str, float]]:
        batch = batch.to(self.heads.box.weight.device)
        return patch_loss(self.tower, self.heads, batch, len(self.tower.encoder.layers), self.in_tile)

    def held_out(self) -> dict[str, float]:
        """Loss and patch accuracies on pages that no step draws (their strings are the training split's)."""
        with torch.no_grad():
            return mean_report(self.loss(self.pages(HELD_OUT_PAGES, i)) for i in range(HELD_OUT_BATCHES))
