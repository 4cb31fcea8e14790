"""Which tokens belong to which row and what each may see: the worked examples, and intervals counted by hand."""

import random

import pytest
import torch

from minivlm.ops.rows import Rows

CPU = torch.device("cpu")


def seen(rows: Rows, row: int, window: int | None = None) -> list[list[int]]:
    """The keys that each query of a row sees."""
    return [line.nonzero().flatten().tolist() for line in rows.visible(row, window, CPU)]


def test_two_packed_rows():
    """The first example of rows.py."""
    rows = Rows.causal((3, 2), (0, 4))
    assert (rows.offsets, rows.last, rows.slots) == ((0, 3), (2, 4), (0, 1))
    assert rows.positions(CPU).tolist() == [0, 1, 2, 4, 5]
    assert seen(rows, 0) == [[0], [0, 1], [0, 1, 2]]
    assert seen(rows, 1) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_segments_behind_a_shared_prefix():
    """The second example of rows.py."""
    rows = Rows.shared_prefix([(3, 2, 2)])
    assert (rows.lengths, rows.last) == ((7,), (6,))
    assert rows.positions(CPU).tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert seen(rows, 0)[3:] == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 5, 6]]


def test_sliding_window_counts_the_query_itself():
    """A window of 4 is q-3 .. q: the first query that misses a key is the one at position 4."""
    rows = Rows.causal((6,))
    assert seen(rows, 0, 4) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    assert seen(Rows.causal((2,), (6,)), 0, 3) == [[4, 5, 6], [5, 6, 7]]


def test_drawn_segments_follow_the_definition():
    """A token sees the prefix, and of its own segment what came before it; positions count just these."""
    draw = random.Random(0)
    for _ in range(50):
        start, sizes = draw.randrange(4), [draw.randrange(1, 5) for _ in range(draw.randrange(1, 5))]
        rows = Rows((sum(sizes),), (start,), (0,), (tuple(sizes),))
        owner = [0] * start + [segment for segment, size in enumerate(sizes) for _ in range(size)]
        expected = [
            [key for key in range(query + 1) if owner[key] in (0, owner[query])] for query in range(start, len(owner))
        ]
        assert seen(rows, 0) == expected
        assert rows.positions(CPU).tolist() == [len(keys) - 1 for keys in expected]


def test_a_window_over_a_shared_prefix_is_refused():
    with pytest.raises(ValueError, match="not defined"):
        Rows.shared_prefix([(3, 2, 2)]).visible(0, 4, CPU)
