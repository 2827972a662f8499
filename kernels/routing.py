"""Device routing: which tile of rows goes through which mix of adapters, in arrays of a fixed size.

Sizes depend on the most rows and the most mixes of a pass, never on how many adapters are present, so that one CUDA
graph serves every combination; excess tiles leave at once. Built from host lists (checked) or on the device from a
tensor (only fixed shapes and no reading back, so a graph can capture it). Idea: block-aligned routing, as MoE kernels
and SGLang's LoRA kernels have it; here rows keep their places and tiles point to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramill.kernels.blocks import HEIGHTS
from loramill.kernels.mixes import BASE_MIX, Mix, tile_capacity, tile_rows


@dataclass(slots=True, frozen=True)
class Mixes:
    """A table of mixes on the device: `slots` and `weights` [mixes, members], and `members` [mixes], 0 where unused."""

    slots: Tensor
    weights: Tensor
    members: Tensor
    single: tuple[int, ...] | None = None
    """The slot of each mix where the host knows that every one is a single slot with weight 1."""
    below: int | None = None
    """The number of slots that the mixes were checked against."""

    @classmethod
    def of(
        cls,
        mixes: Sequence[Mix],
        slots: int,
        device: torch.device,
        *,
        capacity: int | None = None,
        members: int | None = None,
    ) -> Mixes:
        """The table of `mixes`, with room for `capacity` mixes of `members` slots (as many as given by default).

        Raises:
            ValueError: a slot is out of range or twice in a mix, a weight is not finite, or there is no room. This is
                where slots are checked: the kernels cannot.
        """
        capacity = max(1, len(mixes)) if capacity is None else capacity
        width = members or max([1, *map(len, mixes)])
        if len(mixes) > capacity:
            raise ValueError(f"mixes must be at most {capacity}, the capacity, not {len(mixes)}")
        for number, mix in enumerate(mixes):
            named = [slot for slot, _ in mix]
            if len(mix) > width or len(set(named)) < len(named):
                raise ValueError(f"mixes[{number}] must name at most {width} different slots, not {named}")
            for slot, weight in mix:
                if not 0 <= slot < slots:
                    raise ValueError(f"mixes[{number}] must name slots from 0 to {slots - 1}, not {slot}")
                if not abs(weight) < float("inf"):
                    raise ValueError(f"mixes[{number}] must have finite weights, not {weight}")
        empty: list[Mix] = [()] * (capacity - len(mixes))
        table = [list(mix) + [(0, 0.0)] * (width - len(mix)) for mix in (*mixes, *empty)]
        alone = all(len(mix) == 1 and mix[0][1] == 1.0 for mix in mixes)
        return cls(
            _there([[s for s, _ in row] for row in table], torch.int32, device).view(-1, width),
            _there([[w for _, w in row] for row in table], torch.float32, device).view(-1, width),
            _there([len(mix) for mix in (*mixes, *empty)], torch.int32, device),
            tuple(mix[0][0] for mix in mixes) if alone else None,
            slots,
        )

    def copy_(self, other: Mixes) -> None:
        """Take another table of the same capacity into these tensors, which a captured graph reads."""
        if self.slots.shape != other.slots.shape:
            raise ValueError(f"other must hold {tuple(self.slots.shape)} mixes, not {tuple(other.slots.shape)}")
        if self.below is not None and other.below is not None and other.below > self.below:
            raise ValueError(f"other must be for {self.below} slots or fewer, as this table is, not {other.below}")
        self.slots.copy_(other.slots)
        self.weights.copy_(other.weights)
        self.members.copy_(other.members)


@dataclass(slots=True, frozen=True)
class TileRouting:
    """Where the T rows of one pass go; made once and shared by every projection of every layer. All int32."""

    height: int
    mixes: Mixes
    mix_of_row: Tensor
    """[T]; BASE_MIX for rows of the base."""
    order: Tensor
    """[T] the rows sorted by mix; see RowTiles, as for the tiles' three arrays [capacity]."""
    tile_mix: Tensor
    tile_start: Tensor
    tile_rows: Tensor
    alone: int | None = None
    """The one slot that every row goes through with weight 1, where the host knows that it is so."""

    def arguments(self) -> dict[str, Tensor | int]:
        """What kernels are given of it, by their names in every kernel."""
        return {
            "order": self.order,
            "mix_of_row": self.mix_of_row,
            "tile_mix": self.tile_mix,
            "tile_start": self.tile_start,
            "tile_rows": self.tile_rows,
            "mix_slots": self.mixes.slots,
            "mix_weights": self.mixes.weights,
            "mix_members": self.mixes.members,
            "members": self.mixes.slots.shape[1],
        }

    @property
    def rows(self) -> int:
        return self.order.shape[0]

    @property
    def tiles(self) -> int:
        return self.tile_mix.shape[0]


