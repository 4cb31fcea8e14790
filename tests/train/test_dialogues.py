"""Training rows: labels on the assistant's words only, and a shared prefix that equals separate prompts."""

import pytest
import torch

from minivlm.errors import InputError
from minivlm.processor import Inputs
from minivlm.processor.prompts import question_to_messages
from minivlm.train import run
from minivlm.train.dialogues import IGNORE, Dialogues, answer_weights, dialogue_loss, expanded, labelled, shared_row


@pytest.fixture(scope="module")
def processor():
    return run.new_processor()


@pytest.fixture(scope="module")
def vlm(processor):
    return run.new_modules(processor)["vlm"]


def test_labels_are_the_answer_and_its_end_token(processor):
    prompt, answer = labelled(processor, "What colour is the star?", "red", 1)
    assert processor.decode(answer, skip_special=False) == "red</s>"
    messages = question_to_messages("What colour is the star?", 1)
    served = processor.render(messages)
    assert prompt == processor.tokenizer.encode(served)


def test_an_empty_answer_is_refused(processor):
    with pytest.raises(InputError, match="leaves no label"):
        labelled(processor, "What?", "", 0)


def test_shared_row_is_the_example_of_its_docstring():
    ids, labels, segments = shared_row([([1, 7, 4], [8, 2]), ([1, 7, 5, 6], [9, 2])])
    assert ids == [1, 7, 4, 8, 5, 6, 9]
    assert labels == [IGNORE, IGNORE, 8, 2, IGNORE, 9, 2]
    assert segments == (2, 2, 3)


def test_expanding_a_placeholder_moves_labels_and_prefix():
    assert expanded([1, 9, 4, 8], [IGNORE, IGNORE, 8, 2], (2, 2), 9, 3) == (
        [1, 9, 9, 9, 4, 8],
        [IGNORE, IGNORE, IGNORE, IGNORE, 8, 2],
        (4, 2),
    )


def test_shared_prefix_equals_a_row_per_question(processor, vlm):
    """The speed-up is exact: each question's logits are those of its own prompt, and no sibling leaks into it."""
    batch = Dialogues(processor, 0, 1, 5).make_batch(0)
    (row,), (segments,) = batch.inputs, batch.rows.segments
    with torch.no_grad():
        together = vlm.language_model.logits(vlm.language_model(vlm.embed(batch.inputs), batch.rows, None))
        at = prefix = segments[0]
        for length in segments[1:]:
            ids = row.ids[:prefix] + row.ids[at : at + length]
            alone = vlm([Inputs(ids, row.tiles, row.image_sizes, row.tile_counts)])
            torch.testing.assert_close(together[at : at + length], alone[prefix:], rtol=1e-4, atol=1e-5)
            at += length
    assert at == len(row.ids)


def test_answer_weights_are_the_example_of_their_docstring():
    labels = torch.tensor([IGNORE, 8, 2, IGNORE, 5])
    assert answer_weights(labels, [(3, 2)]).tolist() == pytest.approx([0, 0.5**0.5, 0.5**0.5, 0, 1])


def test_loss_weighs_an_answer_by_the_root_of_its_length(processor, vlm):
    batch = Dialogues(processor, 0, 2).make_batch(0)
    loss, report = dialogue_loss(vlm, batch)
    with torch.no_grad():
        hidden = vlm.language_model(vlm.embed(batch.inputs), batch.rows, None)
        scores = vlm.language_model.logits(hidden).double().log_softmax(-1)
    total = weight = at = 0.0
    for length in (length for row in batch.rows.segments for length in row):
        taught = [i for i in range(int(at), int(at) + length) if batch.labels[i] != IGNORE]
        at += length
        if taught:
            total -= len(taught) ** 0.5 * sum(scores[i, batch.labels[i]].item() for i in taught) / len(taught)
            weight += len(taught) ** 0.5
    assert loss.item() == pytest.approx(total / weight, rel=1e-5)
    assert 0 <= report["right"] <= 1


def test_a_batch_is_a_function_of_seed_and_step(processor):
    one, again = (Dialogues(processor, 0, 2).make_batch(3) for _ in range(2))
    other = Dialogues(processor, 1, 2).make_batch(3)
    assert [row.ids for row in one.inputs] == [row.ids for row in again.inputs]
    assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(one.inputs, again.inputs, strict=True))
    assert [row.ids for row in one.inputs] != [row.ids for row in other.inputs]


def test_gradients_reach_only_what_a_stage_trains(processor):
    """The projector's stage gives gradients to the projector and the newline; encoder and decoder are frozen."""
    from minivlm.train.recipe import PROJECTOR

    modules = run.new_modules(processor)
    for name, parameter in modules.named_parameters():
        parameter.requires_grad_(name.startswith(PROJECTOR.trains))
    dialogue_loss(modules["vlm"], Dialogues(processor, 0, 2).make_batch(0))[0].backward()
    moved = {name for name, parameter in modules.named_parameters() if parameter.grad is not None}
    assert moved == {
        "vlm.image_newline",
        *(f"vlm.multi_modal_projector.linear_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")),
    }
