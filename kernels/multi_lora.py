"""The multi-LoRA operator: one packed batch, each row through its own adapter.

Semantics, for row t of adapter slot s and sibling projections i that read the same input:

    y[t, columns of i] += w * B[s][:, columns of i].T @ (A[s, i] @ x[t])    rows outside every segment stay as they are

with the weight w of the segment; a row in several segments gets the sum.

Shapes: x [T, K], y [T, N] with N the sum of the widths, A [S, siblings, R, K], B [S, R, N] whose columns are the
siblings' side by side. A and B are zero beyond an adapter's own rank (only the forms below read them there), and the
adapter's scale is folded into B. Formula: LoRA (2106.09685); batching many adapters by segments: Punica (2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from loramill.kernels.check import LiveRanks, check_mixes, check_operands
from loramill.kernels.native_lora import NativeTiles, native_tiles
from loramill.kernels.plan import Plan
from loramill.kernels.routing import TileRouting
from loramill.kernels.segments import Segment, Tiles, tiles_of
from loramill.kernels.torch_forms import multi_lora_torch

SEGMENT_ROWS = 48
"""Mean rows per segment from which a GEMM per segment beats padded tiles.

Measured on two AVX512-BF16 cores, bfloat16, K and N of a 100M-parameter Qwen2, rank 16, 8 Zipf segments (µs for one
qkv projection; all-slots is one GEMM against every slot's A, masked, then one against every B):
128 rows: tiles of 16 379, all-slots 716, segments 875; 1024 rows: 1710, 5069, 1491; 4096 rows: 13005, 19560, 4006.
"""

SINGLE_ROWS = 64
"""Rows from which one adapter alone on a device is plain products: below, they would be more launches. Not measured."""

SMALL_TILE, TILE = 8, 16
"""Tile heights: the small one where segments average under 16 rows (103 rows over 8 Zipf slots: equal but for
down_proj, 253 µs against 314; 25 rows: 855 a layer against 1039)."""


class Routing:
    """Where the rows of one forward pass go; made once per pass and shared by every projection of every layer."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = list(segments)
        self.device = device
        self._native: NativeTiles | None = None
        self.rows_end = max((s.end for s in self.segments), default=0)
        self.slots_used = {s.slot for s in self.segments}
        rows = sum(s.end - s.start for s in self.segments)
        self.mean = rows / len(self.segments) if self.segments else 0.0
        self.by_segment = self.mean >= SEGMENT_ROWS or len(self.segments) == 1

    def native(self, rows: int) -> NativeTiles:
        """How the C++ form cuts a pass of so many rows."""
        if self._native is None:
            self._native = native_tiles(self.segments, rows)
        return self._native

    @cached_property
    def tiles(self) -> PaddedTiles:
        """How the form in torch cuts it where segments are short."""
        return PaddedTiles(tiles_of(self.segments, TILE if self.mean >= TILE else SMALL_TILE), self.device)


class PaddedTiles:
    """Tiles as index tensors."""

    def __init__(self, tiles: Tiles, device: torch.device) -> None:
        self.height = tiles.height
        self.gather = torch.tensor(tiles.gather, device=device)
        self.places = torch.tensor(tiles.places, device=device)
        # In a batch sorted by slot the routed rows are one stretch, and adding to it takes half of the time that
        # adding to listed rows does (103 rows of gate_up: 609 µs in all against 1403).
        first, last = tiles.rows[0], tiles.rows[-1]
        self.span = slice(first, last + 1) if tiles.rows == list(range(first, last + 1)) else None
        self.rows = torch.tensor(tiles.rows, device=device)
        self.slots = tuple(tiles.slots)
        weighted = any(weight != 1.0 for weight in tiles.weights)
        self.weights = torch.tensor(tiles.weights, device=device)[:, None, None] if weighted else None


class TileWeights:
    """A projection's adapter weights in the order of a pass's tiles, kept for the next pass.

    At decode the tiles stay the same for many steps, and gathering their weights takes longer than multiplying with
    them (128 rows over 16 Zipf slots, two cores: 10 ms of a 23 ms difference to no LoRA). Holds what the tiles read:
    an adapter's weights once for each of its tiles.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._kept: tuple[Tensor, list[Tensor]] | None = None

    def of(
        self, a: Tensor, b: Tensor, widths: Sequence[int], ranks: LiveRanks, tiles: PaddedTiles
    ) -> tuple[Tensor, list[Tensor]]:
        """`a` [tiles, siblings * rank, K] and each sibling's `b` [tiles, rank, width], rank the largest live one."""
        key = (tiles.slots, ranks.version)
        if self._kept is None or key != self._key:
            rank = max(max(ranks[slot]) for slot in tiles.slots)
            slots = torch.tensor(tiles.slots, device=a.device)
            siblings, k = a.shape[1], a.shape[3]
            shrink = a[:, :, :rank].index_select(0, slots).view(-1, siblings * rank, k)
            expand = [part.index_select(0, slots) for part in b[:, :rank].split(list(widths), 2)]
            self._key, self._kept = key, (shrink, expand)
        return self._kept


def multi_lora(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    widths: Sequence[int],
    ranks: LiveRanks,
    routing: Routing | TileRouting,
    plan: Plan | None = None,
    kept: TileWeights | None = None,
) -> None:
    """Add each routed row's adapter delta to `y` in place; shapes and formula at the head of this module.

    `widths` are the siblings' columns of `y` and `b`, side by side. `ranks` holds the live rank of each sibling in a
    slot, 0 where the adapter leaves it alone. A device takes a TileRouting, and `plan` instead of its own if given; a
    CPU takes either routing, the plain one being the faster and a TileRouting the one with mixes. `kept` is this
    projection's own, handed in at every pass.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; the message names it.
    """
    check_operands(y, x, a, b, ranks, widths, routing.rows if isinstance(routing, TileRouting) else x.shape[0])
    if isinstance(routing, TileRouting):
        check_mixes(routing.mixes.below, ranks)
        _by_tiles(y, x, a, b, widths, ranks, routing, plan)
        return
    if y.device.type != "cpu":
        raise ValueError(f"routing must be a TileRouting for tensors on {y.device}")
    if not all(0 <= slot < len(ranks) for slot in routing.slots_used):
        raise ValueError(f"routing must name slots from 0 to {len(ranks) - 1}, not {sorted(routing.slots_used)}")
    if routing.rows_end > x.shape[0]:
        raise ValueError(f"routing must end within the {x.shape[0]} rows of x, not at {routing.rows_end}")
    live = [s for s in routing.segments if any(ranks[s.slot])]
    if not live:
        return
    if routing.by_segment:
        for segment in live:
            _one_segment(y, x, a, b, widths, ranks[segment.slot], segment)
    else:
        shrink, expand = (kept or TileWeights()).of(a, b, widths, ranks, routing.tiles)
        _tiled(y, x, shrink, expand, routing.tiles)


def _by_tiles(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    widths: Sequence[int],
    ranks: LiveRanks,
    routing: TileRouting,
    plan: Plan | None,
) -> None:
    if not y.is_cuda:
        multi_lora_torch(y, x, a, b, widths, ranks, routing)
    elif routing.alone is not None and routing.rows >= SINGLE_ROWS:
        _one_segment(y, x, a, b, widths, ranks[routing.alone], Segment(0, routing.rows, routing.alone))
    else:
        from loramill.kernels.on_device import plan_of, run

        run(y, x, a, b, widths, ranks, routing, plan_of(y.device) if plan is None else plan)


def _one_segment(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, widths: Sequence[int], ranks: Sequence[int], segment: Segment
) -> None:
    start, end, slot, weight = segment
    # One shrink for all siblings, at the largest live rank among them: rank 8 never pays for a neighbour's 64.
    rank = max(ranks)
    shrunk = x[start:end] @ a[slot, :, :rank].reshape(-1, a.shape[-1]).t()
    column = 0
    for i, width in enumerate(widths):
        if ranks[i]:
            v = shrunk[:, i * rank : i * rank + ranks[i]]
            y[start:end, column : column + width].addmm_(v, b[slot, : ranks[i], column : column + width], alpha=weight)
        column += width


def _tiled(y: Tensor, x: Tensor, a: Tensor, b: Sequence[Tensor], cut: PaddedTiles) -> None:
    tiles = x.index_select(0, cut.gather).view(-1, cut.height, x.shape[1])
    shrunk = torch.bmm(tiles, a.transpose(1, 2))
    if cut.weights is not None:
        shrunk *= cut.weights
    rank = a.shape[1] // len(b)
    parts = [torch.bmm(shrunk[:, :, i * rank : (i + 1) * rank], part) for i, part in enumerate(b)]
    delta = (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).view(-1, y.shape[1]).index_select(0, cut.places)
    if cut.span is not None:
        y[cut.span] += delta
    else:
        y.index_add_(0, cut.rows, delta)


def multi_lora_reference(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, widths: Sequence[int], segments: Sequence[Segment]
) -> None:
    """The formula, written out row by row in float64: what the other forms are tested against."""
    for start, end, slot, weight in segments:
        for row in range(start, end):
            column = 0
            for i, width in enumerate(widths):
                part = b[slot, :, column : column + width]
                delta = weight * part.double().t() @ (a[slot, i].double() @ x[row].double())
                y[row, column : column + width] += delta.to(y.dtype)
                column += width
