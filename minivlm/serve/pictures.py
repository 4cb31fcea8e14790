"""Image tokens of pictures by their content: each is encoded once, a few tiles at a time, and kept while there is room.

One thread may encode while another asks. It knows nothing of requests.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from minivlm.processor import Inputs
from minivlm.processor.anyres import Size
from minivlm.serve.faults import tried
from minivlm.vlm import VLM


def picture_keys(inputs: Inputs) -> tuple[bytes, ...]:
    """What tells each picture from others: a digest of its tiles and size. It takes milliseconds a megapixel."""
    keys = []
    for tiles, size in zip(inputs.tiles.split(list(inputs.tile_counts)), inputs.image_sizes, strict=True):
        digest = hashlib.sha256(repr((size, tuple(tiles.shape))).encode())
        digest.update(tiles.contiguous().numpy())
        keys.append(digest.digest())
    return tuple(keys)


@dataclass(eq=False)
class Waiting:
    """A picture on its way through the encoder."""

    tiles: Tensor  # [n, 3, T, T]
    size: Size
    features: list[Tensor] = field(default_factory=list)  # [P, D] of each tile so far
    tokens: Tensor | None = None  # [I, D], once all features are there
    users: set[Hashable] = field(default_factory=set)


@dataclass(frozen=True)
class Encoded:
    """A picture that has been through the encoder: its image tokens [I, D], or what went wrong, and who waits."""

    key: bytes
    tokens: Tensor | Exception
    users: set[Hashable]


class Pictures:
    """Encodes pictures in the order in which they were asked for, and keeps the results used last."""

    def __init__(self, model: VLM, budget: int):
        """budget: bytes of image tokens to keep; 0 keeps none."""
        self.model, self.budget = model, budget
        self.nbytes = self.hits = self.encoded = 0
        self._changed = threading.Condition()  # guards what follows, and the numbers
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()  # the one used last is at the end
        self._waiting: OrderedDict[bytes, Waiting] = OrderedDict()
        self._closed = False

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def busy(self) -> bool:
        """Whether a picture waits to be encoded."""
        return bool(self._waiting)

    def want(self, key: bytes, tiles: Tensor, size: Size, user: Hashable) -> Tensor | None:
        """The image tokens [I, D] of a picture that was encoded before; else None, and it is in line for its user. One
        that is in line already is encoded once for both."""
        with self._changed:
            if key in self._kept:
                self.hits += 1
                self._kept.move_to_end(key)
                return self._kept[key]
            self._waiting.setdefault(key, Waiting(tiles, size)).users.add(user)
            self._changed.notify()
            return None

    def drop(self, user: Hashable) -> None:
        """A user has gone: what nobody else waits for is not encoded."""
        with self._changed:
            for key, waiting in list(self._waiting.items()):
                waiting.users.discard(user)
                if not waiting.users:
                    del self._waiting[key]

    def wait(self) -> bool:
        """Until there is a picture to encode: True; or until `close`: False."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return not self._closed

    def close(self) -> None:
        """Ends what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def encode(self, most: int) -> list[Encoded]:
        """Encode at most that many tiles of those in line; the pictures that are over now.

        If the encoder fails, the first in line is encoded alone, and if it fails even then, that is its result.
        """
        taken = self._take(most, None)
        failed = tried(self._compute, taken)
        if isinstance(failed, Exception):
            taken = self._take(most, 1)
            failed = tried(self._compute, taken)
        return self._over([waiting for waiting, _ in taken], failed)

    def _take(self, most: int, pictures: int | None) -> list[tuple[Waiting, Tensor]]:
        """The next tiles [n, 3, T, T] of each of the first pictures in line."""
        taken: list[tuple[Waiting, Tensor]] = []
        with self._changed:
            for waiting in islice(self._waiting.values(), pictures):
                tiles = waiting.tiles[len(waiting.features) :][:most]
                taken.append((waiting, tiles))
                most -= len(tiles)
                if most == 0:
                    break
        return taken

    @torch.inference_mode()
    def _compute(self, taken: Sequence[tuple[Waiting, Tensor]]) -> None:
        if not taken:  # all have been dropped
            return
        device = self.model.language_model.embed_tokens.weight.device
        features = self.model.encode_tiles(torch.cat([tiles for _, tiles in taken]).to(device))  # [n, P, D]
        results = []
        for (waiting, _), part in zip(taken, features.split([len(tiles) for _, tiles in taken]), strict=True):
            found, tokens = [*waiting.features, *part.unbind()], None
            if len(found) == len(waiting.tiles):
                (tokens,) = self.model.pack_images(torch.stack(found), [waiting.size], [len(found)])
            results.append((waiting, found, tokens))
        for waiting, found, tokens in results:  # from here on nothing fails
            waiting.features, waiting.tokens = found, tokens

    def _over(self, some: Sequence[Waiting], error: Exception | None) -> list[Encoded]:
        """Of those just encoded the ones that are whole, or failed, and that somebody still waits for."""
        over = []
        with self._changed:
            for key, waiting in list(self._waiting.items()):
                result = waiting.tokens if error is None else error
                if result is None or waiting not in some:
                    continue
                del self._waiting[key]
                over.append(Encoded(key, result, waiting.users))
                if error is None:
                    self.encoded += 1
                    self._keep(key, result)
        return over

    def _keep(self, key: bytes, tokens: Tensor) -> None:
        if tokens.nbytes <= self.budget:
            self._kept[key] = tokens
            self.nbytes += tokens.nbytes
            while self.nbytes > self.budget:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
