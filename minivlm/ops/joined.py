"""Linear layers that read the same input: their weights end to end in memory are one product's, without a copy."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one module that read the same input


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """The one tensor [V_1 + V_2 + .., D] that these [V_i, D] are parts of, without a copy; None if they are not.

    `model.to` parts them, so it is seen from where they lie.
    """
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def places(shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Empty tensors for the parameters of these names that belong to a group, its members end to end."""
    found = {}
    for name in shapes:
        for group in GROUPS:
            prefix, first, leaf = name.rpartition(f"{group[0]}.")
            members = [f"{prefix}{member}.{leaf}" for member in group]
            if first and all(member in shapes for member in members):
                sizes = [shapes[member][0] for member in members]
                whole = torch.empty(sum(sizes), *shapes[name][1:], dtype=dtype, device=device)
                found |= zip(members, whole.split(sizes), strict=True)
    return found
