"""The real Mistral vocabulary as a `tokenizers.Tokenizer`, built from mistral-common's SentencePiece model.

The model file (sha256 dadfd56d...) is the `tokenizer.model` of Mistral-7B-v0.1; llava-v1.6-mistral adds
`<image>` and `<pad>`. SentencePiece merges by the score of the result, so the merges are every split of a
piece into two known pieces, best score first.
"""

from functools import cache
from pathlib import Path

import mistral_common
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers.models import BPE

MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
IMAGE_TOKEN_ID = 32000


@cache
def sentencepiece() -> SentencePieceProcessor:
    """The oracle."""
    return SentencePieceProcessor(model_file=str(MODEL))


@cache
def tokenizer_json() -> str:
    """tokenizer.json of llava-v1.6-mistral-7b, up to the order of its keys."""
    oracle = sentencepiece()
    pieces = [oracle.id_to_piece(i) for i in range(oracle.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    splits = []
    for i, piece in enumerate(pieces):
        if oracle.is_byte(i) or oracle.is_control(i) or oracle.is_unknown(i):
            continue
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in ids and piece[k:] in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        splits += [(-oracle.get_score(i), pair) for pair in pairs]
    splits.sort(key=lambda split: split[0])
    merges = [pair for _, pair in splits]
    tokenizer = tokenizers.Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>"):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer.to_str()


def mistral_tokenizer() -> tokenizers.Tokenizer:
    """A fresh copy."""
    return tokenizers.Tokenizer.from_str(tokenizer_json())
