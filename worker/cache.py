"""The keys and values of every running sequence, laid out by `slabs`.

A row of capacity C holds its keys and its values as [heads, C, dim]: all rows of a slab are one strided view that a
decode step multiplies with, and a token's head is one line to write. Measured on two AVX512-BF16 cores, 128 rows of 224
places, 4 KV heads of 64: 0.66 ms a layer for the scores, against 1.10 ms with keys as [heads, dim, C]; for heads of 128
the other way round by a seventh, but those keys take three times as long to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loramill.worker.memory import lazy_zeros
from loramill.worker.slabs import Move, Room


class LayerShape(NamedTuple):
    """One layer's key/value heads and head sizes."""

    heads: int
    key_dim: int
    value_dim: int


class Places(NamedTuple):
    """Where T tokens go: each one's room's token offset, that room's capacity and the position in it, all [T]."""

    offset: Tensor
    capacity: Tensor
    position: Tensor


class KVCache:
    """Room for `tokens` tokens in every layer.

    Places that nobody wrote are zero, never NaN: attention gives what is masked the weight 0, and 0 * NaN is NaN.
    """

    def __init__(self, shapes: Mapping[int, LayerShape], tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        def zeros(heads: int, dim: int) -> Tensor:
            return lazy_zeros(tokens * heads * dim, dtype, device).view(-1, dim)

        self._shapes = dict(shapes)
        self._keys = {layer: zeros(s.heads, s.key_dim) for layer, s in shapes.items()}
        self._values = {layer: zeros(s.heads, s.value_dim) for layer, s in shapes.items()}

    def index(self, layer: int, places: Places) -> Tensor:
        """Lines of the cache that the tokens' heads take, [T * heads]: the same in all layers with as many heads."""
        offset, capacity, position = (column[:, None] for column in places)
        heads = self._shapes[layer].heads
        return (offset * heads + torch.arange(heads, device=offset.device) * capacity + position).view(-1)

    def write(self, layer: int, index: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [T, heads, dim] at what `index` gave for their places."""
        for cache, new in ((self._keys[layer], key), (self._values[layer], value)):
            cache.index_copy_(0, index, new.reshape(-1, new.shape[-1]))

    def rows(self, layer: int, room: Room, count: int = 1) -> tuple[Tensor, Tensor]:
        """Views of `count` rows: keys [count, heads, C, key_dim], values [count, heads, C, value_dim]."""
        heads = self._shapes[layer].heads
        lines = slice(room.offset * heads, (room.offset + count * room.capacity) * heads)
        keys, values = self._keys[layer][lines], self._values[layer][lines]
        return keys.view(count, heads, room.capacity, -1), values.view(count, heads, room.capacity, -1)

    def carry_out(self, moves: Iterable[Move]) -> None:
        """Move rows as `slabs` asked, in order."""
        for source, target, length in moves:
            for layer in self._shapes:
                for i, new in enumerate(self.rows(layer, target)):
                    if source is None:
                        new[:, :, :length] = 0
                        continue
                    old = self.rows(layer, source)[i]
                    new[:, :, :length] = old[:, :, :length]
                    old[:, :, :length] = 0


def bytes_per_token(shapes: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    """Cache bytes that one token takes over all layers."""
    return sum(s.heads * (s.key_dim + s.value_dim) for s in shapes.values()) * dtype.itemsize
