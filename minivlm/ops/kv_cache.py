"""The key-value cache: one preallocated tensor of keys and one of values, written by position.

It knows nothing of rows or lengths: `Rows.starts` says how much of a slot is filled. What nobody has written is 0: a
masked position that is not a number would still spoil a sum.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer: two tensors [layers, slots, K, capacity, C] of the model's dtype."""

    def __init__(self, layers: int, slots: int, kv_heads: int, capacity: int, head_dim: int, dtype, device):
        shape = (layers, slots, kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        """Positions that fit in a slot."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Memory of both tensors, in bytes."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def write(self, layer: int, slot: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [K, n, C] at positions start .. start + n - 1; return all so far, each [K, start + n, C]."""
        end = start + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"position {end - 1} does not fit in a cache of {self.capacity} positions")
        self.keys[layer, slot, :, start:end] = k
        self.values[layer, slot, :, start:end] = v
        return self.keys[layer, slot, :, :end], self.values[layer, slot, :, :end]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` positions of one slot those of another."""
        for stored in (self.keys, self.values):
            stored[:, target, :, :length] = stored[:, source, :, :length]

    def grow(self, capacity: int) -> None:
        """Make room for at least `capacity` positions, at least doubling, and keep what is stored."""
        if capacity <= self.capacity:
            return
        old_keys, old_values = self.keys, self.values
        shape = (*old_keys.shape[:3], max(capacity, 2 * self.capacity), old_keys.shape[4])
        self.keys, self.values = old_keys.new_zeros(shape), old_values.new_zeros(shape)
        self.keys[:, :, :, : old_keys.shape[3]] = old_keys
        self.values[:, :, :, : old_values.shape[3]] = old_values
