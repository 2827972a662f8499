"""Routing by mixes: each row lands exactly once, in room that any combination fits, on host and device alike."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from loramill.kernels.blocks import HEIGHTS
from loramill.kernels.mixes import BASE_MIX, number_mixes, tile_capacity, tile_rows
from loramill.kernels.routing import Mixes, route_device, route_host

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXES = 9
rows_of_mixes = st.one_of(
    st.lists(st.integers(BASE_MIX, MIXES - 1), max_size=300),
    st.lists(st.tuples(st.integers(BASE_MIX, MIXES - 1), st.integers(0, 150)), max_size=6).map(
        lambda runs: [mix for mix, rows in runs for _ in range(rows)]
    ),
)


@given(rows_of_mixes, st.integers(1, 130))
def test_each_row_lands_exactly_once(mix_of_row: list[int], height: int) -> None:
    tiles = tile_rows(mix_of_row, MIXES, height)
    assert len(tiles.mix) == len(tiles.start) == len(tiles.rows) == tile_capacity(len(mix_of_row), MIXES, height)
    landed = []
    for mix, start, rows in zip(tiles.mix, tiles.start, tiles.rows, strict=True):
        assert rows <= height
        assert (mix == BASE_MIX) == (rows == 0), "an excess tile has no rows and no other is empty"
        placed = tiles.order[start : start + rows]
        assert all(mix_of_row[row] == mix for row in placed)
        assert placed == sorted(placed), "rows of a mix stay in order"
        landed += placed
    assert sorted(landed) == [row for row, mix in enumerate(mix_of_row) if mix != BASE_MIX]


@given(rows_of_mixes, st.sampled_from(HEIGHTS))
def test_the_device_routes_as_the_host_does(mix_of_row: list[int], height: int) -> None:
    mixes = Mixes.of([((slot, 1.0),) for slot in range(MIXES)], MIXES, DEVICE)
    host = route_host(mix_of_row, mixes, height)
    device = route_device(torch.tensor(mix_of_row, dtype=torch.int32, device=DEVICE), mixes, height)
    for name in ("mix_of_row", "order", "tile_mix", "tile_start", "tile_rows"):
        ours, theirs = getattr(host, name), getattr(device, name)
        assert ours.dtype == theirs.dtype == torch.int32
        assert torch.equal(ours, theirs), name


@given(st.integers(0, 500), st.integers(1, 40), st.sampled_from(HEIGHTS))
def test_the_capacity_is_tight(rows: int, mixes: int, height: int) -> None:
    capacity = tile_capacity(rows, mixes, height)
    # The worst there is: as many mixes of one row as there are, the others all in one.
    spread = [min(row, mixes - 1) for row in range(rows)]
    needed = sum(mix != BASE_MIX for mix in tile_rows(spread, mixes, height).mix)
    assert needed <= capacity <= needed + min(rows, mixes)
    if rows <= mixes:
        assert capacity == rows


def test_numbers_that_are_no_mix_are_the_base_on_the_device() -> None:
    mixes = Mixes.of([((0, 1.0),)], 1, DEVICE)
    routing = route_device(torch.tensor([0, 7, -5, 0], dtype=torch.int32, device=DEVICE), mixes, 16)
    assert routing.mix_of_row.tolist() == [0, -1, -1, 0]
    assert routing.tile_rows.tolist() == [2]


def test_mixes_are_numbered_by_first_use() -> None:
    one, two = ((3, 1.0),), ((3, 0.5), (1, 0.5))
    assert number_mixes([two, (), one, two]) == ([0, BASE_MIX, 1, 0], [two, one])


def test_one_adapter_alone_is_seen() -> None:
    mixes = Mixes.of([((4, 1.0),), ((2, 1.0),)], 5, DEVICE)
    assert route_host([1, 1], mixes, 16).alone == 2
    assert route_host([1, 0], mixes, 16).alone is None
    assert route_host([1, BASE_MIX], mixes, 16).alone is None
    assert route_host([0], Mixes.of([((4, 0.5),)], 5, DEVICE), 16).alone is None


@pytest.mark.parametrize(
    ("mixes", "message"),
    [
        ([((5, 1.0),)], r"slots from 0 to 4, not 5"),
        ([((0, 1.0),), ((-1, 1.0),)], r"mixes\[1\] must name slots"),
        ([((0, 1.0), (0, 1.0))], "different slots"),
        ([((0, 1.0), (1, 1.0), (2, 1.0))], "at most 2"),
        ([((0, float("nan")),)], "finite"),
        ([((0, 1.0),)] * 4, "at most 3"),
    ],
)
def test_mixes_that_do_not_fit_are_named(mixes: list[tuple[tuple[int, float], ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixes.of(mixes, 5, DEVICE, capacity=3, members=2)


def test_rows_that_do_not_fit_are_named() -> None:
    mixes = Mixes.of([((0, 1.0),)], 1, DEVICE)
    with pytest.raises(ValueError, match="mix_of_row must hold"):
        route_host([0, 1], mixes, 16)
    with pytest.raises(ValueError, match="height must be one of"):
        route_host([0], mixes, 17)
    with pytest.raises(ValueError, match="mix_of_row must be"):
        route_device(torch.zeros(3, dtype=torch.int64, device=DEVICE), mixes, 16)
