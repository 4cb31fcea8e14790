"""Image tokens into the text embeddings: count, then one masked write.

The processor has already put one placeholder id per image token into the prompt, so no length changes here.
"""

import torch
from torch import Tensor

from minivlm.errors import InputError


def merge(embeddings: Tensor, ids: Tensor, image_tokens: Tensor, image_token_id: int) -> Tensor:
    """Put image_tokens [I, D] where ids [S] hold the placeholder, in reading order; returns [S, D].

    Example: ids (1, 9, 9, 5) with placeholder 9 and two image tokens a, b give (e(1), a, b, e(5)).
    Raises InputError when the two counts differ.
    """
    places = ids == image_token_id  # [S]
    wanted, found = int(places.sum()), image_tokens.shape[0]
    if wanted != found:
        raise InputError(f"the prompt has {wanted} image placeholders and the pictures give {found} image tokens")
    return torch.masked_scatter(embeddings, places[:, None], image_tokens.to(embeddings.dtype))
