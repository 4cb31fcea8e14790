"""Freed memory that the process keeps: a forward pass gets no new pages."""

import subprocess
import sys

import pytest

from minivlm.ops.cpu_memory import keep_freed

FAULTS = """
import resource, sys, torch
from minivlm.ops.cpu_memory import keep_freed
if sys.argv[1] == "keep":
    assert keep_freed()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
def work():
    return sum(float((torch.ones(size, 2**18) + 1)[0, 0]) for size in (20, 3, 7, 20))  # 20 MB and less
for _ in range(5):
    work()
before = faults()
for _ in range(10):
    work()
print((faults() - before) / 10)
"""


@pytest.mark.skipif(not keep_freed(), reason="the C library is not glibc")
def test_buffers_are_not_given_back():
    """Half of what is asked for, at least, is new pages where nothing is said, so that there is something to keep."""
    found = {
        how: float(
            subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout
        )
        for how in ("keep", "default")
    }
    pages = 2 * 50 * 2**20 / 4096
    assert found["keep"] < 100 and found["default"] > pages / 2, found
