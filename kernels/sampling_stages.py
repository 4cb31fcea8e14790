"""The stages of fused sampling, in the order in which `sampling.py`, which explains them, calls them.

Shapes and dtypes: one row of a program. Lists lie in `scratch` (float32 scores) and `places` (int32 ids).
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-0x7F800001)  # _key(-inf)
LISTED = tl.constexpr(256)  # groups above the floor where top-k does not say how many
CLOSE = tl.constexpr(2.0**-14)  # twice the rounding of noise in float32, and a margin
FADED = tl.constexpr(110.0)  # exp(-110) is 0 in float32


@triton.jit
def _key(x):
    """float32 -> int32 in the same order. 0 and -0 are equal as floats, so they get one key."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _read(source, ids):
    """The logits of `ids`, the same with -inf where not allowed, and the scores before top-k; -inf from V on."""
    logits, seen, allowed, V, penalty, divisor, MASKED = source
    inside = ids < V
    raw = tl.load(logits + ids, inside, float("-inf")).to(tl.float32)
    permitted = raw
    if MASKED:
        word = tl.load(allowed + ids // 32, inside, 0)
        permitted = tl.where(((word >> (ids % 32)) & 1) != 0, raw, -INF)
    scores = permitted
    if penalty != 1.0:
        known = tl.load(seen + ids, inside, 0) != 0
        punished = tl.where(scores < 0, scores * penalty, tl.div_rn(scores, penalty))
        scores = tl.where(known, punished, scores)
    if divisor != 1.0:
        scores = tl.div_rn(scores, divisor)  # rounded as IEEE demands: tl's `/` is not
    return raw, permitted, tl.where(inside, scores, -INF)  # -inf / inf is NaN


@triton.jit
def _survey(source, V, BLOCK: tl.constexpr):
    """First pass: the greatest logit, permitted logit and score of each group; 2 for broken logits, 1 for scores."""
    raw_peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    permitted_peaks = raw_peaks
    peaks = raw_peaks
    trouble = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, V, BLOCK):
        raw, permitted, scores = _read(source, start + tl.arange(0, BLOCK))
        raw_peaks = tl.maximum(raw_peaks, raw)
        permitted_peaks = tl.maximum(permitted_peaks, permitted)
        peaks = tl.maximum(peaks, scores)
        found = tl.where((raw != raw) | (raw == INF), 2, tl.where(scores != scores, 1, 0))  # maxima pass by NaN
        trouble = tl.maximum(trouble, found)
    return tl.max(raw_peaks), permitted_peaks, peaks, tl.max(trouble)


@triton.jit
def _gather(source, V, raw_peak, peak, floor, scratch, places, PERMITTED: tl.constexpr, BLOCK: tl.constexpr):
    """Second pass: lists the scores (PERMITTED: permitted logits) of keys above `floor`, and their ids, which rise.

    Returns how many, the sum of exp(score - peak) of those not listed, and of exp(logit - raw_peak) of all.
    """
    n = 0
    rest = tl.full([BLOCK], 0, tl.float32)
    raw_total = tl.full([BLOCK], 0, tl.float32)
    tl.debug_barrier()  # what the list held before has been read
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        raw, permitted, scores = _read(source, ids)
        raw_total += tl.exp(raw - raw_peak)
        if PERMITTED:
            scores = permitted
        listed = _key(scores) > floor.to(tl.int32)
        rest += tl.where(listed, 0.0, tl.exp(scores - peak))
        here = tl.sum(listed.to(tl.int32))
        if here > 0:
            place = n + tl.cumsum(listed.to(tl.int32)) - 1
            tl.store(scratch + place, scores, listed)
            tl.store(places + place, ids, listed)
        n += here
    tl.debug_barrier()  # the list is written by all threads and read by others
    return n, tl.sum(rest), tl.sum(raw_total)


@triton.jit
def _mass(scratch, n, lo, peak, CHUNK: tl.constexpr):
    """The sum of exp(score - peak) over the listed scores whose key is above `lo`."""
    total = tl.full([CHUNK], 0, tl.float32)
    for start in range(0, n, CHUNK):
        at = start + tl.arange(0, CHUNK)
        scores = tl.load(scratch + at, at < n, float("-inf"))
        total += tl.where(_key(scores) > lo.to(tl.int32), tl.exp(scores - peak), 0.0)
    return tl.sum(total)


