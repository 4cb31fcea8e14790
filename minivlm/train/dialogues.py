"""Questions and answers about pictures as training rows, and their loss: for the stages after the encoder's.

All questions about one picture share its image tokens: a row is one prefix followed by a segment per question, which
sees the prefix and itself (ops/rows.py). That equals a row per question, at a fraction of the cost. The prompts are
made by the code that serves, and only the assistant's words and its end-of-text token carry labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from minivlm.errors import InputError
from minivlm.ops.rows import Rows
from minivlm.processor import Inputs, Processor
from minivlm.processor.pixels import preprocess
from minivlm.processor.prompts import question_to_messages
from minivlm.train.draw import draw
from minivlm.train.loop import HELD_OUT_BATCHES, mean_report
from minivlm.train.questions import questions
from minivlm.train.world import scene
from minivlm.vlm import VLM

IGNORE = -100
QUESTIONS = 20  # name of the random stream that words the questions


@dataclass(frozen=True)
class DialogueBatch:
    """B packed rows: what the model reads, how the rows are cut, and what each position should predict.

    labels int64 [S]: the id that follows each position, IGNORE where nothing is to be learned.
    """

    inputs: tuple[Inputs, ...]
    rows: Rows
    labels: Tensor


def labelled(processor: Processor, question: str, answer: str, pictures: int) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids with the end-of-text token), one placeholder a picture.

    Both come from rendering the chat template, without and with the answer; raises InputError where the second is
    not a continuation of the first, or where no label would be left.
    """
    messages = question_to_messages(question, pictures)
    prompt = processor.tokenizer.encode(processor.render(messages))
    told = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    whole = processor.tokenizer.encode(processor.render(told, add_generation_prompt=False))
    if whole[: len(prompt)] != prompt:
        raise InputError(f"question {question!r}: its prompt is not how the dialogue with the answer {answer!r} begins")
    if not answer.strip():
        raise InputError(f"question {question!r}: the answer {answer!r} leaves no label")
    end = whole.index(processor.tokenizer.eos_token_id, len(prompt)) + 1
    return prompt, whole[len(prompt) : end]


def shared_row(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], tuple[int, ...]]:
    """(ids, labels, segment lengths) of the pairs (prompt, answer) behind their common beginning.

    Example: prompts 1 7 4 and 1 7 5 6 with answers 8 2 and 9 2 give

        ids       1  7 | 4  8 | 5  6  9        (an answer's last id is only ever a label)
        labels    .  . | 8  2 | .  9  2        segments (2, 2, 3)
    """
    prompts = [prompt for prompt, _ in pairs]
    shortest = min(len(prompt) for prompt in prompts) - 1  # each segment keeps a token of its prompt
    common = 0
    while common < shortest and len({prompt[common] for prompt in prompts}) == 1:
        common += 1
    ids, labels, segments = prompts[0][:common], [IGNORE] * common, [common]
    for prompt, answer in pairs:
        own = prompt[common:] + answer[:-1]
        ids += own
        labels += [IGNORE] * (len(own) - len(answer)) + answer
        segments.append(len(own))
    return ids, labels, tuple(segments)


def expanded(ids: list[int], labels: list[int], segments: tuple[int, ...], image_id: int, count: int):
    """A row whose one placeholder, in the prefix, is repeated once per image token."""
    at = ids.index(image_id)
    more = count - 1
    ids = ids[:at] + [image_id] * count + ids[at + 1 :]
    return ids, labels[:at] + [IGNORE] * count + labels[at + 1 :], (segments[0] + more, *segments[1:])


@dataclass(frozen=True)
class Dialogues:
    """Makes batches of a stage: batch `step` is a function of the seed, the split and the step alone."""

    processor: Processor
    seed: int
    batch: int
    first: int = 0  # number of the first scene

    def make_batch(self, step: int, split: str = "train") -> DialogueBatch:
        """Scenes first + step * batch .. of a split, with all their questions."""
        inputs, segments, labels = [], [], []
        for index in range(self.first + step * self.batch, self.first + (step + 1) * self.batch):
            row, row_segments, row_labels = self.row(index, split)
            inputs.append(row)
            segments.append(row_segments)
            labels += row_labels
        targets = torch.tensor(labels)
        if not (targets != IGNORE).any():
            raise InputError(f"batch {step}: no label in any row")
        return DialogueBatch(tuple(inputs), Rows.shared_prefix(segments), targets)

    def row(self, index: int, split: str) -> tuple[Inputs, tuple[int, ...], list[int]]:
        """One scene as (inputs, segment lengths, labels)."""
        drawn = scene(split, index, self.seed)
        rng = np.random.default_rng([self.seed, QUESTIONS, index])
        asked = questions(drawn, rng)
        processor = self.processor
        picture = Image.fromarray(draw(drawn)[0])
        tiles, size = preprocess(picture, processor.image_config), (picture.height, picture.width)
        row = shared_row([labelled(processor, qa.question, qa.answer, 1) for qa in asked])
        image_id, count = processor.tokenizer.image_token_id, processor.geometry.image_token_count(size)
        ids, labels, segments = expanded(*row, image_id, count)
        return Inputs(tuple(ids), tiles, (size,), (len(tiles),)), segments, labels


def answer_weights(labels: Tensor, segments: Sequence[tuple[int, ...]]) -> Tensor:
    """Weights [S] of the labelled positions, 0 elsewhere: an answer of n tokens counts sqrt(n), each token 1/sqrt(n).

    With equal tokens the answers "yes" and "red", where looking things up is learned, would have a twentieth of the
    loss and the long descriptions most of it.
    Example: labels . 8 2 | . 5 with segments ((3, 2),) give 0, 0.71, 0.71, 0, 1.
    """
    lengths = torch.tensor([length for row in segments for length in row])
    answer = torch.arange(len(lengths)).repeat_interleave(lengths)  # [S], the segment of each position
    taught = (labels != IGNORE).float()
    tokens = torch.zeros(len(lengths)).index_add(0, answer, taught)
    return taught * tokens.clamp(min=1)[answer].rsqrt()


def dialogue_loss(vlm: VLM, batch: DialogueBatch) -> tuple[Tensor, dict[str, float]]:
    """Weighted mean cross-entropy over the labelled positions, and the share of them predicted right."""
    hidden = vlm.language_model(vlm.embed(batch.inputs), batch.rows, None)  # [S, D]
    taught = batch.labels != IGNORE
    weights = answer_weights(batch.labels, batch.rows.segments)[taught].to(hidden.device)
    labels = batch.labels[taught].to(hidden.device)
    logits = vlm.language_model.logits(hidden[taught.to(hidden.device)]).float()  # [labels, V]
    right = (logits.detach().argmax(-1) == labels).float().mean().item()
    return (cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum(), {"right": right}


@dataclass(frozen=True)
class DialogueStage:
    """Batches and loss of a stage that trains on dialogues."""

    vlm: VLM
    dialogues: Dialogues

    def make_batch(self, step: int) -> DialogueBatch:
        return self.dialogues.make_batch(step)

    def loss(self, batch: DialogueBatch) -> tuple[Tensor, dict[str, float]]:
        return dialogue_loss(self.vlm, batch)

    def held_out(self) -> dict[str, float]:
        """Loss and share of right tokens on pictures of the test split, teacher-forced."""
        with torch.no_grad():
            return mean_report(self.loss(self.dialogues.make_batch(i, "test")) for i in range(HELD_OUT_BATCHES))
