"""Decoding steps of backend `triton`: on a GPU each is one launch, the replay of a captured CUDA graph.

A step of a 32-layer decoder is over 200 short kernels, which take less time than Python needs to launch them. A graph
is captured for 1, 2, 4, 8, .. rows when such a step first comes; fewer rows are padded. It has its shapes and addresses
from then on, so all that changes is read from tensors: ids, positions, slots, intervals. It knows nothing of sampling.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rope import rope_table
from minivlm.ops.rows import Rows
from minivlm.ops.triton_attention import Sight

# id, position, slot, lo, hi of a row that is not there: its key is stored nowhere, it sees nothing, nobody reads it.
PADDING = torch.tensor([0, -1, -1, 0, 0], dtype=torch.int32)


def decoding(decoder: nn.Module, cache: KVCache) -> Callable:
    """A function (ids of B rows, rows) -> hidden states [B, D]: the next token of every row through the decoder."""
    steps: dict[int, Step] = {}

    def step(ids: Sequence[int], rows: Rows) -> Tensor:
        size = 1 << (len(ids) - 1).bit_length()  # the next power of 2
        if steps and next(iter(steps.values())).keys is not cache.keys:
            steps.clear()  # the cache has grown: its old memory is not where the keys are
        if size not in steps:
            steps[size] = Step(decoder, cache, size)
        return steps[size](ids, rows)

    return step


class Step:
    """A step of up to `size` rows over tensors that stay where they are."""

    def __init__(self, decoder: nn.Module, cache: KVCache, size: int):
        device = cache.keys.device
        self.decoder, self.cache, self.keys = decoder, cache, cache.keys
        config = decoder.config
        self.rope = _angles(cache.capacity, config.head_dim, config.rope_theta, cache.keys.dtype, device)
        width = -(-size // 4) * 4  # every vector at a multiple of 16 bytes, see `sight`
        self.numbers = PADDING[:, None].repeat(1, width)
        if device.type == "cuda":
            self.numbers = self.numbers.pin_memory()
        self.table = self.numbers.to(device)
        self.ids, self.positions, slots, lo, hi = (row[:size] for row in self.table)
        self.rows = Rows.causal([1] * size)
        self.seen = Sight(
            positions=self.positions,
            slots=slots,
            lo=lo,
            hi=hi,
            prefix=None,
            offsets=torch.arange(size + 1, dtype=torch.int32, device=device),
            row_slots=slots,
            longest=1,
            each=1,
            keys=cache.capacity,  # as many runs of keys as its end will need
        )
        self.graph = self._captured() if device.type == "cuda" else None

    def __call__(self, ids: Sequence[int], rows: Rows) -> Tensor:
        """The hidden states [B, D], to be read before the next step."""
        if max(rows.starts) >= self.cache.capacity:
            raise ValueError(f"position {max(rows.starts)} does not fit in {self.cache.capacity} positions")
        window = self.decoder.config.sliding_window
        ends = [start + 1 for start in rows.starts]
        lo = [0 if window is None else max(0, end - window) for end in ends]
        self.numbers[:] = PADDING[:, None]
        self.numbers[:, : len(ids)] = torch.tensor([ids, rows.starts, rows.slots, lo, ends])
        self.table.copy_(self.numbers, non_blocking=True)
        if self.graph is None:  # the interpreter
            self.hidden = self._compute()
        else:
            self.graph.replay()
        return self.hidden[: len(ids)]

    def _compute(self) -> Tensor:
        x = self.decoder.embed_tokens(self.ids)  # [size, D]
        rope = tuple(table[self.positions] for table in self.rope)  # of padding, at -1, the last one
        return self.decoder.run(x, rope, self.rows, self.seen, self.cache)

    def _captured(self) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self.table.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._compute()  # compiles and loads every kernel, which is not allowed during a capture
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.hidden = self._compute()
        return graph


@lru_cache(maxsize=4)
def _angles(positions: int, head_dim: int, theta: float, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position of a cache, two tensors [T, 1, C]: the same for steps of every size."""
    return rope_table(torch.arange(positions, device=device), head_dim, theta, dtype)
