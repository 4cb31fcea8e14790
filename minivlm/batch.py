"""Continuous batching: rows that run together in one cache and join and leave between any two tokens (Yu et al. 2022,
Orca).

A step is one packed forward of every running row's last id and, where rows are joining, of at most `chunk` positions
of their prompts (Agrawal et al. 2023, SARATHI), so a long prompt delays running rows by a chunk and not by its
length; prompts behind it wait for all of it. A row whose prompt is done gets its first token in the same step. Rows
that end leave at once: no step computes anything for them. Gradients are switched off here, and nowhere in the model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minivlm.answer import Token
from minivlm.errors import GenerationError, InputError, NumericError
from minivlm.ops.kv_cache import KVCache
from minivlm.ops.rows import Rows
from minivlm.row import Row
from minivlm.sampler import Choice
from minivlm.vlm import VLM

FAULTS = (NumericError, InputError, GenerationError)  # what can be wrong with one row and not with its neighbours
Fault = NumericError | InputError | GenerationError
SCORED = 256  # prompt positions whose logits are held at once where their log-probabilities are asked for


class Guide(Protocol):
    """What says which ids a row may choose next, such as a grammar."""

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""

    def bitmask(self) -> Tensor:
        """int32 [ceil(V / 32)] on the CPU: bit i % 32 of word i // 32 is set if id i may come next."""

    def accept(self, token_id: int, left: int) -> bool:
        """Take an id, with `left` more to come at most; or refuse it, and then the bitmask has only ids to take."""


@dataclass(eq=False)
class Member:
    """A row of the batch.

    embeddings       [n, D] of the ids that the cache does not hold yet; None once the row is running
    prompt_logprobs  of each prompt id behind those before it, as far as computed; None where not asked for. The first
                     id and image placeholders have none
    """

    row: Row
    slot: int
    embeddings: Tensor | None
    guide: Guide | None = None
    prompt_logprobs: list[float | None] | None = None
    last: Tensor | None = None  # [D], the prompt's last hidden state, while it waits for the other rows' prompts


