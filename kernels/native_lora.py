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

_INPUT, _SLOTS, _TILES = struct.Struct("@Pq"), struct.Struct("@iiPPPq"), struct.Struct("@PqPPii")
"""`Call` in `cpp/lora.cpp`, in three parts: the second is known once a slot is filled, the third once for a pass."""
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
        self._live = 0  # a bit for each slot that has columns
        self._packed = b""

    def put(self, slot: int, weights: Panels | Sequence[LowRank | None]) -> bool:
        """Fill a slot: panels stay where they are. True: its weights are other tensors now."""
        panels = weights if isinstance(weights, Panels) else self._laid(weights)
        columns = panels.a.numel() // self._form.k_size
        self._held[slot], self._columns[slot] = panels, columns
        self._ranks[slot] = torch.tensor(panels.ranks, dtype=torch.int32)
        self._slots[slot] = torch.tensor([panels.a.data_ptr(), panels.b.data_ptr(), columns])
        self._live = (self._live & ~(1 << slot)) | (bool(columns) << slot)
        addresses = (one.data_ptr() for one in (self._widths, self._slots, self._ranks))
        self._packed = _SLOTS.pack(self._form.k_size, len(self._widths), *addresses, max(self._columns))
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
        """`Call` in `cpp/lora.cpp`, or None where no slot of the pass has anything for these projections."""
        if isinstance(routing, TileRouting):
            raise ValueError("native slots take a routing by segments")
        tiles = routing.native(y.shape[0])
        if not tiles.slots_used & self._live:
            return None
        return _INPUT.pack(x.data_ptr(), x.stride(0)) + self._packed + tiles.packed

    def _function(self, name: str) -> Callable[..., int]:
        return native.function(name, self._form.dtype)


class NativeTiles(NamedTuple):
    """How a pass is cut into tasks."""

    packed: bytes
    """For the call, with the addresses of `kept`."""
    slots_used: int
    """A bit for each."""
    kept: tuple[Tensor, Tensor, Tensor]
    """Tiles [n, 4] int32: first row, rows, and its members: the first of them and how many. Of each member its slot [m]
    int32 and its weight [m]."""


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
    members = [member for mix in mixes for member in mix]
    slots = [member.slot for member in members]
    kept = (
        torch.tensor(tiles, dtype=torch.int32),
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor([member.weight for member in members], dtype=torch.float32),
    )
    at_tiles, *at_members = (one.data_ptr() for one in kept)
    most_members = max(map(len, mixes), default=0)
    packed = _TILES.pack(at_tiles, len(tiles), *at_members, height, most_members)
    return NativeTiles(packed, sum(1 << slot for slot in set(slots)), kept)
