"""Routing: which rows of a packed batch go through which adapter slots. Pure: no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from loramill.kernels.mixes import Mix


class Segment(NamedTuple):
    """Rows `start` to `end` (exclusive) of the batch, all through adapter slot `slot`, its delta times `weight`."""

    start: int
    end: int
    slot: int
    weight: float = 1.0


def segments_of(runs: Iterable[tuple[Mix, int]]) -> list[Segment]:
    """Merge consecutive `(mix, rows)` runs into segments, one for each member of a mix; the base's mix () has none.

    A batch sorted by mix has one run per mix; an unsorted one is still routed right, in more pieces.
    """
    segments: list[Segment] = []
    start = end = 0
    current: Mix = ()
    for mix, rows in (*runs, ((), 1)):
        if rows and mix != current:
            segments.extend(Segment(start, end, slot, weight) for slot, weight in current)
            start, current = end, mix
        end += rows
    return segments


@dataclass(slots=True, frozen=True)
class Tiles:
    """Segments cut into tiles of `height` rows, the last one of each segment padded.

    `gather[t * height + i]` is the batch row at place `i` of tile `t` (a padded place repeats the segment's last
    row), `rows[j]` the batch row that place `places[j]` answers: each row once for every segment that it is in;
    `slots[t]` and `weights[t]` are those of tile `t`'s segment.
    """

    height: int
    gather: list[int]
    places: list[int]
    rows: list[int]
    slots: list[int]
    weights: list[float]


def tiles_of(segments: Iterable[Segment], height: int) -> Tiles:
    """Cut segments into tiles: each row of each segment lands in exactly one place.

    Raises:
        ValueError: `height` is not positive.
    """
    if height < 1:
        raise ValueError(f"height must be at least 1, not {height}")
    gather: list[int] = []
    places: list[int] = []
    rows: list[int] = []
    slots: list[int] = []
    weights: list[float] = []
    for start, end, slot, weight in segments:
        for first in range(start, end, height):
            last = min(first + height, end)
            places.extend(range(len(gather), len(gather) + last - first))
            rows.extend(range(first, last))
            gather.extend(range(first, last))
            gather.extend([last - 1] * (height - (last - first)))
            slots.append(slot)
            weights.append(weight)
    return Tiles(height, gather, places, rows, slots, weights)
