"""LLaVA-1.6-Mistral-7B at its published size, with random weights: written as the hub has it, loaded, asked.

Not part of the test suite: it needs 15 GB of disk, 17 GB of memory and some minutes. It prints what it measures
and ends with status 1 if loading or answering takes more than 1.1 times the memory of weights and cache.

    python tests/full_size.py                                   into a temporary folder; a drawn picture
    python tests/full_size.py --folder DIR --picture FILE       keeps the folder, and uses it again the next time
    python tests/full_size.py --layers 2                        2 of the decoder's 32 layers, to try the command
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from processor.mistral_tokenizer import tokenizer_json
from test_published import expand

import minivlm
from minivlm.checkpoint import published_name
from minivlm.ops.cpu_compact import CompactGroup
from minivlm.ops.joined import weights
from minivlm.processor.prompts import TEMPLATES

PUBLISHED = Path(__file__).parent / "published" / "llava-v1.6-mistral-7b-hf.json"
LAYERS, SHARDS = 32, 4
LIMIT = 1.1  # peak anonymous memory as a multiple of weights and cache
QUESTION = "What is shown in this image?"
BLOCK = 16_777_259  # random numbers that all tensors share, each from a place of its own; a prime, no width divides it
STRIDE = 1_000_003
GB = 1e9
LARGE_READ = 2**24  # bytes
# As the hub has them, with bos, eos and pad token 1, 2 and 32001.
SMALL_FILES = {
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
    "tokenizer_config.json": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
    },
    "preprocessor_config.json": {
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "LlavaNextImageProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 336},
    },
    "processor_config.json": {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": "default",
    },
    "chat_template.json": {"chat_template": TEMPLATES["mistral_instruct"]},
}


# ---- the checkpoint


def published(layers: int) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """config.json and the shape of every tensor, with that many decoder layers."""
    entry = json.loads(PUBLISHED.read_text())
    config, shapes = entry["config"], expand(entry["tensors"])
    if layers < LAYERS:
        config["text_config"]["num_hidden_layers"] = layers
    in_decoder = re.compile(r"language_model\.model\.layers\.(\d+)\.")
    found = {name: in_decoder.match(name) for name in shapes}
    return config, {name: shapes[name] for name in shapes if not found[name] or int(found[name][1]) < layers}


def random_block() -> np.ndarray:
    """Normal numbers of deviation 0.02, which keep the activations of all layers finite: float16 [BLOCK]."""
    generator = np.random.default_rng(0)
    return (0.02 * generator.standard_normal(BLOCK, dtype=np.float32)).astype(np.float16)


def values(block: np.ndarray, name: str, index: int, count: int) -> Iterator[np.ndarray]:
    """The first `count` numbers of tensor `index`, in pieces: from its place in the block on, round and round."""
    at = index * STRIDE % BLOCK
    while count > 0:
        piece = block[at : at + count]
        yield piece + np.float16(1) if re.search(r"norm\d?\.weight$", name) else piece
        count, at = count - len(piece), 0


def write(folder: Path, layers: int) -> None:
    """Four float16 shards with their index, config, tokenizer and processor, all on the disk when it returns."""
    config, shapes = published(layers)
    block = random_block()
    sizes = [2 * int(np.prod(shape)) for shape in shapes.values()]
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    shard_of = [min(SHARDS - 1, int(SHARDS * (end - size) // total)) for size, end in zip(sizes, ends, strict=True)]
    weight_map = {}
    for shard in range(SHARDS):
        file_name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        held = [(i, name) for i, name in enumerate(shapes) if shard_of[i] == shard]
        write_shard(folder / file_name, block, held, shapes)
        weight_map |= {name: file_name for _, name in held}
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    small = SMALL_FILES | {"config.json": config, "model.safetensors.index.json": index}
    for file_name, content in small.items():
        (folder / file_name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_shard(path: Path, block: np.ndarray, held: list[tuple[int, str]], shapes: dict) -> None:
    """One safetensors file: the header's length in 8 bytes, the header in JSON, the numbers."""
    header, at = {}, 0
    for _, name in held:
        end = at + 2 * int(np.prod(shapes[name]))
        header[name] = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, name in held:
            for piece in values(block, name, i, int(np.prod(shapes[name]))):
                file.write(memoryview(piece))
        file.flush()
        os.fsync(file.fileno())


