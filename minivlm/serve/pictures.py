"""Image tokens of pictures by their content: each is encoded once, a few tiles at a time, and kept while there is room.

It knows nothing of requests or threads: the engine's thread alone calls it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from minivlm.processor import Inputs
from minivlm.processor.anyres import Size
from minivlm.vlm import VLM


def picture_keys(inputs: Inputs) -> tuple[bytes, ...]:
    """What tells each picture from others: a digest of its tiles and size. It takes milliseconds a megapixel."""
    keys = []
    for tiles, size in zip(inputs.tiles.split(list(inputs.tile_counts)), inputs.image_sizes, strict=True):
        digest = hashlib.sha256(repr((size, tuple(tiles.shape))).encode())
        digest.update(tiles.contiguous().numpy())
        keys.append(digest.digest())
    return tuple(keys)


@dataclass
class Waiting:
    """A picture on its way through the encoder."""

    tiles: Tensor  # [n, 3, T, T]
    size: Size
    features: list[Tensor] = field(default_factory=list)  # [P, D] of each tile so far
    users: set[Hashable] = field(default_factory=set)


class Pictures:
    """Encodes pictures in the order in which they were asked for, and keeps the results used last."""

    def __init__(self, model: VLM, budget: int):
        """budget: bytes of image tokens to keep; 0 keeps none."""
        self.model, self.budget = model, budget
        self.nbytes = self.hits = self.encoded = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()  # the one used last is at the end
        self._waiting: OrderedDict[bytes, Waiting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def busy(self) -> bool:
        """Whether a picture waits to be encoded."""
        return bool(self._waiting)

    def find(self, key: bytes) -> Tensor | None:
        """The image tokens [I, D] of a picture that was encoded before."""
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def want(self, key: bytes, tiles: Tensor, size: Size, user: Hashable) -> None:
        """Put a picture in line for its user; one that is in line already is encoded once for both."""
        self._waiting.setdefault(key, Waiting(tiles, size)).users.add(user)

    def first_users(self) -> list[Hashable]:
        """Who waits for the picture that is next."""
        return list(next(iter(self._waiting.values())).users)

    def drop(self, user: Hashable) -> None:
        """A user has gone: what nobody else waits for is not encoded."""
        for key, waiting in list(self._waiting.items()):
            waiting.users.discard(user)
            if not waiting.users:
                del self._waiting[key]

    @torch.inference_mode()
    def encode(self, most: int, pictures: int | None = None) -> list[tuple[bytes, Tensor, set[Hashable]]]:
        """Encode at most that many tiles of those in line, of so many pictures; those that are whole now, and who waits
        for them.
        """
        device = self.model.language_model.embed_tokens.weight.device
        taken: list[tuple[Waiting, Tensor]] = []
        for waiting in islice(self._waiting.values(), pictures):
            tiles = waiting.tiles[len(waiting.features) :][:most]
            taken.append((waiting, tiles))
            most -= len(tiles)
            if most == 0:
                break
        features = self.model.encode_tiles(torch.cat([tiles for _, tiles in taken]).to(device))  # [n, P, D]
        for (waiting, _), part in zip(taken, features.split([len(tiles) for _, tiles in taken]), strict=True):
            waiting.features += part.unbind()
        done = [key for key, waiting in self._waiting.items() if len(waiting.features) == len(waiting.tiles)]
        return [self._finish(key) for key in done]

    def _finish(self, key: bytes) -> tuple[bytes, Tensor, set[Hashable]]:
        waiting = self._waiting[key]
        (tokens,) = self.model.pack_images(torch.stack(waiting.features), [waiting.size], [len(waiting.tiles)])
        del self._waiting[key]
        self.encoded += 1
        if tokens.nbytes <= self.budget:
            self._kept[key] = tokens.clone()  # not a view that holds the features of other pictures
            self.nbytes += tokens.nbytes
            while self.nbytes > self.budget:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return key, tokens, waiting.users