@triton.jit
def _search(
    scratch, n, floor, highest, count, k, rest, target, peak, slack, BY_MASS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The greatest key x for which a statement holds that is true of low keys and false of `highest`.

    By count:  more than x are at least k.
    BY_MASS:   exp(score - peak) of all keys up to x, and `rest` for those below the list, sum to at most `target`.

    Only keys above `floor`, of which there are `count`, matter. Returns x, or any key that parts the list alike, and
    how many are above it. With a `slack` above 1, x may be lower, with up to that many keys between.
    """
    which = tl.arange(0, 8)
    lo = floor
    hi = highest
    between = count
    while (hi - lo > 1) & (between > slack):
        pivots = (lo + ((hi - lo) * (which + 1) >> 3)).to(tl.int32)  # the last is hi
        above = tl.full([8, CHUNK], 0, tl.int32)
        low = tl.full([8, CHUNK], 0, tl.float32)
        for start in range(0, n, CHUNK):
            at = start + tl.arange(0, CHUNK)
            scores = tl.load(scratch + at, at < n, float("-inf"))
            keys = _key(scores)
            over = keys[None, :] > pivots[:, None]  # [8, CHUNK]
            above += over.to(tl.int32)
            if BY_MASS:
                weights = tl.where(keys > floor.to(tl.int32), tl.exp(scores - peak), 0.0)
                low += tl.where(over, 0.0, weights[None, :])
        counts = tl.sum(above, 1)  # [8]
        holds = counts >= k
        if BY_MASS:
            holds = rest + tl.sum(low, 1) <= target
        true = tl.minimum(tl.sum(holds.to(tl.int32)), 7)
        count = tl.where(true == 0, count, tl.sum(tl.where(which == true - 1, counts, 0)))
        between = count - tl.sum(tl.where(which == true, counts, 0))
        width = hi - lo
        hi = lo + (width * (true + 1) >> 3)
        lo = lo + (width * true >> 3)
    return lo, count


@triton.jit
def _floor(peaks, wanted, scratch, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """A key with the peaks of `wanted` to 2 * `wanted` groups above it (more if equal); LOWEST if all are too few."""
    tl.debug_barrier()
    tl.store(scratch + tl.arange(0, BLOCK), peaks)
    tl.debug_barrier()
    count = tl.sum((peaks > -INF).to(tl.int32))
    floor = tl.full([], LOWEST, tl.int64)
    if count > wanted:
        floor = tl.min(tl.where(peaks > -INF, _key(peaks), 0x7FFFFFFF)).to(tl.int64) - 1
        highest = tl.max(_key(peaks)).to(tl.int64)
        floor, _ = _search(scratch, BLOCK, floor, highest, count, wanted, 0.0, 0.0, 0.0, wanted, False, CHUNK)
    return floor


@triton.jit
def _bits_of(seed, position, ids):
    """64 random bits for each id, in two words."""
    zero = ids.to(tl.uint32) * 0
    low_word = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    high_word = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    high, low, _, _ = tl.philox(seed, ids.to(tl.uint32), low_word, high_word, zero)
    return high, low


@triton.jit
def _gumbel(high, low, WIDE: tl.constexpr):
    """Standard Gumbel noise -log(-log1p(-v)) of v = (64 bits + 1/2) / 2**64, in float64 if WIDE, else in float32.

    Unlikely ids win by small v, which keeps all its bits. v near 1 has lost them in float32, so 1 - v is then made from
    the flipped bits. log1p(-v) is log(u) * v / (1 - u) with u = 1 - v as rounded (Goldberg 1991, theorem 4).
    """
    if WIDE:
        v = (high.to(tl.float64) * 2.0**32 + (low.to(tl.float64) + 0.5)) * 2.0**-64
        u = 1.0 - v
    else:
        far = high.to(tl.int32, bitcast=True) < 0  # v is above 1/2
        high = tl.where(far, high ^ 0xFFFFFFFF, high)
        low = tl.where(far, low ^ 0xFFFFFFFF, low)
        near = high.to(tl.float32) * 2.0**-32 + (low.to(tl.float32) + 0.5) * 2.0**-64
        v = tl.where(far, 1.0 - near, near)
        u = tl.where(far, near, 1.0 - near)
    u = tl.maximum(u, 2.0**-53)  # as the plain sampler clamps
    return -tl.log(tl.where(u == 1.0, v, -tl.log(u) * v / tl.where(u == 1.0, 1.0, 1.0 - u)))


@triton.jit
def _draw(scratch, places, n, lo, peak, min_p, seed, position, WIDE: tl.constexpr, CHUNK: tl.constexpr):
    """Gumbel-max over the listed scores above `lo` and min-p: the id, its lead over the next, and the kept mass."""
    best = tl.full([CHUNK], float("-inf"), tl.float64 if WIDE else tl.float32)
    second = best
    winners = tl.full([CHUNK], 0, tl.int32)
    mass = tl.full([CHUNK], 0, tl.float32)
    for start in range(0, n, CHUNK):
        at = start + tl.arange(0, CHUNK)
        scores = tl.load(scratch + at, at < n, float("-inf"))
        ids = tl.load(places + at, at < n, 0)
        weights = tl.exp(scores - peak)
        kept = (_key(scores) > lo.to(tl.int32)) & (weights >= min_p)
        mass += tl.where(kept, weights, 0.0)
        high, low = _bits_of(seed, position, ids)
        noise = _gumbel(high, low, WIDE)
        if WIDE:
            noisy = tl.where(kept, scores.to(tl.float64) + noise, -INF)
        else:
            noisy = tl.where(kept, scores - peak + noise, -INF)
        winners = tl.where(noisy > best, ids, winners)
        second = tl.maximum(second, tl.minimum(noisy, best))
        best = tl.maximum(best, noisy)
    top = tl.max(best)
    chosen = tl.min(tl.where(best == top, winners, 0x7FFFFFFF))
    runner_up = tl.max(tl.where((best == top) & (winners == chosen), second, best))
    return chosen, (top - runner_up).to(tl.float32), tl.sum(mass)


@triton.jit
def _alternatives(
    scratch, places, n, raw_peak, log_total, ids_out, logprobs_out, COUNT: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The COUNT best of the list, best first, equals by id: each pass finds the first behind the last one."""
    last = tl.full([], float("inf"), tl.float32)
    last_id = tl.full([], -1, tl.int32)
    for rank in range(COUNT):
        best = tl.full([CHUNK], float("-inf"), tl.float32)
        winners = tl.full([CHUNK], -1, tl.int32)
        for start in range(0, n, CHUNK):
            at = start + tl.arange(0, CHUNK)
            values = tl.load(scratch + at, at < n, float("-inf"))
            ids = tl.load(places + at, at < n, 0)
            behind = (values < last) | ((values == last) & (ids > last_id))
            better = behind & (values > best)
            best = tl.where(better, values, best)
            winners = tl.where(better, ids, winners)
        last = tl.max(best)
        last_id = tl.min(tl.where(best == last, winners, 0x7FFFFFFF))
        tl.store(ids_out + rank, last_id.to(tl.int64))  # -1 if there is none
        tl.store(logprobs_out + rank, last - raw_peak - log_total)


@triton.jit
def _list(
    source, V, raw_peak, peak, floor, settled, bound, min_p, scratch, places, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Gathers above `floor`, and again everything if no boundary is known to lie above it (`settled`: top-k's is)."""
    n = 0
    rest = 0.0
    raw_total = 0.0
    again = 1
    while again != 0:
        n, rest, raw_total = _gather(source, V, raw_peak, peak, floor, scratch, places, False, BLOCK)
        again = 0
        if (settled == 0) & (floor > LOWEST):
            bits = floor.to(tl.int32)
            edge = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)  # _key undone
            short = rest > bound * (rest + _mass(scratch, n, floor, peak, CHUNK))
            if short & (tl.exp(edge - peak) >= min_p):
                floor = tl.full([], LOWEST, tl.int64)
                again = 1
    return n, rest, raw_total, floor


@triton.jit
def _choose(scratch, places, n, rest, lo, peak, k, bound, min_p, seed, position, CHUNK: tl.constexpr):
    """Top-k, top-p and min-p on the list of keys above `lo`, and a draw: the id, and exp(score - peak) summed."""
    highest = _key(peak).to(tl.int64)
    count = n
    if k > 0:
        rest = 0.0
        if n > k:
            lo, count = _search(scratch, n, lo, highest, count, k, 0.0, 0.0, peak, 1, False, CHUNK)
    if bound > 0:
        target = bound * (rest + _mass(scratch, n, lo, peak, CHUNK))
        if rest <= target:  # else min-p alone decides: see _list
            lo = tl.minimum(tl.maximum(lo, _key(peak - FADED).to(tl.int64)), highest - 1)
            lo, count = _search(scratch, n, lo, highest, count, 0, rest, target, peak, 1, True, CHUNK)
    chosen, lead, mass = _draw(scratch, places, n, lo, peak, min_p, seed, position, False, CHUNK)
    if lead <= CLOSE:
        chosen, lead, mass = _draw(scratch, places, n, lo, peak, min_p, seed, position, True, CHUNK)
    return chosen, mass


@triton.jit
def _refuse(row, IDS, LOGPROBS, SAMPLED, TOP_IDS, TOP_LOGPROBS, COUNT: tl.constexpr):
    """What a row in error reports."""
    tl.store(IDS + row, 0)
    tl.store(LOGPROBS + row, float("nan"))
    tl.store(SAMPLED + row, float("nan"))
    for rank in range(COUNT):
        tl.store(TOP_IDS + row * COUNT + rank, -1)
        tl.store(TOP_LOGPROBS + row * COUNT + rank, float("nan"))
