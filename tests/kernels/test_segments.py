"""Routing: every row lands exactly once."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from loramill.kernels.mixes import Mix, only
from loramill.kernels.segments import Segment, segments_of, tiles_of

mixes = st.sampled_from([(), only(0), only(1), only(2), ((0, 0.5),), ((0, 1.0), (1, 1.0)), ((1, 2.0), (0, 1.0))])
runs = st.lists(st.tuples(mixes, st.integers(0, 40)), max_size=20)


def test_adjacent_runs_of_a_mix_become_one_segment_a_member() -> None:
    both: Mix = ((0, 0.5), (2, 2.0))
    assert segments_of([((), 2), (only(0), 3), (only(0), 0), (only(0), 1), (both, 5), ((), 1), (only(2), 1)]) == [
        Segment(2, 6, 0),
        Segment(6, 11, 0, 0.5),
        Segment(6, 11, 2, 2.0),
        Segment(12, 13, 2),
    ]


def routes(mix_of_run: list[tuple[Mix, int]]) -> list[Mix]:
    return [mix for mix, rows in mix_of_run for _ in range(rows)]


@given(runs)
def test_segments_cover_each_row_once_for_each_member_of_its_mix(given_runs: list[tuple[Mix, int]]) -> None:
    wanted = routes(given_runs)
    routed: list[Mix] = [()] * len(wanted)
    for start, end, slot, weight in segments_of(given_runs):
        assert start < end
        for row in range(start, end):
            routed[row] = (*routed[row], (slot, weight))
    assert routed == wanted


@given(runs, st.integers(1, 33))
def test_tiles_place_each_row_once_a_segment_in_a_tile_of_its_slot(
    given_runs: list[tuple[Mix, int]], height: int
) -> None:
    tiles = tiles_of(segments_of(given_runs), height)
    assert len(tiles.gather) == height * len(tiles.slots)
    assert len(set(tiles.places)) == len(tiles.places)
    found = []
    for row, place in zip(tiles.rows, tiles.places, strict=True):
        assert tiles.gather[place] == row
        found.append((row, tiles.slots[place // height], tiles.weights[place // height]))
    assert sorted(found) == sorted((row, *member) for row, mix in enumerate(routes(given_runs)) for member in mix)
    # Padding reads a row of the tile's own segment, so it can never bring a neighbour's NaN in.
    for place, row in enumerate(tiles.gather):
        assert (row, tiles.slots[place // height], tiles.weights[place // height]) in found


def test_height_must_be_positive() -> None:
    with pytest.raises(ValueError, match="height"):
        tiles_of([Segment(0, 1, 0)], 0)
