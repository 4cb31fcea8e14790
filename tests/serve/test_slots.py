"""Prefixes in the cache: what is found is what an exhaustive comparison finds, and is really there."""

import random

import pytest
import torch

from minivlm.ops.kv_cache import KVCache
from minivlm.serve.slots import PIECE, Pictured, Slot, Slots, shared

IMAGE = 9


class Row:
    """As much of a row as slots read."""

    def __init__(self, ids: list[int]):
        self.ids, self.cached = ids, 0


def place(ids: list[int], lengths: list[int], keys: list[bytes]) -> tuple[Pictured, ...]:
    starts = [at for at, token_id in enumerate(ids) if token_id == IMAGE]
    return tuple(Pictured(starts[sum(lengths[:i])], key) for i, key in enumerate(keys))


def test_a_common_prefix_ends_where_ids_or_pictures_differ():
    rng = random.Random(0)
    for _ in range(500):
        sides = []
        for _ in range(2):
            lengths = [rng.choice([2, 3]) for _ in range(rng.randint(0, 2))]
            keys = [bytes([length, rng.randint(0, 1)]) for length in lengths]  # equal pictures have equal lengths
            ids, truth = [], []  # truth: what each position means
            for length, key in zip(lengths, keys, strict=True):
                ids += [1] * rng.randint(0, 1) + [IMAGE] * length
                truth += [1] * (len(ids) - length - len(truth)) + [(key, i) for i in range(length)]
            tail = [rng.randint(1, 2) for _ in range(rng.choice([3, PIECE * 2]))]
            sides.append((ids + tail, truth + tail, place(ids, lengths, keys)))
        (ids, truth, pictures), (others, other_truth, other_pictures) = sides
        filled = rng.randint(0, len(ids))
        found = shared(Slot(ids, pictures, filled), others, other_pictures)
        same = next((i for i, (a, b) in enumerate(zip(truth, other_truth, strict=False)) if a != b), 10**9)
        assert found == min(filled, same, len(ids), len(others))


@pytest.fixture
def slots() -> Slots:
    return Slots(KVCache(1, 3, 1, 40, 2, torch.float32, "cpu"), 3)


def use(slots: Slots, ids: list[int], reuse: bool = True, leave: bool = True, keep: bool = True) -> tuple[int, int]:
    """A row of these ids takes a slot, writes each key as its id, and leaves: the slot, and what was there already."""
    row = Row(list(ids))
    slot = slots.take(row, (), reuse)
    found = row.cached
    assert slots.cache.keys[0, slot, 0, :found, 0].tolist() == [float(i) for i in ids[:found]]
    slots.cache.keys[0, slot, 0, : len(ids)] = torch.tensor(ids, dtype=torch.float32)[:, None]
    row.cached = len(ids)
    if leave:
        slots.give_back(slot, keep)
    return slot, found


def test_a_dialogue_finds_its_slot_again(slots):
    first, _ = use(slots, [1, 2, 3, 4, 5])
    other, found = use(slots, [7, 8, 9])
    assert other != first and found == 0
    assert use(slots, [1, 2, 3, 4, 5, 6, 7]) == (first, 5)
    assert use(slots, [1, 2, 3, 4, 5, 6, 7]) == (first, 6)  # one id is always computed
    assert (slots.hits, slots.reused, slots.copied) == (2, 11, 0)


def test_a_prefix_is_copied_rather_than_taken_from_its_owner(slots):
    running, _ = use(slots, [1, 2, 3, 4], leave=False)
    beside, found = use(slots, [1, 2, 3, 5])
    assert beside != running and found == 3 and slots.copied == 3
    third, found = use(slots, [1, 6, 6, 6, 6, 6, 6])  # to share one id is no reason to lose what lies behind it
    assert third not in (running, beside) and found == 1
    assert use(slots, [1, 2, 3, 5, 5]) == (beside, 4)


def test_the_slot_used_longest_ago_goes_first(slots):
    order = [use(slots, [i] * 5)[0] for i in (1, 2, 3)]
    assert sorted(order) == [0, 1, 2]
    use(slots, [1] * 6)
    assert use(slots, [4] * 5)[0] == order[1]


def test_what_failed_or_must_be_computed_is_not_reused(slots):
    use(slots, [1, 2, 3], keep=False)
    assert use(slots, [1, 2, 3])[1] == 0
    assert use(slots, [1, 2, 3], reuse=False)[1] == 0
    assert use(slots, [1, 2, 3])[1] == 2


def test_random_use_never_finds_other_keys(slots):
    """`use` compares what is found with what it should be; half of the rows stay for a while."""
    rng, staying = random.Random(1), []
    for _ in range(300):
        if len(staying) == 3 or (staying and rng.random() < 0.4):
            slots.give_back(staying.pop(rng.randrange(len(staying))))
        ids = [1] * rng.randint(0, 6) + [rng.randint(1, 2) for _ in range(rng.randint(1, 20))]
        slot, _ = use(slots, ids, leave=False)
        staying.append(slot)
    assert slots.hits > 200 and slots.copied > 0
