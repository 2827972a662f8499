"""Routing: which rows of a packed batch belong to which adapter slot. Pure: no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

BASE_SLOT = -1
"""The slot of rows that no adapter touches."""


class Segment(NamedTuple):
    """Rows `start` to `end` (exclusive) of the batch, all of adapter slot `slot`."""

    start: int
    end: int
    slot: int


def segments_of(runs: Iterable[tuple[int, int]]) -> list[Segment]:
    """Merge consecutive `(slot, rows)` runs into segments, leaving out the base model's rows and empty runs.

    A batch sorted by slot has one segment per adapter; an unsorted one is still routed right, in more pieces.
    """
    segments: list[Segment] = []
    start = 0
    for slot, rows in runs:
        end = start + rows
        if rows and slot != BASE_SLOT:
            if segments and segments[-1].slot == slot and segments[-1].end == start:
                segments[-1] = Segment(segments[-1].start, end, slot)
            else:
                segments.append(Segment(start, end, slot))
        start = end
    return segments


@dataclass(slots=True, frozen=True)
class Tiles:
    """Segments cut into tiles of `height` rows, the last one of each segment padded.

    `gather[t * height + i]` is the batch row at place `i` of tile `t` (a padded place repeats the segment's last
    row), `rows[j]` the batch row that place `places[j]` answers, each routed row once; `slots[t]` is tile `t`'s slot.
    """

    height: int
    gather: list[int]
    places: list[int]
    rows: list[int]
    slots: list[int]


def tiles_of(segments: Iterable[Segment], height: int) -> Tiles:
    """Cut segments into tiles: each routed row lands in exactly one place.

    Raises:
        ValueError: `height` is not positive.
    """
    if height < 1:
        raise ValueError(f"height must be at least 1, not {height}")
    gather: list[int] = []
    places: list[int] = []
    rows: list[int] = []
    slots: list[int] = []
    for start, end, slot in segments:
        for first in range(start, end, height):
            last = min(first + height, end)
            places.extend(range(len(gather), len(gather) + last - first))
            rows.extend(range(first, last))
            gather.extend(range(first, last))
            gather.extend([last - 1] * (height - (last - first)))
            slots.append(slot)
    return Tiles(height, gather, places, rows, slots)
