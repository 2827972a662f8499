"""Multi-LoRA for a CPU in C++: one projection's adapter slots, laid out as `cpp/lora.cpp` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from loramill.kernels import native
from loramill.kernels.panels import Filling, Pair, PanelForm, Panels
from loramill.kernels.routing import TileRouting
from loramill.kernels.segments import Segment

if TYPE_CHECKING:
    from loramill.kernels.multi_lora import Routing

DECODE_HEIGHT, PREFILL_HEIGHT = 8, 32
"""Rows of a task. 8 is what registers hold at once, so short segments are cut to it for the threads to share out; rows
of one task that are more use weights that are in the first cache already."""
PREFILL_ROWS = 48
"""Mean rows of a segment from which tasks are high."""


class LowRank(Protocol):
    """What an adapter adds to a projection: `a` [rank, K], `b` [rank, width]."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...


class NativeLora:
    """Adapter slots over sibling projections that read one input, each filled with panels of this form."""

    def __init__(self, slots: int, form: PanelForm) -> None:
        self._form = form
        self._widths = torch.tensor(form.widths, dtype=torch.int32)
        self._ranks = torch.zeros(slots, len(form.widths), dtype=torch.int32)
        self._slots = torch.zeros(slots, 3, dtype=torch.int64)  # addresses of A and B, columns of A
        self._held: list[Panels | None] = [None] * slots
        self._columns = [0] * slots
        self._call = native.function("multi_lora", form.dtype)

    def put(self, slot: int, weights: Panels | Sequence[LowRank | None]) -> bool:
        """Fill a slot: panels stay where they are. True: its weights are other tensors now."""
        panels = weights if isinstance(weights, Panels) else self._laid(weights)
        columns = panels.a.numel() // self._form.k_size
        self._held[slot], self._columns[slot] = panels, columns
        self._ranks[slot] = torch.tensor(panels.ranks, dtype=torch.int32)
        self._slots[slot] = torch.tensor([panels.a.data_ptr(), panels.b.data_ptr(), columns])
        return True

    def _laid(self, weights: Sequence[LowRank | None]) -> Panels:
        pairs = [[] if one is None else [Pair(one.a, one.b.t())] for one in weights]
        room = torch.empty(self._form.size([one.a.shape[0] if one else 0 for one in weights]), dtype=self._form.dtype)
        filling = Filling(self._form.dtype)
        panels = self._form.pack(pairs, room, filling)
        filling.run()
        return panels

    def add(self, y: Tensor, x: Tensor, routing: Routing | TileRouting) -> None:
        """Add each routed row's delta to y [T, N], in place; x [T, K]. Both have their columns side by side.

        Raises:
            ValueError: the routing is one by tiles, for a device.
        """
        self._over(y, x, routing, None, 0)

    def gated(self, y: Tensor, x: Tensor, routing: Routing | TileRouting, activation: int) -> Tensor | None:
        """`layer.gated` of y with each routed row's delta, y being left as it may: one pass over y instead of two. None
        where no row of these has a delta; `activation` is its place among ACTIVATIONS."""
        out = y.new_empty(y.shape[0], y.shape[1] // 2)
        return out if self._over(y, x, routing, out, activation) else None

    def _over(self, y: Tensor, x: Tensor, routing: Routing | TileRouting, out: Tensor | None, activation: int) -> bool:
        if isinstance(routing, TileRouting):
            raise ValueError("native slots take a routing by segments")
        most = max((self._columns[slot] for slot in routing.slots_used), default=0)
        if not most:
            return False
        tiles, slots, weights, height, members = routing.native(y.shape[0])
        self._call(
            *(y.data_ptr(), y.stride(0), None if out is None else out.data_ptr(), activation),
            *(x.data_ptr(), x.stride(0), self._form.k_size, len(self._widths)),
            *(self._widths.data_ptr(), self._slots.data_ptr(), self._ranks.data_ptr()),
            *(tiles.data_ptr(), len(tiles), slots.data_ptr(), weights.data_ptr(), most, height, members),
        )
        return True


class NativeTiles(NamedTuple):
    """How a pass is cut into tasks."""

    tiles: Tensor
    """[n, 4] int32: first row, rows, and its members: the first of them and how many."""
    slots: Tensor
    """Of each member: [m] int32."""
    weights: Tensor
    height: int
    most_members: int


def native_tiles(segments: Sequence[Segment], rows: int) -> NativeTiles:
    """Cut all rows of a pass into tiles; segments of the same rows are members of one mix, and of one tile, and rows of
    the base are in tiles without members."""
    mixes = [[*group] for _, group in groupby(segments, key=lambda segment: (segment.start, segment.end))]
    mean = sum(mix[0].end - mix[0].start for mix in mixes) / max(1, len(mixes))
    height = PREFILL_HEIGHT if mean >= PREFILL_ROWS else DECODE_HEIGHT
    tiles: list[tuple[int, int, int, int]] = []

    def cut(start: int, end: int, first: int, members: int) -> None:
        tiles.extend((row, min(height, end - row), first, members) for row in range(start, end, height))

    first = done = 0
    for mix in mixes:
        cut(done, mix[0].start, 0, 0)
        cut(mix[0].start, mix[0].end, first, len(mix))
        first, done = first + len(mix), mix[0].end
    cut(done, rows, 0, 0)
    return NativeTiles(
        torch.tensor(tiles, dtype=torch.int32),
        torch.tensor([member.slot for mix in mixes for member in mix], dtype=torch.int32),
        torch.tensor([member.weight for mix in mixes for member in mix], dtype=torch.float32),
        height,
        max(map(len, mixes), default=0),
    )