class Batch:
    """The rows that run together, in the order in which they joined."""

    def __init__(self, model: VLM, allowed: Tensor, cache: KVCache, chunk: int, independent: bool = False):
        """allowed: bool [V], see `Vocabulary`. independent: a row gets its first token as soon as its own prompt is
        done, and its fault is its result in `step`; otherwise all begin together, and a fault is raised.
        """
        self.model, self.cache, self.chunk, self.independent = model, cache, chunk, independent
        self.members: list[Member] = []
        decoder = model.language_model
        self._decode = decoder.backend.decoding(decoder, cache)
        self._choose: Callable[..., Sequence[Choice]] = decoder.backend.sampler(allowed.to(cache.keys.device))

    def join(
        self, row: Row, slot: int, embeddings: Tensor, guide: Guide | None = None, prompt_logprobs: bool = False
    ) -> Member:
        """Add a row from the next step on; embeddings [n, D] of row.ids[row.cached:]. prompt_logprobs: from 0 only."""
        member = Member(row, slot, embeddings, guide, [None] if prompt_logprobs else None)
        self.members.append(member)
        return member

    def leave(self, member: Member) -> None:
        """Take a row out before its end."""
        self.members.remove(member)

    def step(self, members: Sequence[Member] | None = None) -> list[tuple[Member, Token | Fault]]:
        """One forward, of all members unless told of which; the token that each row got, if its prompt is done.

        If it raises, no row has changed, and the step may be tried again.
        """
        members = list(self.members) if members is None else members
        if not members:
            return []
        chosen, logits, computed = self._forward(members)
        choices = self._choices(chosen, logits) if chosen else ()
        for member, length, scores in computed:  # from here on nothing fails
            member.row.cached += length
            if member.embeddings is not None:
                member.embeddings = member.embeddings[length:]
            if member.prompt_logprobs is not None:
                member.prompt_logprobs += scores
        for member in chosen:
            member.embeddings = member.last = None
        results: list[tuple[Member, Token | Fault]] = []
        for member, choice in zip(chosen, choices, strict=True):
            if isinstance(choice, Choice):
                complete = member.guide is not None and member.guide.complete
                results.append((member, member.row.accept(choice, complete)))
            else:
                results.append((member, choice))
        ended = {id(m) for m, result in results if not isinstance(result, Token) or m.row.finish_reason is not None}
        self.members = [member for member in self.members if id(member) not in ended]
        return results

    # ---- forward

    @torch.inference_mode()
    def _forward(self, members: Sequence[Member]) -> tuple[list[Member], Tensor, list[tuple[Member, int, list]]]:
        """One packed forward: the members that choose now, their logits [B, V]; and of each member in it the number of
        positions computed, with the log-probabilities of prompt ids that were asked for.
        """
        running = [member for member in members if member.embeddings is None]
        joining = [member for member in members if member.embeddings is not None]
        decoder = self.model.language_model
        ids, starts = [m.row.ids[-1] for m in running], [m.row.cached for m in running]
        lengths, slots = [1] * len(running), [m.slot for m in running]
        computed: list[tuple[Member, int, list]] = [(member, 1, []) for member in running]
        if not joining:
            self.cache.grow(max(starts) + 1)
            hidden = self._decode(ids, Rows.causal(lengths, starts, slots))  # [B, D]
            return running, decoder.logits(hidden), computed
        part = next(parts([len(m.embeddings) for m in joining], [m.row.cached for m in joining], self.chunk))
        packed = [joining[i] for i in part.slots]
        rows = Rows.causal(lengths + list(part.lengths), starts + list(part.starts), slots + [m.slot for m in packed])
        self.cache.grow(max(start + n for start, n in zip(rows.starts, rows.lengths, strict=True)))
        pieces = [m.embeddings[:n] for m, n in zip(packed, part.lengths, strict=True)]
        if running:
            pieces.insert(0, decoder.embed_tokens(torch.tensor(ids, device=self.cache.keys.device)))
        hidden = decoder(pieces[0] if len(pieces) == 1 else torch.cat(pieces), rows, self.cache)  # [S, D]
        for member, n, at in zip(packed, part.lengths, rows.last[len(running) :], strict=True):
            asked = member.prompt_logprobs is not None
            computed.append((member, n, self._scores(member, hidden[at - n + 1 : at + 1]) if asked else []))
            member.last = hidden[at]  # a later part replaces it
        done = [m for m, n in zip(packed, part.lengths, strict=True) if n == len(m.embeddings)]
        if not self.independent:
            done = joining if sum(part.lengths) == sum(len(m.embeddings) for m in joining) else []
        states = [*hidden[: len(running)], *(member.last for member in done)]
        return running + done, decoder.logits(torch.stack(states)) if states else hidden[:0], computed

    def _scores(self, member: Member, hidden: Tensor) -> list[float | None]:
        """Log-probabilities of the ids that follow the cached ones, from the hidden states [n, D] before each."""
        row, image_id = member.row, self.model.config.image_token_id
        targets = row.ids[row.cached + 1 : row.cached + len(hidden) + 1]  # one fewer at the prompt's end
        values: list[float | None] = []
        for at in range(0, len(targets), SCORED):
            ids = targets[at : at + SCORED]
            logits = self.model.language_model.logits(hidden[at : at + len(ids)]).float()
            logprobs = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids, device=logits.device)[:, None])
            found = zip(ids, logprobs[:, 0].tolist(), strict=True)
            values += [None if token_id == image_id else value for token_id, value in found]
        return values

    # ---- choice

    def _choices(self, members: Sequence[Member], logits: Tensor) -> Sequence[Choice | Fault]:
        """What each row takes; the guides have it."""
        try:
            choices = self._sampled(members, logits)
        except FAULTS as fault:
            if not self.independent:
                raise
            if len(members) == 1:
                return [fault]
            return [self._choices([member], logits[i : i + 1])[0] for i, member in enumerate(members)]
        return [
            choice if member.guide is None else self._guided(member, choice, logits[i : i + 1])
            for i, (member, choice) in enumerate(zip(members, choices, strict=True))
        ]

    def _sampled(self, members: Sequence[Member], logits: Tensor) -> Sequence[Choice]:
        seen = [member.row.ids for member in members]
        starts = [member.row.prompt_tokens for member in members]
        arguments = (logits, [member.row.sampling for member in members], [len(ids) for ids in seen], seen)
        if all(member.guide is None for member in members):
            return self._choose(*arguments, None, starts)
        everything = torch.full((-(-logits.shape[1] // 32),), -1, dtype=torch.int32)
        masks = [everything if member.guide is None else member.guide.bitmask() for member in members]
        return self._choose(*arguments, torch.stack(masks), starts)

    def _guided(self, member: Member, choice: Choice, logits: Tensor) -> Choice | Fault:
        """The choice, or where the guide refuses it, another among what it then allows."""
        left = member.row.limit - len(member.row.ids) - 1
        try:
            if member.guide.accept(choice.id, left):
                return choice
            (choice,) = self._sampled([member], logits)
            if member.guide.accept(choice.id, left):
                return choice
            raise GenerationError(f"position {len(member.row.ids)}: the guide refuses id {choice.id} that it allowed")
        except (*FAULTS, RuntimeError, ValueError) as fault:  # not to be tried again: other guides have taken theirs
            if not self.independent:
                raise
            return fault if isinstance(fault, FAULTS) else GenerationError(f"the guide failed ({fault})")


def parts(lengths: Sequence[int], starts: Sequence[int], size: int) -> Iterator[Rows]:
    """The packed prompts cut after every `size` positions.

    Lengths (3, 4) by 5 give lengths (3, 2) of slots (0, 1), then 2 of slot 1 that start at 2.
    """
    if size < 1:
        raise InputError(f"chunk: found {size}, expected at least 1")
    part: list[tuple[int, int, int]] = []  # (length, start, slot)
    room = size
    for slot, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        while length > 0:
            taken = min(length, room)
            part.append((taken, start, slot))
            length, start, room = length - taken, start + taken, room - taken
            if room == 0:
                yield Rows.causal(*zip(*part, strict=True))
                part, room = [], size
    if part:
        yield Rows.causal(*zip(*part, strict=True))
