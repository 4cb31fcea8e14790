"""Rounded shapes: results are those of the numbers asked for, and memory stays where it was."""

import subprocess
import sys

import pytest
import torch

from minivlm.ops.attention import eager
from minivlm.ops.cpu_shapes import attend, of_rounded, rounded_up

MEMORY = """
import random, re, sys, tiny, torch, minivlm
from pathlib import Path
from minivlm.ops.rows import Rows
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
torch.set_num_threads(1)
decoder = minivlm.load(dtype="bfloat16", device="cpu", backend=sys.argv[1]).model.language_model
cache, numbers = decoder.new_cache(4, 1200), random.Random(0)
sizes = []
with torch.inference_mode():
    for turn in range(600):
        rows = Rows.causal(*zip(*((numbers.randint(1, 250), numbers.randint(0, 900)) for _ in range(2))))
        decoder(torch.zeros(sum(rows.lengths), decoder.config.hidden_size, dtype=torch.bfloat16), rows, cache)
        sizes.append(anonymous())
print(sizes[-1] - sizes[299])
"""


def test_numbers_are_rounded_up_to_few():
    assert [rounded_up(n) for n in (1, 2, 8, 9, 64, 65, 96, 97)] == [1, 8, 8, 16, 64, 96, 96, 128]
    assert len({rounded_up(n) for n in range(1, 513)}) == 1 + 8 + 14


@pytest.mark.parametrize("shape", [(1, 6), (2, 6), (65, 6), (3, 5, 6), (6,)])
def test_a_product_of_rounded_rows_is_the_product(shape):
    x, weight = torch.randn(shape), torch.randn(4, 6)
    found = of_rounded(lambda x: torch.nn.functional.linear(x, weight), x)
    assert found.shape == (*shape[:-1], 4)
    assert torch.allclose(found, torch.nn.functional.linear(x, weight), atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 9, 40])
@pytest.mark.parametrize("past", [0, 1, 70])
def test_attention_with_a_mask_equals_the_plain_form(n, past):
    q, k, v = torch.randn(1, 4, n, 8), torch.randn(1, 2, n + past, 8), torch.randn(1, 2, n + past, 8)
    visible = torch.rand(n, n + past) < 0.5
    visible[:, -1] = True  # every query sees something
    expected = eager(q, k, v, visible)
    assert torch.allclose(attend(q, k, v, visible), expected, atol=1e-5)
    assert torch.allclose(attend(q, k, v, "all"), eager(q, k, v, "all"), atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_prompts_of_every_length_leave_no_memory_behind():
    """300 pairs of lengths after 300 others. Backend `sdpa`, which rounds nothing, shows that there is something to
    leave: 100 MB and more on a processor whose bfloat16 products are oneDNN's."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "cpu"], capture_output=True, text=True, check=True, cwd="tests"
    )
    assert float(done.stdout) < 15
