"""The keys and values of every running sequence: two tensors a layer, laid out by `slabs`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loramill.worker.slabs import Move


class LayerShape(NamedTuple):
    """One layer's key/value heads and head sizes."""

    heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """`tokens` places of key [heads, key_dim] and value [heads, value_dim] for each layer.

    Places that nobody wrote are zero, never NaN: attention gives what is masked the weight 0, and 0 * NaN is NaN. On a
    CPU such zeros cost no memory until they are written.
    """

    def __init__(self, shapes: Mapping[int, LayerShape], tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        def zeros(heads: int, dim: int) -> Tensor:
            return torch.zeros(tokens, heads, dim, dtype=dtype, device=device)

        self.keys = {layer: zeros(s.heads, s.key_dim) for layer, s in shapes.items()}
        self.values = {layer: zeros(s.heads, s.value_dim) for layer, s in shapes.items()}

    def write(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [T, heads, dim] of T tokens at token offsets `places` [T]."""
        self.keys[layer].index_copy_(0, places, key)
        self.values[layer].index_copy_(0, places, value)

    def carry_out(self, moves: Iterable[Move]) -> None:
        """Copy rows as `slabs` asked, in order."""
        for source, target, length in moves:
            for store in (self.keys, self.values):
                for tensor in store.values():
                    if source is None:
                        tensor[target : target + length] = 0
                    else:
                        tensor[target : target + length] = tensor[source : source + length]
                        tensor[source : source + length] = 0


def bytes_per_token(shapes: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    """Cache bytes that one token takes over all layers."""
    return sum(s.heads * (s.key_dim + s.value_dim) for s in shapes.values()) * dtype.itemsize
