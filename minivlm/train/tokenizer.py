"""Builds the tokenizer of the shipped checkpoint: a byte-fallback BPE laid out as Llama's and Mistral's are.

Its merges are learned from the world's questions (Sennrich et al. 2016, arXiv:1508.07909), except four kinds:
each coordinate 0.00, 0.02, ... 1.00 is one token, so are "[INST]" and "[/INST]", digits otherwise stay
single, and no two capitals ever join, so that a printed string is one token per character, as it is seen.
Coordinates are merges and not added tokens: the legacy normalizer would put a space after each of those.
"""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from minivlm.train.questions import questions
from minivlm.train.world import scene

SPECIALS = ("<unk>", "<s>", "</s>")
IMAGE, PAD = "<image>", "<pad>"
COORDINATES = tuple(f"{k / 50:.2f}" for k in range(51))
SPACE = "▁"
CORPUS_SCENES = 2000

Merge = tuple[str, str]


def words_of_the_world(scenes: int) -> Counter[str]:
    """How often each word occurs in the questions and answers on `scenes` pictures.

    Lower-case words carry the space before them ("▁red"); capitalised ones ("What") do not, since they begin
    a line as often as a text. Printed strings and numbers are left out.
    """
    counts: Counter[str] = Counter()
    for index in range(scenes):
        drawn = scene("train", index, 0)
        rng = np.random.default_rng([0, 3, index])
        told = [text for qa in questions(drawn, rng) for text in (qa.question, qa.answer)]
        for text in told:
            counts.update(re.findall(r"▁[a-z]+|\b[A-Z][a-z]+", SPACE + text.replace(" ", SPACE)))
    return counts


def learned_merges(counts: Counter[str]) -> list[Merge]:
    """Byte-pair merges until every word is one token: the commonest pair first, ties alphabetically."""
    words = {word: list(word) for word in counts}
    merges: list[Merge] = []
    while any(len(pieces) > 1 for pieces in words.values()):
        pairs: Counter[Merge] = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        for pieces in words.values():
            for at in range(len(pieces) - 1, 0, -1):
                if pieces[at - 1 : at + 1] == [left, right]:
                    pieces[at - 1 : at + 1] = [left + right]
    return merges


def chained_merges(texts: list[str]) -> list[Merge]:
    """Merges that build each text from its left end: "0.12" is 0 + ., 0. + 1, 0.1 + 2; each merge once."""
    return list(dict.fromkeys((text[:end], text[end]) for text in texts for end in range(1, len(text))))


def build_tokenizer() -> Tokenizer:
    """The tokenizer of the small world: saved, the same bytes each time.

    Ids: <unk> <s> </s>, 256 byte tokens, the space mark and printable ASCII, merges, then <image> and <pad>.
    """
    counts = words_of_the_world(CORPUS_SCENES)
    merges = chained_merges([*COORDINATES, "[INST]", "[/INST]"]) + learned_merges(counts)
    capitalised = sorted(word for word in counts if word[0] != SPACE)
    merges += [(SPACE, word) for word in [*capitalised, "[", "[INST]", "[/INST]"]] + [(",", SPACE)]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *map(chr, range(0x21, 0x7F))]
    tokens = list(dict.fromkeys(tokens + [left + right for left, right in merges]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*SPECIALS, IMAGE, PAD)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer
