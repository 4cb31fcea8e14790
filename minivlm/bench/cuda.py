"""The rows of `minivlm bench` that only a GPU has: the stages of LLaVA-1.6-Mistral-7B at their published sizes.

Every stage goes through the backend's seam, so that what is timed is what the model runs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from minivlm.bench.measure import Contender
from minivlm.bench.models import Shape, random_weight
from minivlm.bench.report import Row
from minivlm.bench.rows import Bench
from minivlm.ops.backend import choose
from minivlm.ops.rows import Rows
from minivlm.processor import Inputs
from minivlm.sampler import Sampling
from minivlm.vision.clip import CLIPVisionConfig, CLIPVisionModel
from minivlm.vlm import CLIP_L_336, VLM, VLMConfig

TILES, DEPTH = 5, 23  # of a picture of 2 x 2 tiles; layer -2 of 24
HALF = torch.bfloat16
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def vision(bench: Bench, values: dict = CLIP_L_336, depth: int = DEPTH) -> Row:
    """The vision tower on the tiles of one picture; transformers runs its last layer too, which LLaVA does not use."""
    import transformers

    config = CLIPVisionConfig.from_hf({"model_type": "clip_vision_model", **values}, "vision")
    backend = choose(bench.backend, bench.device, HALF)
    with torch.device("meta"):
        tower = CLIPVisionModel(config, backend)
    tower.load_state_dict(_weights(tower, bench.device), assign=True)
    backend.prepare(tower)
    peer = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**values)).to(bench.device, HALF).eval()
    tiles = torch.randn(TILES, 3, config.image_size, config.image_size, device=bench.device, dtype=HALF)
    times = bench.timed(
        {
            "minivlm": Contender(lambda: tower(tiles, [depth])),
            "sdpa": Contender(lambda: peer(tiles, output_hidden_states=True)),
        }
    )
    width, patches = config.hidden_size, config.grid**2 + 1
    matrices = 4 * width**2 + 2 * width * config.intermediate_size
    operations = TILES * depth * (2 * patches * matrices + 4 * patches**2 * width)
    floor = bench.floor(depth * matrices * HALF.itemsize, operations, HALF)
    return Row("vision", f"{TILES} tiles, bfloat16", times.pop("minivlm"), floor, times)


def first_token(bench: Bench, shape: Shape, values: dict = CLIP_L_336) -> Row:
    """Tiles in, first id out: vision tower, projector, packing, prompt, choice."""
    image = shape.vocabulary - 1
    side = values["image_size"]
    config = VLMConfig.from_hf(
        {
            "model_type": "llava_next",
            "image_token_index": image,
            "image_grid_pinpoints": [[2 * side, 2 * side]],
            "vision_config": {"model_type": "clip_vision_model", **values},
            "text_config": shape.config_values(),
        },
        shape.name,
    )
    backend = choose(bench.backend, bench.device, HALF)
    with torch.device("meta"):
        model = VLM(config, backend)
    model.load_state_dict(_weights(model, bench.device), assign=True)
    backend.prepare(model)
    tiles, grid = torch.randn(TILES, 3, side, side), side // values["patch_size"]
    count = grid**2 + 2 * grid * (2 * grid + 1)  # the base tile, and rows of both tiles that each end with a newline
    inputs = Inputs((1, *[image] * count, 5, 6, 7), tiles, ((2 * side, 2 * side),), (TILES,))
    cache = model.language_model.new_cache(1, len(inputs.ids))
    decoder, rows = model.language_model, Rows.causal([len(inputs.ids)])
    choose_id = backend.sampler(torch.ones(shape.vocabulary, dtype=torch.bool, device=bench.device))

    def run() -> object:
        hidden = decoder(model.embed([inputs]), rows, cache)
        return choose_id(decoder.logits(hidden[-1:]), [Sampling()], [len(inputs.ids)], [inputs.ids])

    seconds = bench.timed({"minivlm": Contender(run)}, max(3, bench.rounds // 4))["minivlm"]
    floor = bench.floor(shape.matrices * HALF.itemsize, shape.prefill_operations(len(inputs.ids)), HALF)
    note = "floor: the decoder's alone"
    return Row("first", f"{shape.name}, bfloat16, {len(inputs.ids)} positions", seconds, floor, note=note)


def sampling(bench: Bench, vocabulary: int = 32064, batches: tuple[int, ...] = (1, 32)) -> Iterator[Row]:
    """Logits to ids: temperature, top-k, top-p, seeds, log-probabilities."""
    import transformers

    warpers = [
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(50),
        transformers.TopPLogitsWarper(0.9),
    ]
    backend = choose(bench.backend, bench.device, HALF)
    choose_ids = backend.sampler(torch.ones(vocabulary, dtype=torch.bool, device=bench.device))
    for batch in batches:
        logits = 3 * torch.randn(batch, vocabulary, device=bench.device, dtype=HALF)
        settings = [Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=row) for row in range(batch)]

        def theirs(logits: Tensor = logits) -> Tensor:
            scores = logits.float()
            for warper in warpers:
                scores = warper(None, scores)
            return torch.multinomial(scores.softmax(-1), 1)

        contenders = {
            "minivlm": Contender(
                lambda logits=logits, settings=settings, batch=batch: choose_ids(
                    logits, settings, [0] * batch, [()] * batch
                )
            ),
            "transformers": Contender(theirs),
            **_flashinfer(logits),
        }
        times = bench.timed(contenders)
        floor = bench.floor(logits.nbytes, 0, HALF)
        yield Row("sampling", f"{batch} rows of {vocabulary}, top-k and top-p", times.pop("minivlm"), floor, times)


def _flashinfer(logits: Tensor) -> dict[str, Contender]:
    """Its sampler where it is installed; it gives no log-probabilities."""
    try:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits
    except ImportError:
        return {}
    scaled = logits.float() / 0.7
    return {"flashinfer": Contender(lambda: top_k_top_p_sampling_from_logits(scaled, 50, 0.9))}


def attention(bench: Bench, positions: int = 2900, patches: int = 577) -> Iterator[Row]:
    """The decoder's attention over a prompt, and the encoder's over the patches of five tiles."""
    backend, device = choose(bench.backend, bench.device, HALF), bench.device
    q, k, v = (torch.randn(positions, heads, 128, device=device, dtype=HALF) for heads in (32, 8, 8))
    rows = Rows.causal([positions])
    angles = backend.rope(rows, 128, 1e6, HALF, device)
    seen = backend.sight(rows, None, device)
    lifted = [x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1))]
    peers = _kernels(lifted, causal=True)
    ours = Contender(lambda: backend.attention(q, k, v, angles, rows, seen, None, 0))
    times = bench.timed({"minivlm": ours, **peers})
    floor = bench.floor(2 * q.nbytes + 2 * k.nbytes, 2 * positions**2 * 32 * 128, HALF)
    what = f"causal, {positions} positions, 32 heads of 128"
    note = "minivlm rotates too"
    yield Row("attention", what, times.pop("minivlm"), floor, times, note=note)
    q, k, v = (torch.randn(TILES, 16, patches, 64, device=device, dtype=HALF) for _ in range(3))
    times = bench.timed(
        {"minivlm": Contender(lambda: backend.vision_attention(q, k, v)), **_kernels([q, k, v], causal=False)}
    )
    floor = bench.floor(4 * q.nbytes, 4 * patches**2 * TILES * 16 * 64, HALF)
    what = f"bidirectional, {TILES} x {patches} patches, 16 heads of 64"
    yield Row("attention", what, times.pop("minivlm"), floor, times)


def _kernels(inputs: list[Tensor], causal: bool) -> dict[str, Contender]:
    """PyTorch's own, each by its name; those that this machine lacks are left out."""
    found = {}
    for name, kernel in KERNELS.items():

        def run(kernel: SDPBackend = kernel) -> Tensor:
            with sdpa_kernel(kernel):
                return scaled_dot_product_attention(*inputs, is_causal=causal)

        try:
            run()
        except RuntimeError:  # "No available kernel"
            continue
        found[f"sdpa {name}"] = Contender(run)
    return found


def _weights(model: torch.nn.Module, device: torch.device) -> dict[str, Tensor]:
    return {name: random_weight(parameter.shape, HALF, device) for name, parameter in model.named_parameters()}
