"""Multi-LoRA for a CPU in C++: one projection's adapter slots, laid out as `cpp/lora.cpp` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from loramill.kernels import native
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


def serves_lora(dtype: torch.dtype, device: torch.device, widths: Sequence[int], k_size: int) -> bool:
    """Whether slots over sibling projections of these widths can be `NativeLora`."""
    whole = all(width % native.LANES == 0 for width in widths) and k_size % 2 == 0
    return whole and native.serves(torch.empty(0, dtype=dtype, device=device))


class NativeLora:
    """Adapter slots over sibling projections that read one input of size `k_size`.

    A slot's A is [K, columns], the siblings' ranks side by side, and its B [rank, width] for each sibling, both as
    `_packed` lays them out: `step` numbers of the reduced dimension together, as the processor multiplies them.
    """

    def __init__(self, slots: int, widths: Sequence[int], k_size: int, dtype: torch.dtype) -> None:
        self.k_size, self.dtype = k_size, dtype
        self._step = native.function("multi_lora_step", dtype)()
        self._widths = torch.tensor(widths, dtype=torch.int32)
        self._ranks = torch.zeros(slots, len(widths), dtype=torch.int32)
        self._slots = torch.zeros(slots, 3, dtype=torch.int64)  # addresses of A and B, columns of A
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * slots
        self._columns = [0] * slots
        self._call = native.function("multi_lora", dtype)

    def put(self, slot: int, deltas: Sequence[LowRank | None]) -> bool:
        """Fill a slot; None where its adapter leaves a sibling alone. True: its weights are other tensors now."""
        ranks = [0 if one is None else -(-one.a.shape[0] // self._step) * self._step for one in deltas]
        columns = -(-sum(ranks) // native.LANES) * native.LANES
        a = torch.zeros(columns, self.k_size, dtype=self.dtype)
        parts, first = [], 0
        for one, rank, width in zip(deltas, ranks, self._widths.tolist(), strict=True):
            if one is not None:
                a[first : first + one.a.shape[0]] = one.a
                b = torch.zeros(rank, width, dtype=self.dtype)
                b[: one.b.shape[0]] = one.b
                parts.append(self._packed(b).view(-1))
            first += rank
        held = self._packed(a.t()), torch.cat(parts) if parts else a
        self._held[slot], self._columns[slot] = held, columns
        self._ranks[slot] = torch.tensor(ranks, dtype=torch.int32)
        self._slots[slot] = torch.tensor([held[0].data_ptr(), held[1].data_ptr(), columns])
        return True

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
            *(x.data_ptr(), x.stride(0), self.k_size, len(self._widths)),
            *(self._widths.data_ptr(), self._slots.data_ptr(), self._ranks.data_ptr()),
            *(tiles.data_ptr(), len(tiles), slots.data_ptr(), weights.data_ptr(), most, height, members),
        )
        return True

    def _packed(self, weights: Tensor) -> Tensor:
        """[k, n] as [n / LANES, k / step, LANES, step]."""
        k, n = weights.shape
        panels = weights.reshape(k // self._step, self._step, n // native.LANES, native.LANES)
        return panels.permute(2, 0, 3, 1).contiguous()


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
