"""How several prompts share one packed sequence: which tokens belong to which row, and what each may see.

There is no padding, and a mask is never part of the input: B rows lie end to end along S, and what a query may see is
an interval of keys. A backend that needs a mask makes it from these. Example: two rows of 3 and 2 new tokens, the
second with 4 keys already cached:

    packed position   0  1  2 | 3  4            lengths = (3, 2)
    row               0  0  0 | 1  1            starts  = (0, 4)
    rotary position   0  1  2 | 4  5
    keys seen [lo,hi) 0:1 0:2 0:3 | 0:5 0:6     (of the row's own cache slot)

Training may put several questions about one picture behind one prefix. Then a row is cut into segments; the first
is seen by all, every other one sees the first and itself, and its positions restart where the first ends:

    segments = (3, 2, 2):   position 0 1 2 | 3 4 | 3 4        token 5 sees keys 0,1,2 and 5
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """B packed rows. All numbers are Python integers: shapes are known before any device works.

    Attributes:
        lengths: new tokens of each row; they sum to S.
        starts: keys that each row already holds in the cache.
        slots: the cache slot of each row.
        segments: each row's lengths cut into (shared prefix, independent continuation, ...); `(n,)` where undivided.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    slots: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...] = field(repr=False)

    @classmethod
    def causal(cls, lengths, starts=None, slots=None) -> "Rows":
        """Undivided rows, each seeing its own past."""
        lengths = tuple(lengths)
        starts = (0,) * len(lengths) if starts is None else tuple(starts)
        slots = tuple(range(len(lengths))) if slots is None else tuple(slots)
        return cls(lengths, starts, slots, tuple((n,) for n in lengths))

    @classmethod
    def shared_prefix(cls, segments) -> "Rows":
        """Training rows without a cache: each a prefix followed by segments that do not see one another."""
        segments = tuple(tuple(row) for row in segments)
        lengths = tuple(sum(row) for row in segments)
        return cls(lengths, (0,) * len(lengths), tuple(range(len(lengths))), segments)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each row begins in the packed sequence."""
        offsets, at = [], 0
        for length in self.lengths:
            offsets.append(at)
            at += length
        return tuple(offsets)

    @property
    def last(self) -> tuple[int, ...]:
        """The packed position of each row's last token: the only ones whose logits generation needs."""
        return tuple(at + n - 1 for at, n in zip(self.offsets, self.lengths, strict=True))

    def positions(self, device) -> Tensor:
        """Rotary position of each packed token: int64 [S]."""
        parts = []
        for start, (prefix, *others) in zip(self.starts, self.segments, strict=True):
            parts.append(torch.arange(start, start + prefix))
            parts += [torch.arange(start + prefix, start + prefix + n) for n in others]
        return torch.cat(parts).to(device)

    def visible(self, row: int, window: int | None, device) -> Tensor:
        """Which keys each query of a row may see: bool [n, start + n], the intervals written out.

        window: a query at position p sees keys p - window + 1 .. p (Mistral 7B, section 2, sliding window attention).
        """
        start, (prefix, *others) = self.starts[row], self.segments[row]
        n = self.lengths[row]
        query = torch.arange(start, start + n, device=device)[:, None]
        key = torch.arange(start + n, device=device)[None, :]
        seen = key <= query
        if window is not None:
            if others:
                raise ValueError("a sliding window over segments with a shared prefix is not defined")
            seen &= key > query - window
        at = start + prefix
        for length in others:  # a later segment sees the prefix, not its elder siblings
            seen[at - start : at - start + length, start + prefix : at] = False
            at += length
        return seen
