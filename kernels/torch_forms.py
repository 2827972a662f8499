"""The forms in plain torch that follow a tile routing: for a CPU, and where Triton is not.

Semantics and shapes are those of `shrink` and `expand`, mixes and their weights included. Rows of one mix are gathered
and go through their slots' products together; deltas are summed in float32, and the sum is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loramill.kernels.check import LiveRanks
from loramill.kernels.mixes import BASE_MIX
from loramill.kernels.routing import TileRouting


def rows_of_mixes(routing: TileRouting) -> Iterator[tuple[Tensor, list[tuple[int, int, float]]]]:
    """The rows of each mix that has any, and its members as (place, slot, weight)."""
    slots, weights = routing.mixes.slots.tolist(), routing.mixes.weights.tolist()
    members = routing.mixes.members.tolist()
    for mix in torch.unique(routing.mix_of_row).tolist():
        if mix != BASE_MIX:
            rows = (routing.mix_of_row == mix).nonzero()[:, 0]
            yield rows, [(place, slots[mix][place], weights[mix][place]) for place in range(members[mix])]


def multi_lora_torch(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, widths: Sequence[int], ranks: LiveRanks, routing: TileRouting
) -> None:
    """Add each routed row's delta to `y` in place."""
    for rows, members in rows_of_mixes(routing):
        mine = x.index_select(0, rows)
        bridges = []
        for _, slot, weight in members:
            rank = max(ranks[slot])
            v = mine @ a[slot, :, :rank].reshape(-1, a.shape[-1]).t()
            bridges.append((slot, weight, v.view(len(rows), a.shape[1], rank)))
        _add(y, rows, bridges, b, widths, ranks)


def embedding_torch(
    y: Tensor, tokens: Tensor, a: Tensor, b: Tensor, widths: Sequence[int], ranks: LiveRanks, routing: TileRouting
) -> None:
    """Add each routed row's delta of an embedding to `y` in place; `a` is [S, V, R]."""
    for rows, members in rows_of_mixes(routing):
        mine = tokens.index_select(0, rows)
        bridges = [(slot, weight, a[slot][mine][:, None]) for _, slot, weight in members]
        _add(y, rows, bridges, b, widths, ranks)


def _add(
    y: Tensor,
    rows: Tensor,
    bridges: Sequence[tuple[int, float, Tensor]],
    b: Tensor,
    widths: Sequence[int],
    ranks: LiveRanks,
) -> None:
    column = 0
    for i, width in enumerate(widths):
        columns = slice(column, column + width)
        column += width
        total = None
        for slot, weight, v in bridges:
            live = ranks[slot][i]
            if live:
                delta = (v[:, i, :live] @ b[slot, :live, columns]).float() * weight
                total = delta if total is None else total + delta
        if total is not None:
            part = y[:, columns]
            part.index_copy_(0, rows, (part.index_select(0, rows).float() + total).to(y.dtype))
