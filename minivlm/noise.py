"""Random numbers without a state: Gumbel noise that is a pure function of (seed, position, token id).

A draw can so be replayed, and does not depend on the other rows of the batch. Bits: Philox4x32-10 of Salmon et al.
2011, "Parallel Random Numbers: As Easy as 1, 2, 3". All arithmetic is in integers and float64.
"""

from collections.abc import Sequence

import torch

from minivlm.errors import InputError

Word = int | torch.Tensor
WORD = 0xFFFFFFFF  # Philox works on 32-bit words, kept here in int64 tensors


def gumbel_noise(seed: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for `ids` [n] int64, all below 2**32, at `position` -> [n] float64.

    The seed's low and high word are Philox's key; (id, low word of position, high word, 0) is its counter.
    """
    return noises([seed], [position], [ids])[0]


def noises(seeds: Sequence[int], positions: Sequence[int], ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """`gumbel_noise` of several rows at once, seeds, positions and ids [n] of each -> noise [n] of each.

    Raises InputError for a position that has more than 64 bits.
    """
    for position in positions:
        if not 0 <= position < 2**64:
            raise InputError(f"position: found {position}, expected an integer from 0 to 2**64 - 1")
    counts = [len(of_row) for of_row in ids]
    together = torch.cat(ids)
    low, high = _words(positions, counts, together.device)
    words = philox4x32((together, low, high, 0), _words(seeds, counts, together.device))
    return gumbel_of_bits(words[0], words[1]).split(counts)


def _words(numbers: Sequence[int], counts: Sequence[int], device) -> tuple[Word, ...]:
    """The low and the high words of 64-bit numbers, each as often as its count; of one number as integers."""
    words = [[number & WORD for number in numbers], [number >> 32 for number in numbers]]
    if len(numbers) == 1:
        return words[0][0], words[1][0]
    repeats = torch.tensor(counts, device=device)
    return torch.tensor(words, device=device).repeat_interleave(repeats, dim=1).unbind()


def gumbel_of_bits(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """64 random bits in two words of int64 [n] -> standard Gumbel noise [n] float64.

    v = (bits + 1/2) / 2**64 is uniform in (0, 1), and -log(-log1p(-v)) is Gumbel. Unlikely ids win by large
    noise, so that tail is tied to small v, where float64 keeps every bit: v is never below 2**-65, and noise
    reaches 65 log 2 = 45.05. (The usual -log(-log(u)) with 24 bits stops at 16.6: an id 25 below the best
    never wins.) At the other end v would round to 1, and noise to -inf, once in 2**54 draws; the clamp to
    1 - 2**-53 bounds it at -3.60.
    """
    v = (high.double() * 2.0**32 + (low.double() + 0.5)) * 2.0**-64
    return -torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-53)))


def philox4x32(counter: Sequence[Word], key: Sequence[Word]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four counter words and two key words -> four random words int64 [n].

    A word is int64 [n], or an integer for all n; of the counter one at least is a tensor.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _multiply(word: Word, factor: int) -> tuple[Word, Word]:
    """High and low word of a 32 x 32 bit product.

    The product may pass 2**63 and wrap to a negative int64. Its 64 bits are right all the same, and the mask
    removes the copies of the sign bit that the shift brings in.
    """
    product = word * factor
    return (product >> 32) & WORD, product & WORD
