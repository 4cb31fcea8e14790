"""Fused sampling: from logits to an id, its log-probabilities and the best alternatives, in one launch, without a sort.

It knows nothing of text or requests. Warpers and their order are transformers'; equal scores share one fate; noise is
Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") keyed by seed, position and id.

Shapes:     logits [B, V] -> ids, log-probabilities and errors [B], alternatives [B, count]. One program a row.
Dtypes:     float32, float16, bfloat16 logits; arithmetic on them is float32. Rows may lie apart, their ids may not.
Limits:     V below 2**30, made for 1,000 to 262,144. An alternative is a pass of its own over a short list.
Bytes:      the logits twice, then from a cache (64 kB at 32,064 in bfloat16); V / 8 for `allowed`; V for `seen` in rows
            that penalise; 8 for each listed id, in a scratch of 8 V a row.
Operations: about 40 V for the two passes, 30 for each listed id and step of a search (2 to 11 steps), and 200 for the
            noise of each listed id.

Both passes go over the row in blocks of BLOCK. The first keeps the greatest score of each of BLOCK groups (id modulo
BLOCK). Where k groups have their greatest score above a floor, k scores at least are above it: so the second pass lists
only the ids above such a floor, about k of them, and sums the probability of the rest. Boundaries are then searched in
the short list, on integers in the order of the floats, 8 pivots a step. Without top-k 256 groups are listed, and
everything if those do not hold the boundary of top-p or min-p. A setting that changes nothing skips its stage.

The id is the plain sampler's unless two perturbed scores lie within 1e-9 of each other, or a score lies at the boundary
of top-p or min-p to within float32's rounding of sums (2**-18 of the sum). Noise in float32 decides only where the
best leads by more than that noise's rounding; other rows, about one in 10,000, are drawn again in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivlm.kernels.checks import DTYPES, require, require_device
from minivlm.kernels.sampling_stages import (
    INF,
    LISTED,
    LOWEST,
    _alternatives,
    _choose,
    _floor,
    _gather,
    _key,
    _list,
    _read,
    _refuse,
    _survey,
)

# Errors of a row. Such a row gets id 0, which a step that is already queued may embed, and NaN for log-probabilities.
BROKEN = tl.constexpr(1)  # the logits hold NaN or +inf, or nothing finite
NOTHING_ALLOWED = tl.constexpr(2)  # no allowed id has a probability above 0
OVERFLOW = tl.constexpr(3)  # temperature or penalty take the scores beyond float32

BLOCK, CHUNK, WARPS = 2048, 1024, 16  # ids of the row, and of the list, held at once; at 4096 registers spill


def plain_sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    seen: Tensor | None,
    allowed: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose the next id of every row. In plain PyTorch, row by row; `sample` below is the kernel.

    Args:
        logits: [B, V].
        seeds, positions: int64 [B]. The 64 bits of a seed; the number of ids before the chosen one.
        temperature: float64 [B]. Divides the scores; 0 takes the best, and of equals the lowest id.
        top_k: int32 [B]. Keeps the k best scores; 0 keeps all.
        top_p: float64 [B]. Keeps the smallest set of best scores with at least this probability; 1 keeps all.
        min_p: float64 [B]. Keeps what has at least min_p times the probability of the best; 0 keeps all.
        repetition_penalty: float64 [B]. Divides the positive, multiplies the negative scores of `seen` ids; 1 is none.
        seen: bool [B, V], or None. After a draw: seen.scatter_(1, ids[:, None], True), without a synchronisation.
        allowed: int32 [B, ceil(V / 32)], or None for all. Bit i % 32 of word i // 32 is set if id i may be chosen.
        count: how many alternatives to report.

    Returns ids int64 [B]; float32 [B] log-probabilities of the raw logits, and of the distribution drawn from; ids
    int64 and raw log-probabilities float32 [B, count] of the best allowed ids, equal logits by id, -1 and -inf where
    no more are possible; errors int32 [B], 0 where there is none (see BROKEN above).
    """
    results = _results(logits, count)
    settings = (seeds, positions, temperature, top_k, top_p, min_p, repetition_penalty)
    columns = zip(*(tensor.tolist() for tensor in settings), strict=True)
    for row, (seed, position, heat, k, p, least, penalty) in enumerate(columns):
        raw = logits[row].float()
        allow = torch.ones_like(raw, dtype=torch.bool) if allowed is None else _bits(allowed[row], len(raw))
        permitted = raw.masked_fill(~allow, -torch.inf)
        scores = permitted
        if seen is not None:
            scores = torch.where(seen[row], torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if heat > 0:
            scores = scores / heat
        finite = [bool(x.max().isfinite()) for x in (raw, permitted, scores)]  # NaN is its own maximum
        if not all(finite):
            outcome = 0, torch.nan, torch.nan, -1, torch.nan, 1 + finite.index(False)
        else:
            chosen, kept = int(scores.argmax()), scores  # of equals the lowest id
            if heat > 0:
                kept = _warp(scores, k, p, least)
                chosen = int((kept.double() + _noise(seed, position, len(raw), raw.device)).argmax())
            logprobs = raw.log_softmax(-1)
            order = permitted.argsort(descending=True, stable=True)[:count]
            ids = order.masked_fill(permitted[order] == -torch.inf, -1)
            values = logprobs.masked_fill(~allow, -torch.inf)[order]
            outcome = chosen, logprobs[chosen], kept.log_softmax(-1)[chosen], ids, values, 0
        for result, value in zip(results, outcome, strict=True):
            result[row] = value
    return results


def _bits(words: Tensor, n: int) -> Tensor:
    """int32 [ceil(n / 32)] -> bool [n]: bit 0 of the first word comes first."""
    return (words[:, None] >> torch.arange(32, device=words.device) & 1).flatten()[:n].bool()


def _warp(scores: Tensor, k: int, p: float, least: float) -> Tensor:
    """Top-k, top-p, min-p: [V] -> [V], -inf where an id may not be chosen. Equals of the last kept score are kept."""
    if 0 < k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(k).values[-1], -torch.inf)
    if p < 1:
        ordered = scores.sort().values  # the worst first: what sums to 1 - p or less goes
        dropped = int((ordered.softmax(-1).cumsum(-1) <= 1 - p).sum())
        scores = scores.masked_fill(scores < ordered[min(dropped, len(ordered) - 1)], -torch.inf)
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < least * probabilities.max(), -torch.inf)


