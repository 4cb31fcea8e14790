"""The machine and its clock: what it is, how fast it reads and multiplies, and medians of interleaved runs."""

import ctypes
import platform
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from minivlm.kernels.cpu import single_row

SMALL = 0.2  # share of the buffers that the quick form reads and multiplies


@dataclass(frozen=True)
class Contender:
    """What is timed, and what puts it back to where it began, untimed."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


def interleaved(contenders: Mapping[str, Contender], rounds: int, device: torch.device, warm: int = 2) -> dict:
    """The median seconds of each, by name. Every round runs all of them once, so that all see the same weather."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm + rounds):
        for name, contender in contenders.items():
            synchronise(device)
            began = perf_counter()
            contender.run()
            synchronise(device)
            seconds = perf_counter() - began
            contender.reset()
            if turn >= warm:
                times[name].append(seconds)
    return {name: median(measured) for name, measured in times.items()}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second that the device reads: `size` bytes summed, and multiplied by a vector, whichever is faster."""
    buffer = torch.ones(size // 4, device=device)
    matrix, vector = buffer.view(-1, 1024), buffer[:1024]
    readers = {"sum": Contender(buffer.sum), "product": Contender(lambda: matrix @ vector)}
    return size / min(interleaved(readers, 7, device).values())


def rate(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Operations a second of a square matrix product in this type, two a multiplication."""
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / interleaved({"": Contender(lambda: left @ right)}, 7, device)[""]


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """The most memory that a run holds beyond what there was before: on CUDA what PyTorch allocated, else anonymous."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and a run would take it from there unseen
    peak = PeakMemory()
    peak.start()
    run()
    peak.ended.set()
    peak.join()
    return peak.largest - peak.first


class PeakMemory(threading.Thread):
    """The largest anonymous memory of this process, read every 2 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.first = self.largest = _anonymous()

    def run(self):
        while not self.ended.wait(0.002):
            self.largest = max(self.largest, _anonymous())


def _anonymous() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def machine(device: torch.device, backend: str) -> dict[str, str]:
    """What the numbers were measured on; transformers and Numba where they are installed."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    found = {"chip": chip, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "numba"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if backend == "cpu" and (reason := single_row.missing()) is not None:
        found["single rows"] = f"by the libraries ({reason})"
    return found | {"backend": backend}


def _processor() -> str:
    """The processor's name, its number of cores, and its instructions for matrices."""
    path, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    text = path.read_text() if path.is_file() else ""
    if found := re.search(r"model name\s*:\s*(.+)", text):
        name = found[1]
    flags = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{flag}\b", text)]
    return ", ".join([name, f"{torch.get_num_threads()} threads", *flags[:1]])
