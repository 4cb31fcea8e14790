"""`minivlm bench`: which rows run on which device, and in what order."""

from collections.abc import Callable, Iterator, Sequence

import torch

from minivlm.bench import cuda, programs
from minivlm.bench.growth import growth
from minivlm.bench.measure import machine
from minivlm.bench.models import SHAPES, Shape
from minivlm.bench.report import Memory, Report, Row
from minivlm.bench.rows import Bench, decoder, shipped
from minivlm.errors import InputError
from minivlm.ops.backend import choose
from minivlm.ops.quantised import FORMATS

DECODER = ("decode", *FORMATS, "context", "batch", "prefill")
ON_CPU = (*DECODER, "shipped", "shell", "memory")
ON_CUDA = (*DECODER, "vision", "first", "sampling", "attention", "shipped", "shell")
ASKED = ("growth",)  # what runs only by name
NAMES = tuple(dict.fromkeys((*ON_CPU, *ON_CUDA, *ASKED)))
ROUNDS, QUICK_ROUNDS = 12, 4
TYPES = (torch.bfloat16, torch.float32)


def run(
    names: Sequence[str],
    device: torch.device,
    backend: str = "auto",
    quick: bool = False,
    threads: Sequence[int] = (),
    shapes: Sequence[Shape] = (),
    prompt: int | None = None,
    told: Callable[[Row | Memory], None] = lambda row: None,
) -> Report:
    """Measure the rows of these names, all that the device has if none is named.

    quick: fewer rounds, and on a CPU the smaller decoder alone. threads: numbers of threads on a CPU, by default one
    and all. shapes, prompt: other decoders and another length than the rows' own. told: is given each row at once.
    Raises InputError for a row that the device does not have.
    """
    offered = ON_CUDA if device.type == "cuda" else ON_CPU
    if unknown := [name for name in names if name not in (*offered, *ASKED)]:
        known = ", ".join((*offered, *ASKED))
        raise InputError(f"bench: no row {unknown[0]!r} on {device.type}, expected some of {known}")
    chosen = choose(backend, device, torch.bfloat16).name
    bench = Bench(
        device,
        chosen,
        rounds=QUICK_ROUNDS if quick else ROUNDS,
        prompt=prompt or (3000 if device.type == "cuda" else 1000),
    )
    if device.type == "cuda":
        rows = _on_cuda(bench, names or offered, tuple(shapes) or (SHAPES["7B"],))
    else:
        counts = tuple(threads) or tuple(dict.fromkeys((1, torch.get_num_threads())))
        sizes = tuple(shapes) or (SHAPES["300M"], SHAPES["1B"])
        rows = _on_cpu(bench, names or offered, sizes[:1] if quick else sizes, counts)
    measured = []
    for row in rows:
        told(row)
        measured.append(row)
    return Report(machine(device, chosen), tuple(measured))


def _on_cpu(
    bench: Bench, names: Sequence[str], shapes: Sequence[Shape], threads: tuple[int, ...]
) -> Iterator[Row | Memory]:
    for shape in shapes:
        for dtype in TYPES:
            jobs = {"decode": [(1, bench.prompt)]}
            if dtype == torch.bfloat16:
                jobs |= {form: [(1, bench.prompt)] for form in FORMATS}
            if shape is shapes[0]:
                jobs["context"] = [(1, 3 * bench.prompt)]
                jobs["prefill"] = [bench.prompt]
                if dtype == torch.bfloat16:
                    jobs["batch"] = [(2, bench.prompt), (8, bench.prompt)]
            jobs = {name: sizes for name, sizes in jobs.items() if name in names}
            if jobs:
                yield from decoder(bench, shape, dtype, threads, jobs)
    if "shipped" in names:
        before = torch.get_num_threads()
        for number in threads:
            torch.set_num_threads(number)
            yield shipped(bench)
        torch.set_num_threads(before)
    if "shell" in names:
        yield programs.shell_to_answer(max(3, bench.rounds // 3))
    if "memory" in names:
        yield programs.peak_memory(shapes[0])
    if "growth" in names:
        yield from growth(bench, shapes[0])


def _on_cuda(bench: Bench, names: Sequence[str], shapes: Sequence[Shape]) -> Iterator[Row | Memory]:
    jobs = {
        "decode": [(1, bench.prompt)],
        **{form: [(1, bench.prompt)] for form in FORMATS},
        "context": [(1, bench.prompt // 3), (1, 4 * bench.prompt)],
        "batch": [(8, bench.prompt), (32, bench.prompt)],
        "prefill": [bench.prompt - bench.prompt // 30],
    }
    jobs = {name: sizes for name, sizes in jobs.items() if name in names}
    threads = (torch.get_num_threads(),)
    for shape in shapes:
        if jobs:
            yield from decoder(bench, shape, torch.bfloat16, threads, jobs)
        if "first" in names:
            yield cuda.first_token(bench, shape)
    if "vision" in names:
        yield cuda.vision(bench)
    if "sampling" in names:
        yield from cuda.sampling(bench)
    if "attention" in names:
        yield from cuda.attention(bench)
    if "shipped" in names:
        yield shipped(bench)
    if "shell" in names:
        yield programs.shell_to_answer(3)
    if "growth" in names:
        yield from growth(bench, shapes[0])
