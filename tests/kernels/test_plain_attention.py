"""The plain twins of attention against loops over single queries and keys, in float64 and from the definition."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from problems import Problem, causal, drawn, everything, open_prefix, problem, segments

from minivlm.kernels.attention_decode import plain_attention_decode
from minivlm.kernels.attention_prefill import plain_attention_prefill

CPU = torch.device("cpu")


def in_loops(given: Problem) -> np.ndarray:
    """[S, H, C]: one softmax for each query and head over a list of keys."""
    q, k, v = (x.double().numpy() for x in (given.q, given.k, given.v))
    _, heads, channels = q.shape
    out = np.zeros(q.shape)
    for row, (slot, origin) in enumerate(zip(given.slots.tolist(), given.origins.tolist(), strict=True)):
        for i in range(given.offsets[row], given.offsets[row + 1]):
            keys = set(range(given.lo[i], given.hi[i]))
            keys |= set() if given.prefix is None else set(range(given.prefix[i]))
            at = [origin + j for j in sorted(keys)]
            for h in range(heads if at else 0):
                shared = h * k.shape[1] // heads  # consecutive query heads share a key head
                scores = np.array([q[i, h] @ k[slot, shared, j] / math.sqrt(channels) for j in at])
                weights = np.exp(scores - scores.max())
                out[i, h] = (weights / weights.sum()) @ v[slot, shared, at]
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "rows",
    [
        [causal(5), causal(1), causal(3, start=4)],
        [causal(9, window=3), causal(2, start=6, window=4)],
        [everything(4), open_prefix(6, 3)],
        [segments(3, 2, 1, 4), segments(0, 2, 2)],
        [drawn(7, 9, seed) for seed in range(3)],
    ],
    ids=["causal", "window", "bidirectional", "segments", "drawn"],
)
def test_prefill(rows, heads, kv_heads, packed):
    given = problem(rows, heads, kv_heads, 6, packed)
    found = plain_attention_prefill(*given.arguments(CPU, torch.float64))
    assert_allclose(found, in_loops(given), atol=1e-12)


@pytest.mark.parametrize("n", [1, 3])
def test_decode(n):
    given = problem([causal(n, start) for start in (0, 7, 4)], 6, 2, 6)
    wide = given.to(CPU, torch.float64)
    found = plain_attention_decode(wide.q, wide.k, wide.v, wide.lo, wide.hi, wide.slots, splits=3)
    assert_allclose(found, in_loops(given), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_near_the_truth(dtype):
    given = problem([causal(20), drawn(9, 30, 1)], 4, 2, 16)
    found = plain_attention_prefill(*given.arguments(CPU, dtype))
    assert found.dtype == dtype
    assert_allclose(found.double(), in_loops(given), atol=8 * torch.finfo(dtype).eps)
