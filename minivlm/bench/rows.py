"""The rows of `minivlm bench` that run on any device: random decoders, and the shipped checkpoint.

Floors: a step must read every matrix and every cached key and value once; a prompt must be multiplied by every matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from minivlm import hub
from minivlm.bench import measure
from minivlm.bench.measure import Contender
from minivlm.bench.models import Pair, Shape
from minivlm.bench.report import Floor, Row
from minivlm.errors import InputError
from minivlm.models import SAMPLE_PICTURE, SAMPLE_QUESTION
from minivlm.ops.quantised import FORMATS
from minivlm.pipeline import load
from minivlm.processor.images import load_image
from minivlm.processor.prompts import question_to_messages

MOST_TOKENS = 200


@dataclass(frozen=True)
class Bench:
    """How one run of the command measures.

    rounds: of each measurement; prompt: positions before the steps that are timed; buffer: bytes that are read to
    measure the bandwidth; side: of the square matrices that are multiplied to measure the rate.
    """

    device: torch.device
    backend: str
    rounds: int
    prompt: int
    buffer: int = 2**30
    side: int = 2048

    def floor(self, read: float, operations: float, dtype: torch.dtype) -> Floor:
        """The floor of so many bytes and operations, at what this machine does with the threads it now has."""
        threads = torch.get_num_threads()
        return Floor(read, operations, _bandwidth(self, threads), _rate(self, dtype, threads))

    def timed(self, contenders: dict[str, Contender], rounds: int | None = None) -> dict[str, float]:
        """Median seconds by name."""
        with torch.inference_mode():
            return measure.interleaved(contenders, rounds or self.rounds, self.device)


@cache
def _bandwidth(bench: Bench, threads: int) -> float:
    return measure.bandwidth(bench.device, bench.buffer)


@cache
def _rate(bench: Bench, dtype: torch.dtype, threads: int) -> float:
    return measure.rate(bench.device, dtype, bench.side)


def setting(pair: Pair, *parts: str) -> str:
    """As "300M, bfloat16, 1000 keys, 1 row, 2 threads"."""
    words = [pair.shape.name, str(pair.dtype).removeprefix("torch."), *parts]
    return ", ".join([*words, *_threads(pair.device)])


def _threads(device: torch.device) -> list[str]:
    threads = torch.get_num_threads()
    return [f"{threads} thread{'s' if threads > 1 else ''}"] if device.type == "cpu" else []


def decoder(bench: Bench, shape: Shape, dtype: torch.dtype, threads: tuple[int, ...], jobs: dict) -> Iterator[Row]:
    """The rows of one random decoder, which is made once.

    jobs: by name of the row, "prefill" with its lengths, the others with their (batch, context).
    """
    pair = Pair.of(shape, dtype, bench.device, bench.backend)
    before = torch.get_num_threads()
    try:
        for number in threads:
            torch.set_num_threads(number)
            for name, sizes in jobs.items():
                for size in sizes:
                    if name == "prefill":
                        yield prefill(bench, pair, size)
                    elif name in FORMATS:
                        yield quantised(bench, pair, name, *size)
                    else:
                        yield decode(bench, pair, name, *size)
    finally:
        torch.set_num_threads(before)


def decode(bench: Bench, pair: Pair, name: str, batch: int, context: int) -> Row:
    """One step of a batch behind a cached context."""
    contenders = pair.decode(batch, context)
    if bench.device.type == "cuda" and batch == 1:
        contenders |= pair.compiled(batch, context)
    times = bench.timed(contenders)
    floor = bench.floor(pair.shape.step_bytes(context, batch, pair.dtype.itemsize, pair.bits), 0, pair.dtype)
    rows = f"{batch} row{'s' if batch > 1 else ''}"
    seconds = times.pop("minivlm")
    bits = [] if pair.bits is None else [f"in {pair.bits:.1f} bits"]
    what = setting(pair, *bits, f"{context} keys", rows)
    return Row(name, what, seconds, floor, times, tokens=batch, batch=batch, context=context)


def quantised(bench: Bench, pair: Pair, form: str, batch: int, context: int) -> Row:
    """The same step with weights in a format, beside that with the weights as they were."""
    small = pair.quantised(form, bench.backend)
    contenders = pair.decode(batch, context)
    contenders["as stored"] = contenders.pop("minivlm")
    times = bench.timed({"minivlm": small.decode(batch, context, ())["minivlm"], **contenders})
    read = pair.shape.step_bytes(context, batch, pair.dtype.itemsize, small.bits)
    seconds = times.pop("minivlm")
    what = setting(pair, f"{form} weights", f"{context} keys", f"{batch} row{'s' if batch > 1 else ''}")
    return Row(form, what, seconds, bench.floor(read, 0, pair.dtype), times, tokens=batch, batch=batch, context=context)


def prefill(bench: Bench, pair: Pair, positions: int) -> Row:
    """A prompt, to the first id."""
    times = bench.timed(pair.prefill(positions), max(3, bench.rounds // 4))
    floor = bench.floor(pair.shape.matrices * pair.dtype.itemsize, pair.shape.prefill_operations(positions), pair.dtype)
    seconds = times.pop("minivlm")
    return Row("prefill", setting(pair, f"{positions} positions"), seconds, floor, times)


def shipped(bench: Bench) -> Row:
    """The shipped checkpoint's answer about its sample picture: a token after the first, as a user gets it.

    minivlm's and transformers' `generate`, each with all it does for a token. Raises InputError if they differ.
    """
    import transformers

    folder = hub.resolve(None)
    vlm = load(folder, device=bench.device, backend=bench.backend)
    weight = vlm.model.language_model.embed_tokens.weight
    oracle = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=weight.dtype).to(bench.device)
    picture = load_image(str(folder / SAMPLE_PICTURE))
    inputs = vlm.processor.chat(question_to_messages(SAMPLE_QUESTION, 1), [picture])
    ids = torch.tensor([inputs.ids], device=bench.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"pixel_values": inputs.tiles[None].to(weight), "image_sizes": torch.tensor(inputs.image_sizes)}
    answers: dict[str, list[int]] = {}

    def ours(limit: int) -> None:
        answers["minivlm"] = [token.id for token in vlm.generate(inputs, max_new_tokens=limit).tokens]

    def theirs(limit: int) -> None:
        output = oracle.generate(**batch, max_new_tokens=limit, do_sample=False)
        answers["transformers"] = output[0, ids.shape[1] :].tolist()

    contenders = {
        f"{name} {limit}": Contender(lambda run=run, limit=limit: run(limit))
        for limit in (1, MOST_TOKENS)
        for name, run in (("minivlm", ours), ("transformers", theirs))
    }
    times = bench.timed(contenders)
    if answers["minivlm"] != answers["transformers"]:
        raise InputError(f"shipped: minivlm and transformers answer with different ids: {answers}")
    later = len(answers["minivlm"]) - 1
    step = {name: (times[f"{name} {MOST_TOKENS}"] - times[f"{name} 1"]) / later for name in answers}
    dtype = str(weight.dtype).removeprefix("torch.")
    what = ", ".join(["shipped checkpoint", dtype, f"a token of {later}", *_threads(bench.device)])
    text = vlm.model.config.text
    sizes = Shape("", text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads,
                  text.num_key_value_heads, text.head_dim, text.vocab_size)  # fmt: skip
    floor = bench.floor(sizes.step_bytes(len(inputs.ids), 1, weight.dtype.itemsize), 0, weight.dtype)
    return Row("shipped", what, step["minivlm"], floor, {"transformers": step["transformers"]}, tokens=1)
