"""Image tokens into their places: the worked example, both counts in the error, gradients to both sides."""

import pytest
import torch

from minivlm.errors import InputError
from minivlm.merge import merge

IDS = torch.tensor([1, 9, 9, 5])


def test_placeholders_are_replaced_in_reading_order():
    embeddings, tokens = torch.arange(8.0).view(4, 2), torch.tensor([[10.0, 11.0], [12.0, 13.0]])
    merged = merge(embeddings, IDS, tokens, image_token_id=9)
    assert merged.tolist() == [[0, 1], [10, 11], [12, 13], [6, 7]]
    assert embeddings[1].tolist() == [2, 3]  # the argument is left as it was


def test_pads_and_other_ids_are_never_written_to():
    """checklist 20: only the image token's own id is a place; 8 and 0 might be pads."""
    ids = torch.tensor([8, 0, 9, 8])
    merged = merge(torch.zeros(4, 1), ids, torch.ones(1, 1), image_token_id=9)
    assert merged.flatten().tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("found", (0, 1, 3, 4))
def test_counts_that_differ_are_named(found):
    with pytest.raises(InputError, match=f"2 image placeholders and the pictures give {found} image tokens"):
        merge(torch.zeros(4, 2), IDS, torch.zeros(found, 2), image_token_id=9)


def test_text_alone_is_left_alone():
    embeddings = torch.randn(4, 2)
    assert torch.equal(merge(embeddings, IDS, embeddings[:0], image_token_id=7), embeddings)


def test_image_tokens_take_the_embeddings_type():
    merged = merge(torch.zeros(4, 2, dtype=torch.bfloat16), IDS, torch.full((2, 2), 1.001), image_token_id=9)
    assert merged.dtype == torch.bfloat16 and merged[1].tolist() == [1, 1]


def test_gradients_reach_each_side_where_it_was_used():
    embeddings = torch.randn(4, 2, requires_grad=True)
    tokens = torch.randn(2, 2, requires_grad=True)
    merge(embeddings, IDS, tokens, image_token_id=9).sum().backward()
    assert embeddings.grad.tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]
    assert tokens.grad.tolist() == [[1, 1], [1, 1]]
