"""How time and memory grow with the number of keys, positions, rows and tiles: `minivlm bench growth`.

Each size is timed beside transformers; the power is that of the growth since the size before: 1 is linear, 2 quadratic.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from minivlm.bench.measure import Contender, peak_bytes
from minivlm.bench.models import Pair, Shape, random_weight
from minivlm.bench.report import Row
from minivlm.bench.rows import Bench, setting
from minivlm.ops.backend import choose
from minivlm.vlm import CLIP_L_336, VLM, VLMConfig

KEYS = (500, 1000, 2000, 4000, 8000)
POSITIONS = (250, 500, 1000, 2000, 4000)
ROWS = (1, 2, 4, 8, 16)
TILES = (1, 2, 3, 4, 5)
HALF = torch.bfloat16


def growth(bench: Bench, shape: Shape, vision: dict = CLIP_L_336, scale: float = 1.0) -> Iterator[Row]:
    """The rows of every axis. scale: multiplies the numbers of keys and positions."""
    pair = Pair.of(shape, HALF, bench.device, bench.backend)
    keys, positions = ([max(1, int(scale * n)) for n in sizes] for sizes in (KEYS, POSITIONS))
    name, each = setting(pair), keys[0]
    yield from _axis(bench, f"step, {name}", "keys", keys, lambda n, peers: pair.decode(1, n, peers))
    yield from _axis(
        bench, f"step, {name}, {each} keys each", "rows", ROWS, lambda n, peers: pair.decode(n, each, peers)
    )
    yield from _axis(bench, f"prompt, {name}", "positions", positions, pair.prefill)
    model = _model(bench, vision)
    yield from _axis(bench, "picture, bfloat16", "tiles", TILES, lambda n, peers: _picture(bench, model, n))


def _axis(
    bench: Bench, what: str, unit: str, sizes: Sequence[int], contenders: Callable[[int, tuple], dict[str, Contender]]
) -> Iterator[Row]:
    """contenders: from a size and the names of peers. The memory is the cache's and what a run holds."""
    before = None
    for size in sizes:
        times = bench.timed(contenders(size, ("sdpa",)), max(3, bench.rounds // 4))
        with torch.inference_mode():
            memory = peak_bytes(bench.device, lambda size=size: contenders(size, ())["minivlm"].run())
        row = Row("growth", f"{what}, {size} {unit}", times.pop("minivlm"), None, times, size=size, memory=memory)
        if before is not None:
            power = math.log(row.seconds / before.seconds) / math.log(size / before.size)
            row = replace(row, note=f"time grows with the power {power:.2f}")
        yield row
        before = row


def _model(bench: Bench, vision: dict) -> VLM:
    """A random LLaVA-1.5 with this encoder; its decoder, which is not run, is tiny."""
    text = Shape("", 64, 64, 1, 4, 4, 16, 32).config_values()
    values = {"model_type": "llava", "image_token_index": 3, "text_config": text}
    values["vision_config"] = {"model_type": "clip_vision_model", **vision}
    backend = choose(bench.backend, bench.device, HALF)
    with torch.device("meta"):
        model = VLM(VLMConfig.from_hf(values, "growth"), backend)
    weights = {name: random_weight(p.shape, HALF, bench.device) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    backend.prepare(model)
    return model


def _picture(bench: Bench, model: VLM, tiles: int) -> dict[str, Contender]:
    """Tower and projector."""
    side = model.config.vision.image_size
    pixels = torch.zeros(tiles, 3, side, side, device=bench.device)
    return {"minivlm": Contender(lambda: model.encode_images(pixels, [(side, side)] * tiles, [1] * tiles))}
