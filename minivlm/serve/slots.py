"""Which slot of the cache holds which ids: a prompt that begins as an earlier one finds those keys computed.

Slots are contiguous and prefixes are copied between them, not shared in pages: the kernels read one simple tensor,
and a copy costs a few thousandths of what computing the same keys does (README, serving).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from minivlm.ops.kv_cache import KVCache
from minivlm.row import Row

PIECE = 64  # ids that are compared at once


@dataclass(frozen=True)
class Pictured:
    """Where a picture's placeholders begin among the ids, and the digest of its content."""

    start: int
    key: bytes


@dataclass
class Slot:
    """What a slot holds: keys of the first `cached` of `ids`; while a row runs in it, of as many as the row says."""

    ids: Sequence[int] = ()
    pictures: tuple[Pictured, ...] = ()
    cached: int = 0
    row: Row | None = None
    used: int = field(default=0)  # when it was last given back; 0 is never

    @property
    def filled(self) -> int:
        """Positions whose keys are there."""
        return self.cached if self.row is None else self.row.cached


class Slots:
    """The slots of one cache, handed to rows and taken back."""

    def __init__(self, cache: KVCache, count: int):
        self.cache = cache
        self.slots = [Slot() for _ in range(count)]
        self.hits = self.reused = self.copied = 0  # prompts that found a prefix; positions of them; of these copied
        self._clock = 0

    @property
    def free(self) -> int:
        """Slots without a row."""
        return sum(slot.row is None for slot in self.slots)

    def take(self, row: Row, pictures: tuple[Pictured, ...], reuse: bool = True) -> int:
        """A free slot for a row that has just been made; its `cached` says how much of the prompt is there already."""
        most = len(row.ids) - 1 if reuse else 0  # the last position gives the first logits, so it is computed
        common = [min(shared(slot, row.ids, pictures), most) for slot in self.slots]
        free = [i for i, slot in enumerate(self.slots) if slot.row is None]
        oldest = min(free, key=lambda i: self.slots[i].used)
        best = max(range(len(self.slots)), key=lambda i: (common[i], self.slots[i].row is None))
        taken = oldest
        # Taking a slot loses what it holds behind the prefix: it should be little, or what would be lost anyway.
        if self.slots[best].row is None and 2 * common[best] >= self.slots[best].cached:
            taken = best
        if common[best] and taken != best:
            self.cache.copy(best, taken, common[best])
            self.copied += common[best]
        row.cached = common[best]
        self.hits += common[best] > 0
        self.reused += common[best]
        self.slots[taken] = Slot(row.ids, pictures, row=row)
        return taken

    def give_back(self, index: int, keep: bool = True) -> None:
        """The row has left. keep: whether what it computed is sound, so that others may begin with it."""
        slot = self.slots[index]
        self._clock += 1
        cached = slot.row.cached if keep else 0
        self.slots[index] = Slot(slot.ids, slot.pictures, cached, None, self._clock if keep else 0)


def shared(slot: Slot, ids: Sequence[int], pictures: Sequence[Pictured]) -> int:
    """Positions from the first on whose keys are those of a prompt: the same ids, and where they are a picture's, the
    same picture."""
    most, at = min(slot.filled, len(ids)), 0
    while at < most and slot.ids[at : min(at + PIECE, most)] == ids[at : min(at + PIECE, most)]:
        at = min(at + PIECE, most)
    while at < most and slot.ids[at] == ids[at]:
        at += 1
    for one, two in zip(slot.pictures, pictures, strict=False):
        if one != two:
            at = min(at, one.start, two.start)
            break
    return at
