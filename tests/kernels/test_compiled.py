"""Every kernel, at every configuration it ships with, compiled for chips that are not here: it fits, and hardly spills.

`python tests/kernels/compiled.py 90` prints the table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compiled.py"
# Shared memory that a program may have, in bytes: CUDA C++ programming guide, "technical specifications", less the
# kilobyte that the system keeps.
SHARED = {80: 163 << 10, 90: 227 << 10}
REGISTERS = 65536  # of a processor
# Registers that did not fit, in bytes a thread: offsets that the loops only read, reloaded from the first cache.
MOST_STACK = 128
CAPABILITIES = pytest.mark.parametrize("capability", sorted(SHARED))


@pytest.fixture(scope="module")
def compiled():
    """capability -> what each compiled kernel takes. In processes of their own: here Triton is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    runs = {chip: subprocess.Popen([sys.executable, SCRIPT, str(chip)], **pipes) for chip in SHARED}
    tables = {}
    for chip, run in runs.items():
        lines, errors = run.communicate()
        assert run.returncode == 0, errors
        tables[chip] = [json.loads(line) for line in lines.splitlines()]
    return tables


@CAPABILITIES
def test_every_kernel_fits(compiled, capability):
    names = {kernel["kernel"] for kernel in compiled[capability]}
    assert names >= {"_attention_prefill", "_attend_split", "_join_splits"}
    for kernel in compiled[capability]:
        print(capability, *kernel.values())
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel["registers"] * kernel["threads"] <= REGISTERS, kernel
        assert kernel["stack"] <= MOST_STACK, kernel


@CAPABILITIES
def test_attention_copies_while_it_computes_and_uses_tensor_cores(compiled, capability):
    """What a stride that is not known to be aligned, or a mask in the wrong place, would silently undo."""
    for kernel in compiled[capability]:
        if kernel["kernel"] in ("_attention_prefill", "_attend_split"):
            assert "cp.async" in kernel["instructions"], kernel
            if "float32" not in kernel["call"]:
                assert {"wgmma.mma_async", "mma.sync"} & set(kernel["instructions"]), kernel
                hopper = capability == 90 and kernel["kernel"] == "_attention_prefill"
                assert not hopper or "wgmma.mma_async" in kernel["instructions"], kernel


def test_heads_of_64_channels_leave_room_for_a_second_program(compiled):
    """On Hopper one program's exponentials can then run beside the other's products."""
    calls = [kernel for kernel in compiled[90] if kernel["call"].startswith("prefill bfloat16 64")]
    assert calls
    for kernel in calls:
        assert 2 * kernel["registers"] * kernel["threads"] <= REGISTERS and 2 * kernel["shared"] <= SHARED[90]
