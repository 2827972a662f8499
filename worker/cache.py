"""The keys and values of every running row, in pages that `room` gives out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loramill.worker.memory import lazy_zeros


class LayerShape(NamedTuple):
    """One layer's key/value heads and head sizes."""

    heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """`pages` pages of `page_size` tokens in every layer."""

    def __init__(
        self, shapes: Mapping[int, LayerShape], pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def zeros(heads: int, dim: int) -> Tensor:
            return lazy_zeros(pages * heads * page_size * dim, dtype, device).view(pages, heads, page_size, dim)

        self.page_size = page_size
        self._layers = {n: (zeros(s.heads, s.key_dim), zeros(s.heads, s.value_dim)) for n, s in shapes.items()}

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """A layer's keys [pages, heads, page_size, key_dim] and values [pages, heads, page_size, value_dim]."""
        return self._layers[number]


def bytes_per_token(shapes: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    """Cache bytes that one token takes over all layers."""
    return sum(s.heads * (s.key_dim + s.value_dim) for s in shapes.values()) * dtype.itemsize