def check_places(vlm: minivlm.Pipeline, layers: int) -> None:
    """Every parameter begins with the numbers that were written for it, rounded once to bfloat16."""
    block, names = random_block(), list(published(layers)[1])
    for parameter_name, parameter in weights(vlm.model):
        name = published_name(parameter_name)
        written = torch.from_numpy(np.concatenate(list(values(block, name, names.index(name), 1000))))
        first = parameter.detach().flatten()[:1000]
        if not torch.equal(first, written[: len(first)].to(torch.bfloat16)):
            raise SystemExit(f"{name} was not loaded as it was written")


# ---- the disk


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def evict(folder: Path) -> None:
    """Ask the system to drop the files from its cache; a host's cache below a virtual disk is out of reach."""
    for path in shards(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(folder: Path) -> float:
    """The share of the files that is in the system's cache, from 2000 single bytes read without waiting."""
    hits = []
    for path in shards(folder):
        with open(path, "rb") as file:
            for offset in np.linspace(0, path.stat().st_size - 1, 2000 // SHARDS, dtype=np.int64).tolist():
                try:
                    os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
                    hits.append(True)
                except BlockingIOError:
                    hits.append(False)
    return sum(hits) / len(hits)


def plain_read(folder: Path) -> float:
    """Seconds to read all files from front to back."""
    buffer, began = bytearray(LARGE_READ), time.perf_counter()
    for path in shards(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def report_read(folder: Path, what: str) -> None:
    share, seconds = cached_share(folder), plain_read(folder)
    size = sum(path.stat().st_size for path in shards(folder)) / GB
    print(f"{what:28}{seconds:8.1f} s   {size / seconds:6.2f} GB/s   {share:4.0%} of the files were in the cache")


# ---- the measured process


class Memory(threading.Thread):
    """The largest resident memory of this process, read every 10 ms: anonymous pages, and mapped file pages."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0, "RssFile": 0}
        self.running = True

    @staticmethod
    def now() -> dict[str, int]:
        """Bytes by kind, as /proc/self/status has them."""
        text = Path("/proc/self/status").read_text()
        return {kind: 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", text)[1]) for kind in ("RssAnon", "RssFile")}

    def run(self):
        while self.running:
            self.peak = {kind: max(self.peak[kind], size) for kind, size in self.now().items()}
            time.sleep(0.01)

    def finish(self) -> dict[str, int]:
        """Stop, and the peaks."""
        self.running = False
        self.join()
        return self.peak


def load(folder: Path, what: str) -> minivlm.Pipeline:
    """Load as bfloat16 and print how long it took."""
    share, began = cached_share(folder), time.perf_counter()
    vlm = minivlm.load(folder, device="cpu", dtype="bfloat16")
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in shards(folder)) / GB
    print(f"{what:28}{seconds:8.1f} s   {size / seconds:6.2f} GB/s   {share:4.0%} of the files were in the cache")
    return vlm


def measure(folder: Path, layers: int, picture: Path, tokens: int) -> int:
    """Load and answer, in a process that has done nothing else; returns the exit status."""
    before, memory = Memory.now()["RssAnon"], Memory()
    memory.start()
    vlm = load(folder, "load, cold")
    loaded = dict(memory.peak)
    reply = vlm.generate(QUESTION, images=[picture], max_new_tokens=tokens)
    peak = memory.finish()
    check_places(vlm, layers)
    text, made = vlm.model.config.text, len(reply.tokens)
    stored, kept = sizes(vlm)
    positions = reply.prompt_tokens + tokens
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * positions * text.head_dim * 2
    prefill, step = reply.prefill_seconds, reply.decode_seconds / max(1, made - 1)
    print(f"prefill{prefill:29.1f} s   {reply.prompt_tokens / prefill:6.1f} tokens/s, {reply.prompt_tokens} tokens")
    backend = vlm.model.language_model.backend.name
    print(f"decode{step:30.3f} s/token, {made} tokens on {torch.get_num_threads()} threads, backend {backend}")
    print(f"answer                      {reply.text!r:.60}")
    print(f"weights {stored / GB:.3f} GB in bfloat16, kept in {kept / GB:.3f} GB")
    print(f"cache {cache / GB:.3f} GB for {positions} positions")
    end = Memory.now()["RssAnon"]
    print(
        f"peak of anonymous memory {peak['RssAnon'] / GB:.3f} GB ({loaded['RssAnon'] / GB:.3f} while loading, "
        f"{before / GB:.3f} before it), {end / GB:.3f} at the end; of mapped file pages {peak['RssFile'] / GB:.3f} GB"
    )
    ratio = peak["RssAnon"] / (stored + cache)
    verdict = "at most" if ratio <= LIMIT else "MORE THAN"
    if layers < LAYERS:  # interpreter and activations are as large as ever, the weights are not
        print(f"anonymous memory is {ratio:.3f} times weights and cache, which is judged at the full size only")
        return 0
    print(f"anonymous memory is {ratio:.3f} times weights and cache, {verdict} {LIMIT}")
    return int(ratio > LIMIT)


def sizes(vlm: minivlm.Pipeline) -> tuple[int, int]:
    """Bytes of the weights in their type, and as they are kept."""
    stored = kept = sum(parameter.nbytes for parameter in vlm.model.parameters())
    for group in vlm.model.modules():
        if isinstance(group, CompactGroup):
            stored += group.inputs * sum(group.sizes) * 2
            kept += group.kept_bytes
    return stored, kept


def draw_picture(path: Path) -> None:
    """640x480 pixels of soft shapes with some grain, as a photograph has them."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = soft + generator.normal(0, 6, soft.shape)
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(path, quality=90)


# ---- the command


def main() -> int:
    """Write, read, load in fresh processes; the status of the measuring one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be; it is kept")
    parser.add_argument("--layers", type=int, default=LAYERS, choices=range(1, LAYERS + 1), metavar="N")
    parser.add_argument("--picture", type=Path, help="a picture to ask about")
    parser.add_argument("--tokens", type=int, default=20, help="greedy tokens to generate")
    parser.add_argument("--process", choices=("warm", "measure"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process == "warm":
        load(arguments.folder, "load, warm")
        return 0
    if arguments.process == "measure":
        return measure(arguments.folder, arguments.layers, arguments.picture, arguments.tokens)
    if arguments.layers < LAYERS:
        print(f"REDUCED to {arguments.layers} of {LAYERS} decoder layers: these are not the published model's numbers")
    with tempfile.TemporaryDirectory(prefix="minivlm-full-size-") as temporary:
        picture = arguments.picture
        if picture is None:
            picture = Path(temporary) / "picture.jpg"
            draw_picture(picture)
        folder = arguments.folder or Path(temporary)
        return whole_run(folder, picture, arguments.layers, arguments.tokens)


def whole_run(folder: Path, picture: Path, layers: int, tokens: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors.index.json").is_file():
        print(f"found a checkpoint in {folder}")
    else:
        size = 2 * sum(int(np.prod(shape)) for shape in published(layers)[1].values())
        if shutil.disk_usage(folder).free < 1.05 * size:
            raise SystemExit(f"{folder}: {size / GB:.1f} GB do not fit on its disk; --folder names another")
        began = time.perf_counter()
        write(folder, layers)
        seconds = time.perf_counter() - began
        print(f"write {SHARDS} shards, float16{seconds:13.1f} s   {size / GB / seconds:6.2f} GB/s   {size / GB:.2f} GB")
    evict(folder)
    report_read(folder, "plain read, cold")
    report_read(folder, "plain read, warm")
    command = [sys.executable, __file__, "--folder", folder, "--layers", str(layers)]
    command += ["--picture", picture, "--tokens", str(tokens), "--process"]
    sys.stdout.flush()
    subprocess.run([*command, "warm"], check=True)
    evict(folder)
    return subprocess.run([*command, "measure"]).returncode


if __name__ == "__main__":
    sys.exit(main())