def _noise(seed: int, position: int, n: int, device: torch.device) -> Tensor:
    """Gumbel noise float64 [n] of the ids below n: Philox4x32-10 of counter (id, position, 0) under the key `seed`."""
    word = 0xFFFFFFFF
    c = [torch.full((n,), x & word, device=device) for x in (0, position, position >> 32, 0)]
    c[0] = torch.arange(n, device=device)
    keys = seed & word, seed >> 32 & word
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # 64 bits each, of which the sign is one
        c = [(right >> 32 & word) ^ c[1] ^ keys[0], right & word, (left >> 32 & word) ^ c[3] ^ keys[1], left & word]
        keys = (keys[0] + 0x9E3779B9) & word, (keys[1] + 0xBB67AE85) & word
    v = (c[0].double() * 2.0**32 + (c[1].double() + 0.5)) * 2.0**-64  # uniform in (0, 1)
    return -torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-53)))


def _results(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    shapes = ((rows,), (rows,), (rows,), (rows, count), (rows, count), (rows,))
    dtypes = (torch.int64, torch.float32, torch.float32, torch.int64, torch.float32, torch.int32)
    return tuple(torch.empty(s, dtype=d, device=logits.device) for s, d in zip(shapes, dtypes, strict=True))


def _require(logits: Tensor, rest: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]], count: int) -> None:
    require_device(logits)
    require(
        logits.dim() == 2 and logits.dtype in DTYPES and logits.stride(1) == 1 and 0 < logits.shape[1] < 2**30,
        f"sample: logits {logits.dtype} {list(logits.shape)} of strides {logits.stride()}, expected float32, float16 "
        "or bfloat16 [B, V] whose ids are neighbours",
    )
    require(count >= 0, f"sample: count {count}, expected 0 or more")
    for name, (tensor, dtype, shape) in rest.items():
        require(
            tensor is None or (tensor.dtype == dtype and tensor.shape == shape and tensor.stride(-1) == 1),
            f"sample: {name} is not {dtype} {list(shape)} with neighbours along its last axis",
        )
        require(
            tensor is None or tensor.device == logits.device,
            f"sample: {name} is not on {logits.device} as the logits are",
        )