def route_host(mix_of_row: Sequence[int], mixes: Mixes, height: int) -> TileRouting:
    """Route rows by a list that the host knows, checking it.

    Raises:
        ValueError: `height` is not one of HEIGHTS, or a row's mix is not in the table.
    """
    _check_height(height)
    tiles = tile_rows(mix_of_row, mixes.members.shape[0], height)
    if mixes.single is not None and any(mix >= len(mixes.single) for mix in mix_of_row):
        raise ValueError(f"mix_of_row must hold mixes below {len(mixes.single)}, the ones given")
    used = set(mix_of_row)
    alone = mixes.single[used.pop()] if mixes.single and len(used) == 1 and BASE_MIX not in used else None

    def on_device(numbers: Sequence[int]) -> Tensor:
        return _there(numbers, torch.int32, mixes.slots.device)

    return TileRouting(
        height,
        mixes,
        on_device(mix_of_row),
        on_device(tiles.order),
        on_device(tiles.mix),
        on_device(tiles.start),
        on_device(tiles.rows),
        alone,
    )


def route_device(mix_of_row: Tensor, mixes: Mixes, height: int) -> TileRouting:
    """Route rows by a tensor [T] int32 on the device, without reading it back: a CUDA graph can capture this.

    Numbers that are no mix of the table count as the base.

    Raises:
        ValueError: `height` is not one of HEIGHTS, or `mix_of_row` is not int32 [T] on the table's device.
    """
    _check_height(height)
    device = mixes.slots.device
    if mix_of_row.ndim != 1 or mix_of_row.dtype is not torch.int32 or mix_of_row.device != device:
        raise ValueError(
            f"mix_of_row must be [T] int32 on {device}, "
            f"not {tuple(mix_of_row.shape)} {mix_of_row.dtype} on {mix_of_row.device}"
        )
    capacity = mixes.members.shape[0]
    known = (mix_of_row >= 0) & (mix_of_row < capacity)
    mix_of_row = torch.where(known, mix_of_row, BASE_MIX)
    in_order, order = torch.sort(mix_of_row, stable=True)
    numbers = torch.arange(capacity, dtype=torch.int32, device=device)
    start = torch.searchsorted(in_order, numbers)
    end = torch.searchsorted(in_order, numbers, right=True)
    tiles_of_mix = (end - start + height - 1) // height
    last_tile = torch.cumsum(tiles_of_mix, 0)
    tile = torch.arange(tile_capacity(mix_of_row.shape[0], capacity, height), device=device)
    mix = torch.searchsorted(last_tile, tile, right=True)
    used = mix < capacity
    mix = mix.clamp(max=capacity - 1)
    first = start[mix] + (tile - last_tile[mix] + tiles_of_mix[mix]) * height
    rows = (end[mix] - first).clamp(max=height)
    return TileRouting(
        height,
        mixes,
        mix_of_row,
        order.int(),
        torch.where(used, mix, BASE_MIX).int(),
        torch.where(used, first, 0).int(),
        torch.where(used, rows, 0).int(),
    )


def _there(numbers: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Not at once onto the device: that would wait for all that it still has to do.
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def _check_height(height: int) -> None:
    if height not in HEIGHTS:
        raise ValueError(f"height must be one of {HEIGHTS}, not {height}")
