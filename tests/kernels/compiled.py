"""Compiles kernels for a chip that need not be there, and says what they take of it.

    python tests/kernels/compiled.py 90      # compute capability 9.0; also 80. Without TRITON_INTERPRET.

Kernels are launched by their own wrappers, on tensors without memory, as far as the compiled code: so the shapes,
alignments and options are those of a real call. Prints one JSON object a line: kernel, call, bytes of shared memory,
threads, registers a thread, bytes of stack a thread (registers that did not fit), and which instructions are used.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from minivlm.kernels.attention_decode import attention_decode
from minivlm.kernels.attention_prefill import attention_prefill

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "cp.async")  # tensor cores since Hopper, before, and copies under way


class NoDevice:
    """What Triton asks of a driver on the way to compiled code."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def integers(n: int) -> torch.Tensor:
    return torch.empty(n, dtype=torch.int32, device="cuda")


def prefill(dtype: torch.dtype, channels: int, prefix: bool = False) -> None:
    """32 heads over a cache with 8, as in Mistral 7B."""
    q = torch.empty(300, 32, channels, dtype=dtype, device="cuda")
    k = torch.empty(2, 8, 4096, channels, dtype=dtype, device="cuda")
    n = integers(300)
    attention_prefill._init_fn(q, k, k, n, n, n if prefix else None, integers(2), integers(1), integers(1), 300)


def decode(dtype: torch.dtype, channels: int, n: int = 1, groups: int = 4, splits: int = 16) -> None:
    q = torch.empty(2 * n, 8 * groups, channels, dtype=dtype, device="cuda")
    k = torch.empty(2, 8, 4096, channels, dtype=dtype, device="cuda")
    attention_decode._init_fn(q, k, k, integers(2 * n), integers(2 * n), integers(2), splits)


def calls() -> Iterator[tuple[Callable, tuple]]:
    """A call for every entry of the tables of blocks, every head width and every form of a kernel."""
    for attend in (prefill, decode):
        for channels in (64, 72, 80, 96, 104, 112, 128, 256):
            yield attend, (BFLOAT16, channels)
        yield attend, (FLOAT16, 128)
        for channels in (64, 96, 128, 256):
            yield attend, (FLOAT32, channels)
    for channels in (64, 128, 256):
        yield prefill, (BFLOAT16, channels, True)
    yield prefill, (FLOAT32, 64, True)
    yield decode, (BFLOAT16, 128, 1, 4, 1)
    for dtype in (BFLOAT16, FLOAT32):
        for n in (4, 8):  # 32 and 64 queries that share a kv head; above there are 4
            for channels in (64, 128, 256):
                yield decode, (dtype, channels, n, 8)


def measured(kernel) -> dict:
    """What the compiled code takes; `cuobjdump` comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "shared": kernel.metadata.shared,
        "threads": 32 * kernel.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "instructions": [name for name in INSTRUCTIONS if name in kernel.asm["ptx"]],
    }


def main() -> None:
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # its alignment is what is wanted
    driver.set_active(NoDevice(int(sys.argv[1])))
    launch = JITFunction.run
    seen = set()
    call = ""

    def compile_only(self, *arguments, **options):
        kernel = launch(self, *arguments, **{**options, "warmup": True})
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            print(json.dumps({"kernel": kernel.metadata.name, "call": call, **measured(kernel)}), flush=True)

    JITFunction.run = compile_only
    with FakeTensorMode():
        for attend, arguments in calls():
            call = " ".join([attend.__name__, *(str(x).removeprefix("torch.") for x in arguments)])
            attend(*arguments)


if __name__ == "__main__":
    main()
