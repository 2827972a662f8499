"""What rows ask for: a mix of adapter slots. Pure: no torch.

A *mix* is a short list of (slot, weight); one adapter is a mix of one with weight 1. Rows are routed by the number of
their mix, and rows of the base model carry BASE_MIX. Rows of one mix are cut into tiles of a fixed height.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BASE_MIX = -1
"""The mix of rows that no adapter touches."""

Mix = tuple[tuple[int, float], ...]
"""The slots that a row goes through, each with its weight; () is the base's."""


def only(slot: int) -> Mix:
    """One slot, whole."""
    return ((slot, 1.0),)


@dataclass(slots=True, frozen=True)
class RowTiles:
    """Rows sorted by mix (stable; the base's rows first) and cut into tiles of one mix each.

    Tile t holds the rows `order[start[t] : start[t] + rows[t]]`, all of mix `mix[t]`. Excess tiles, up to the
    capacity, have mix BASE_MIX and no rows.
    """

    order: list[int]
    mix: list[int]
    start: list[int]
    rows: list[int]


def tile_capacity(rows: int, mixes: int, height: int) -> int:
    """The most tiles that any assignment of `rows` rows to `mixes` mixes can need; nothing else bounds a launch.

    A mix of n rows takes (n + height - 1) // height tiles, so m mixes in use take at most (rows + m (height - 1)) //
    height of them, and never more than there are rows.
    """
    used = min(rows, mixes)
    return min(rows, (rows + used * (height - 1)) // height)


def number_mixes(wanted: Sequence[Mix]) -> tuple[list[int], list[Mix]]:
    """The mix number of each row, and the different mixes in order of first use; an empty mix is the base."""
    numbers: dict[Mix, int] = {}
    of_row = [numbers.setdefault(mix, len(numbers)) if mix else BASE_MIX for mix in wanted]
    return of_row, list(numbers)


def tile_rows(mix_of_row: Sequence[int], mixes: int, height: int) -> RowTiles:
    """Cut rows into tiles: each row of a mix lands in exactly one, rows of the base in none.

    Raises:
        ValueError: `height` is not positive, or a row's mix is neither BASE_MIX nor below `mixes`.
    """
    if height < 1:
        raise ValueError(f"height must be at least 1, not {height}")
    outside = next((mix for mix in mix_of_row if not BASE_MIX <= mix < mixes), None)
    if outside is not None:
        raise ValueError(f"mix_of_row must hold {BASE_MIX} (the base) or a mix below {mixes}, not {outside}")
    order = sorted(range(len(mix_of_row)), key=mix_of_row.__getitem__)
    counts = [0] * mixes
    for mix in mix_of_row:
        if mix != BASE_MIX:
            counts[mix] += 1
    tiles = RowTiles(order, [], [], [])
    first = len(mix_of_row) - sum(counts)
    for mix, count in enumerate(counts):
        for done in range(0, count, height):
            tiles.mix.append(mix)
            tiles.start.append(first + done)
            tiles.rows.append(min(height, count - done))
        first += count
    excess = tile_capacity(len(mix_of_row), mixes, height) - len(tiles.mix)
    tiles.mix.extend([BASE_MIX] * excess)
    tiles.start.extend([0] * excess)
    tiles.rows.extend([0] * excess)
    return tiles
