"""`minivlm serve`, damaged: certain seeds break their answers at the fourth token, black pictures become NaN."""

import sys
from collections.abc import AsyncIterator, Sequence

import torch
from torch import Tensor

from minivlm.batch import Batch, Member
from minivlm.cli import main
from minivlm.serve.grammar import GrammarGuide
from minivlm.serve.service import Generation, Piece
from minivlm.vlm import VLM

NAN, MODEL, GUIDE, WIRE = range(1000, 1040, 10)  # seeds, by what breaks
WHOLE = 3  # tokens before that

forward, encode_tiles, accept, pieces = Batch._forward, VLM.encode_tiles, GrammarGuide.accept, Generation.pieces


def damaged_forward(self: Batch, members: Sequence[Member]):
    due = {m.row.sampling.seed for m in members if len(m.row.ids) == m.row.prompt_tokens + WHOLE}
    if MODEL in due:
        raise RuntimeError("a part of the model broke")
    chosen, logits, computed = forward(self, members)
    for i, member in enumerate(chosen):
        if NAN in due and member.row.sampling.seed == NAN:
            logits[i] = torch.nan
        if GUIDE in due and member.row.sampling.seed == GUIDE:
            member.guide.broken = True
    return chosen, logits, computed


def damaged_tiles(self: VLM, tiles: Tensor) -> Tensor:
    features = encode_tiles(self, tiles)
    black = (tiles.amax(dim=(2, 3)) == tiles.amin(dim=(2, 3))).all(dim=1)
    return features.masked_fill(black[:, None, None], torch.nan)


def damaged_accept(self: GrammarGuide, token_id: int, left: int) -> bool:
    return not getattr(self, "broken", False) and accept(self, token_id, left)


async def damaged_pieces(self: Generation) -> AsyncIterator[Piece]:
    async for piece in pieces(self):
        if self.answer.row.sampling.seed == WIRE and piece.index > WHOLE:
            raise ZeroDivisionError("a mistake of the server's own")
        yield piece


if __name__ == "__main__":
    Batch._forward, VLM.encode_tiles = torch.inference_mode()(damaged_forward), damaged_tiles
    GrammarGuide.accept, Generation.pieces = damaged_accept, damaged_pieces
    sys.exit(main(["serve", *sys.argv[1:]]))
