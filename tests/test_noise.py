"""The random numbers against the published Philox answers, Python's integers and the Gumbel distribution."""

import math
import random

import pytest
import torch

from minivlm.errors import InputError
from minivlm.noise import gumbel_noise, gumbel_of_bits, noises, philox4x32


def philox_of_ints(counter: list[int], key: list[int]) -> list[int]:
    """Written from the paper's definition with Python's unbounded integers, which cannot wrap."""
    multipliers, weyl, base = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 1 << 32
    left, right = [counter[0], counter[2]], [counter[1], counter[3]]
    for step in range(10):
        keys = [(key[i] + step * weyl[i]) % base for i in (0, 1)]
        products = [multipliers[i] * left[i] for i in (0, 1)]
        left = [products[1 - i] // base ^ right[i] ^ keys[i] for i in (0, 1)]
        right = [products[1 - i] % base for i in (0, 1)]
    return [left[0], right[0], left[1], right[1]]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_answers_published_with_random123(counter: str, key: str, answer: str):
    counter, key, answer = ([int(word, 16) for word in words.split()] for words in (counter, key, answer))
    ours = philox4x32([torch.tensor([word]) for word in counter], (key[0], key[1]))
    assert [int(word) for word in ours] == answer
    assert philox_of_ints(counter, key) == answer


def test_noise_equals_python_integers_and_floats():
    rng = random.Random(3)
    for _ in range(40):
        seed, position = rng.getrandbits(64), rng.choice([rng.randrange(5000), rng.getrandbits(64)])
        ids = [rng.randrange(2**17) for _ in range(5)] + [2**32 - 1]
        for token_id, ours in zip(ids, gumbel_noise(seed, position, torch.tensor(ids)).tolist(), strict=True):
            counter = [token_id, position % 2**32, position // 2**32, 0]
            high, low, _, _ = philox_of_ints(counter, [seed % 2**32, seed // 2**32])
            v = (high * 2**32 + low + 0.5) / 2**64
            assert ours == pytest.approx(-math.log(-math.log1p(-v)), rel=1e-13, abs=1e-13)


def test_noise_is_finite_and_keeps_its_tail_at_the_extremes_of_64_bits():
    zero, one, full = torch.tensor([0]), torch.tensor([1]), torch.tensor([0xFFFFFFFF])
    largest, second = float(gumbel_of_bits(zero, zero)), float(gumbel_of_bits(zero, one))
    assert largest == pytest.approx(65 * math.log(2), rel=1e-12)
    assert second == pytest.approx(largest - math.log(3), rel=1e-12)  # 3/2 against 1/2: no bit is lost
    assert float(gumbel_of_bits(full, full)) == pytest.approx(-math.log(53 * math.log(2)), rel=1e-12)


def test_noise_has_the_gumbel_distribution_and_its_tail():
    n = 400_000
    noise = gumbel_noise(12345, 7, torch.arange(n)).sort().values
    cumulative = torch.exp(-torch.exp(-noise))
    steps = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum(cumulative - steps, steps + 1 / n - cumulative).max()
    assert float(distance) < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, 0.1 %
    for threshold in (6.0, 8.0, 10.0):
        expected = n * -math.expm1(-math.exp(-threshold))  # 990, 134, 18
        assert abs(int((noise > threshold).sum()) - expected) < 3.3 * math.sqrt(expected)


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_word_of_seed_and_position_matters(bit: int):
    ids = torch.arange(100)
    base = gumbel_noise(5, 9, ids)
    assert not torch.isin(gumbel_noise(5 ^ 1 << bit, 9, ids), base).any()
    assert not torch.isin(gumbel_noise(5, 9 ^ 1 << bit, ids), base).any()
    assert len(base.unique()) == 100
    assert torch.equal(gumbel_noise(5, 9, ids.flip(0)).flip(0), base)  # keyed by id, not by place


def test_several_rows_get_what_each_gets_alone():
    rows = [
        (5, 9, torch.arange(7)),
        (2**64 - 1, 2**40, torch.tensor([3])),
        (0, 0, torch.arange(0)),
        (5, 8, torch.arange(4)),
    ]
    together = noises(*zip(*rows, strict=True))
    assert len(together) == len(rows)
    for found, row in zip(together, rows, strict=True):
        assert torch.equal(found, gumbel_noise(*row))


def test_a_position_of_more_than_64_bits_is_an_error():
    for position in (-1, 2**64):
        with pytest.raises(InputError, match=f"position: found {position}, expected an integer from 0"):
            gumbel_noise(0, position, torch.arange(2))
