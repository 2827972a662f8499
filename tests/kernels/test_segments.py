"""Routing: every row lands exactly once."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from loramill.kernels.segments import BASE_SLOT, Segment, segments_of, tiles_of

runs = st.lists(st.tuples(st.integers(BASE_SLOT, 6), st.integers(0, 40)), max_size=20)


def test_adjacent_runs_of_a_slot_become_one_segment() -> None:
    assert segments_of([(BASE_SLOT, 2), (0, 3), (0, 0), (0, 1), (2, 5), (BASE_SLOT, 1), (2, 1)]) == [
        Segment(2, 6, 0),
        Segment(6, 11, 2),
        Segment(12, 13, 2),
    ]


@given(runs)
def test_segments_cover_each_adapter_row_once(mix: list[tuple[int, int]]) -> None:
    slot_of_row = [slot for slot, rows in mix for _ in range(rows)]
    routed = [BASE_SLOT] * len(slot_of_row)
    for start, end, slot in segments_of(mix):
        assert start < end
        for row in range(start, end):
            assert routed[row] == BASE_SLOT, "a row in two segments"
            routed[row] = slot
    assert routed == slot_of_row


@given(runs, st.integers(1, 33))
def test_tiles_place_each_row_once_in_a_tile_of_its_slot(mix: list[tuple[int, int]], height: int) -> None:
    segments = segments_of(mix)
    tiles = tiles_of(segments, height)
    slot_of_row = {row: s.slot for s in segments for row in range(s.start, s.end)}
    assert len(tiles.gather) == height * len(tiles.slots)
    assert sorted(tiles.rows) == sorted(slot_of_row)
    assert len(set(tiles.places)) == len(tiles.places)
    for row, place in zip(tiles.rows, tiles.places, strict=True):
        assert tiles.gather[place] == row
        assert tiles.slots[place // height] == slot_of_row[row]
    # Padding reads a row of the tile's own segment, so it can never bring a neighbour's NaN in.
    assert all(slot_of_row[row] == tiles.slots[place // height] for place, row in enumerate(tiles.gather))


def test_height_must_be_positive() -> None:
    with pytest.raises(ValueError, match="height"):
        tiles_of([Segment(0, 1, 0)], 0)