@triton.jit
def _sample(
    LOGITS, SEEDS, POSITIONS, TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, SEEN, ALLOWED,
    IDS, LOGPROBS, SAMPLED, TOP_IDS, TOP_LOGPROBS, ERRORS, SCRATCH, PLACES,
    V, stride_logits, stride_seen, stride_allowed, stride_scratch,
    PENALISED: tl.constexpr, MASKED: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scratch = SCRATCH + row * stride_scratch
    places = PLACES + row * stride_scratch
    temperature = tl.load(TEMPERATURE + row)
    greedy = temperature == 0
    divisor = tl.where(greedy, 1.0, temperature.to(tl.float32))
    penalty = tl.load(PENALTY + row).to(tl.float32) if PENALISED else 1.0
    source = (
        LOGITS + row * stride_logits, SEEN + row * stride_seen, ALLOWED + row * stride_allowed,
        V, penalty, divisor, MASKED,
    )  # fmt: skip

    raw_peak, permitted_peaks, peaks, trouble = _survey(source, V, BLOCK)
    peak = tl.max(peaks)
    error = tl.where((trouble == 1) | (peak == INF) | (peak == -INF), OVERFLOW, 0)
    error = tl.where(tl.max(permitted_peaks) == -INF, NOTHING_ALLOWED, error)
    error = tl.where((trouble == 2) | (raw_peak == -INF), BROKEN, error)
    tl.store(ERRORS + row, error)
    if error != 0:
        _refuse(row, IDS, LOGPROBS, SAMPLED, TOP_IDS, TOP_LOGPROBS, COUNT)
        return

    k = tl.load(TOP_K + row)
    k = tl.where(k < V, k, 0)
    top_p = tl.load(TOP_P + row)
    bound = tl.where(top_p < 1, 1 - top_p, 0.0).to(tl.float32)  # in float64: at 0.9999 float32 keeps 3 digits
    min_p = tl.minimum(tl.load(MIN_P + row).to(tl.float32), 1.0)  # the best is always kept
    floor = tl.full([], LOWEST, tl.int64)
    if greedy:
        floor = _key(peak).to(tl.int64) - 1  # the best and its equals, the lowest id first
    elif (k > 0) | (bound > 0) | (min_p > 0):
        floor = _floor(peaks, tl.where(k > 0, k, LISTED), scratch, BLOCK, CHUNK)
    n, rest, raw_total, floor = _list(
        source, V, raw_peak, peak, floor, greedy | (k > 0), bound, min_p, scratch, places, BLOCK, CHUNK
    )
    if greedy:
        chosen = tl.load(places)
        mass = rest + n
    else:
        seed = tl.load(SEEDS + row)
        position = tl.load(POSITIONS + row)
        chosen, mass = _choose(scratch, places, n, rest, floor, peak, k, bound, min_p, seed, position, CHUNK)
    raw, _, score = _read(source, chosen)
    tl.store(IDS + row, chosen.to(tl.int64))
    tl.store(LOGPROBS + row, raw - raw_peak - tl.log(raw_total))
    tl.store(SAMPLED + row, score - peak - tl.log(mass))
    if COUNT > 0:
        floor = _floor(permitted_peaks, COUNT, scratch, BLOCK, CHUNK)
        n, _, _ = _gather(source, V, raw_peak, raw_peak, floor, scratch, places, True, BLOCK)
        top_ids = TOP_IDS + row * COUNT
        top_logprobs = TOP_LOGPROBS + row * COUNT
        _alternatives(scratch, places, n, raw_peak, tl.log(raw_total), top_ids, top_logprobs, COUNT, CHUNK)


@torch.library.custom_op("minivlm::sample", mutates_args=())
def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    seen: Tensor | None,
    allowed: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel behind `plain_sample`: the same arguments and results. Every number that changes from token to token
    or from row to row is read from a tensor, so that a CUDA graph can replay the launch."""
    rows, vocabulary = logits.shape
    one = (rows,)
    arguments = {
        "seeds": (seeds, torch.int64, one),
        "positions": (positions, torch.int64, one),
        "temperature": (temperature, torch.float64, one),
        "top_k": (top_k, torch.int32, one),
        "top_p": (top_p, torch.float64, one),
        "min_p": (min_p, torch.float64, one),
        "repetition_penalty": (repetition_penalty, torch.float64, one),
        "seen": (seen, torch.bool, (rows, vocabulary)),
        "allowed": (allowed, torch.int32, (rows, triton.cdiv(vocabulary, 32))),
    }
    _require(logits, arguments, count)
    results = _results(logits, count)
    if rows == 0:
        return results
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    width = triton.cdiv(vocabulary, block) * block
    scratch = torch.empty(rows, width, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, width, dtype=torch.int32, device=logits.device)
    _sample[(rows,)](
        logits, seeds, positions, temperature, top_k, top_p, min_p, repetition_penalty,
        logits if seen is None else seen.view(torch.uint8), logits if allowed is None else allowed,
        *results, scratch, places, vocabulary, logits.stride(0),
        0 if seen is None else seen.stride(0), 0 if allowed is None else allowed.stride(0), width,
        PENALISED=seen is not None, MASKED=allowed is not None, COUNT=count, BLOCK=block, CHUNK=min(CHUNK, block),
        num_warps=WARPS,
    )  # fmt: skip
    return results


@sample.register_fake
def _(logits, seeds, positions, temperature, top_k, top_p, min_p, repetition_penalty, seen, allowed, count):
    return _results(logits, count)
