"""Whole programs, each in a process of its own: from the shell to the answer, and the memory that loading takes.

`python -m minivlm.bench.programs WHO FOLDER` is such a process: it loads a decoder, reads a prompt, takes a few steps,
and prints the peak of its memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from minivlm import checkpoint, hub
from minivlm.bench.measure import PeakMemory
from minivlm.bench.models import SHAPES, Shape, random_weight
from minivlm.bench.report import Floor, Memory, Row
from minivlm.errors import InputError
from minivlm.models import SAMPLE_PICTURE, SAMPLE_QUESTION
from minivlm.ops.backend import choose
from minivlm.ops.rows import Rows
from minivlm.vlm import VLM, VLMConfig

POSITIONS, STEPS = 1029, 4
# The same question about the same picture, as transformers' documentation has it.
TRANSFORMERS = """
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
content = [{"type": "image", "image": Image.open(picture).convert("RGB")}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def shell_to_answer(rounds: int) -> Row:
    """`minivlm generate` on the shipped checkpoint, transformers' script, and `import torch` alone, as a shell sees
    them: each in a fresh process, by turns. Raises InputError if the two answer differently."""
    folder = hub.resolve(None)
    picture = folder / SAMPLE_PICTURE
    commands = {
        "minivlm": ["-m", "minivlm", "generate", SAMPLE_QUESTION, "--image", str(picture)],
        "transformers": ["-c", TRANSFORMERS, str(folder), str(picture), SAMPLE_QUESTION],
        "import torch": ["-c", "import torch"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    answers: dict[str, str] = {}
    for turn in range(rounds + 1):  # the first fills the system's cache of files
        for name, command in commands.items():
            began = time.perf_counter()
            answers[name] = _run(command).strip()
            if turn:
                times[name].append(time.perf_counter() - began)
    if answers["minivlm"] != answers["transformers"]:
        raise InputError(f"shell: minivlm answered {answers['minivlm']!r}, transformers {answers['transformers']!r}")
    seconds = {name: median(measured) for name, measured in times.items()}
    floor = Floor(measured=seconds["import torch"])
    note = "floor: import torch"
    peers = {"transformers": seconds["transformers"]}
    return Row("shell", "shell to answer, shipped checkpoint", seconds["minivlm"], floor, peers, note=note)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise InputError(f"bench: a process it measures ended with {done.returncode}: {' '.join(last)}")
    return done.stdout


# ---- memory


def peak_memory(shape: Shape = SHAPES["300M"]) -> Memory:
    """Loading a checkpoint of random bfloat16 weights, a prompt, a few steps: the peak in a process of its own.

    The vision tower of the checkpoint is tiny, so that what is weighed is the decoder.
    """
    with tempfile.TemporaryDirectory(prefix="minivlm-bench-") as folder:
        weights = _write(Path(folder), shape)
        peaks = {
            who: json.loads(_run(["-m", "minivlm.bench.programs", who, folder])) for who in ("minivlm", "transformers")
        }
    needed = weights + shape.cache_bytes(POSITIONS + STEPS, 2)
    setting = f"{shape.name} bfloat16, prompt of {POSITIONS}, {STEPS} steps"
    return Memory("memory", setting, needed, peaks["minivlm"], {"transformers": peaks["transformers"]})


def _write(folder: Path, shape: Shape) -> int:
    """A random checkpoint around a decoder of this shape; returns the bytes of its weights."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}
    values = {"model_type": "llava", "image_token_index": 3, "vision_config": vision}
    values["text_config"] = shape.config_values()
    with torch.device("meta"):
        cpu, dtype = torch.device("cpu"), torch.bfloat16
        model = VLM(VLMConfig.from_hf(values, shape.name), choose("reference", cpu, dtype))
    weights = {name: random_weight(p.shape, dtype, cpu) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    checkpoint.save(model, folder)
    return sum(weight.nbytes for weight in weights.values())


def child(who: str, folder: str) -> int:
    """Load and compute as `who` does; returns the peak of bytes above those at the start."""
    ids = torch.arange(POSITIONS) + 10
    if who == "transformers":
        from transformers import AutoModelForImageTextToText

        peak = PeakMemory()
        peak.start()
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        with torch.inference_mode():
            model.generate(input_ids=ids[None], max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
        return peak.largest - peak.first
    peak = PeakMemory()
    peak.start()
    backend = choose("auto", torch.device("cpu"), torch.bfloat16)
    decoder = checkpoint.load(folder, "cpu", "bfloat16", backend, progress=False)[0].language_model
    cache = decoder.new_cache(1, POSITIONS + STEPS)
    with torch.inference_mode():
        for step in range(STEPS + 1):
            rows = Rows.causal([len(ids)], [0 if step == 0 else POSITIONS + step - 1])
            ids = decoder.logits(decoder(decoder.embed_tokens(ids), rows, cache)[-1:]).argmax(-1)
    return peak.largest - peak.first


if __name__ == "__main__":
    print(child(*sys.argv[1:]))
