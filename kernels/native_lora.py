"""Multi-LoRA for a CPU in C++: one projection's adapter slots, laid out as `cpp/lora.cpp` reads them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from loramill.kernels import native
from loramill.kernels.native_forms import add_rms_norm_native, gated_native, norm_rows, rope_rows
from loramill.kernels.panels import Filling, Pair, PanelForm, Panels
from loramill.kernels.routing import TileRouting
from loramill.kernels.segments import Segment

if TYPE_CHECKING:
    from loramill.kernels.multi_lora import Routing

_CALL = struct.Struct("@PqiiPPPPqPPqii")
DECODE_HEIGHT, PREFILL_HEIGHT = 16, 32
"""Rows of a task. Registers hold 8 at once and the matrix unit 16, so short segments are cut to that for the threads to
share out; rows of one task that are more use weights that are in the first cache already."""
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
        call = self._of(y, x, routing)
        if call is not None:
            self._function("multi_lora")(call, y.data_ptr(), y.stride(0))

    # What follows a projection is done with each row of y while it is in a cache; y is left as it may.

    def gated(self, y: Tensor, x: Tensor, routing: Routing | TileRouting, activation: int) -> Tensor:
        """`layer.gated` of y with its deltas; `activation` is its place among ACTIVATIONS."""
        call = self._of(y, x, routing)
        if call is None:
            return gated_native(y, activation)
        out = y.new_empty(y.shape[0], y.shape[1] // 2)
        self._function("multi_lora_gated")(call, y.data_ptr(), y.stride(0), out.data_ptr(), activation)
        return out

    def normed(
        self, y: Tensor, x: Tensor, routing: Routing | TileRouting, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`layer.add_rms_norm` of the residual [T, N] and y with its deltas."""
        call = self._of(y, x, routing)
        if call is None:
            return add_rms_norm_native(residual, y, weight, eps)
        residual = residual.contiguous()
        how, (normed, s) = norm_rows(residual, weight, eps, adds=True)
        self._function("multi_lora_normed")(call, y.data_ptr(), y.stride(0), how)
        return normed, s

    def roped(self, y: Tensor, x: Tensor, routing: Routing | TileRouting, *to: Any) -> Tensor:
        """`layer.rope_store` of y with its deltas; `to` is what that takes beside it."""
        how, (q,) = rope_rows(y, *to)
        call = self._of(y, x, routing)
        if call is None:
            self._function("rope_store")(how, y.data_ptr(), y.stride(0), y.shape[0])
        else:
            self._function("multi_lora_roped")(call, y.data_ptr(), y.stride(0), how)
        return q

    def _of(self, y: Tensor, x: Tensor, routing: Routing | TileRouting) -> bytes | None:
        """`Call` in `cpp/lora.cpp`."""
        if isinstance(routing, TileRouting):
            raise ValueError("native slots take a routing by segments")
        most = max((self._columns[slot] for slot in routing.slots_used), default=0)
        if not most:
            return None
        tiles, slots, weights, height, members = routing.native(y.shape[0])
        return _CALL.pack(
            *(x.data_ptr(), x.stride(0), self._form.k_size, len(self._widths)),
            *(self._widths.data_ptr(), self._slots.data_ptr(), self._ranks.data_ptr()),
            *(tiles.data_ptr(), len(tiles), slots.data_ptr(), weights.data_ptr(), most, height, members),
        )

    def _function(self, name: str) -> Callable[..., int]:
        return native.function(name, self._form.dtype)


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
