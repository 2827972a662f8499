"""The Triton kernels' values against the formula in float64: on the device, or in Triton's interpreter without one."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from loramill.kernels.blocks import expand_blocks, shrink_blocks
from loramill.kernels.bridge import Bridge
from loramill.kernels.expand import expand, expand_reference
from loramill.kernels.mixes import Mix, number_mixes
from loramill.kernels.routing import Mixes, TileRouting, route_host
from loramill.kernels.rows import row_expand, row_shrink
from loramill.kernels.shrink import shrink, shrink_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""||out - ref|| / ||ref||: about one rounding of the output, and sums in float32."""
SLOTS = 5
RANKS = [[64, 64, 64], [8, 8, 8], [1, 3, 40], [0, 16, 0], [128, 5, 0]]
"""Live rank of each sibling in each slot: 1 to 128, mixed within a batch."""


def of(*slots: int) -> Mix:
    return tuple((slot, 1.0) for slot in slots)


def popular(rows: int, kind: str) -> list[Mix]:
    """A slot for each row, or the base, by a popularity."""
    draw = random.Random(rows)
    if kind == "identical":
        return [of(2)] * rows
    if kind == "distinct":
        return [of(row % SLOTS) for row in range(rows)]
    if kind == "skewed":
        return [of(0) if row % 16 else of(1 + row % 4) for row in range(rows)]
    weights = [1.0] * SLOTS if kind == "uniform" else [1 / (rank + 1) for rank in range(SLOTS)]
    return [of(slot) for slot in draw.choices(range(SLOTS), weights, k=rows)]


MIXED: list[Mix] = [((0, 0.5), (4, -1.5)), of(1), (), ((3, 1.0), (2, 0.25), (1, 2.0)), (), of(3), ((0, 0.5), (4, -1.5))]
BATCHES: dict[str, list[Mix]] = {
    "one row": [of(1)],
    "one row of the base": [()],
    **{f"{kind} {rows}": popular(rows, kind) for kind, rows in [("uniform", 15), ("zipf", 63), ("skewed", 17)]},
    **{f"{kind} 33": popular(33, kind) for kind in ("identical", "distinct")},
    "mixes": MIXED * 3,
    "base among them": popular(20, "zipf") + [()] * 20 + popular(3, "uniform"),
}


@dataclass(slots=True, frozen=True)
class Case:
    x: Tensor
    base: Tensor
    a: Tensor
    b: Tensor
    ranks: Tensor
    widths: tuple[int, ...]
    mixes: list[Mix]
    expected: Tensor

    def error(self, y: Tensor) -> float:
        """The relative error, once what must not change has been seen not to have changed."""
        base_rows = torch.tensor([not mix for mix in self.mixes], device=y.device)
        assert torch.equal(y[base_rows], self.base[base_rows]), "rows of the base must stay bit for bit"
        return float((y.double() - self.expected).norm() / self.expected.norm())


def strided(values: Tensor) -> Tensor:
    """The same rows with NaN between them."""
    wide = values.new_full((values.shape[0], values.shape[1] + 16), float("nan"))
    wide[:, : values.shape[1]] = values
    return wide[:, : values.shape[1]]


def make(mixes: list[Mix], dtype: torch.dtype, k: int = 80, widths: tuple[int, ...] = (96, 32, 32)) -> Case:
    """Random weights, NaN above each live rank; x and y are strided, with NaN between their rows."""
    generator = torch.Generator().manual_seed(len(mixes))
    siblings, rank = len(widths), max(max(ranks[: len(widths)]) for ranks in RANKS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    a, b = normal(SLOTS, siblings, rank, k), normal(SLOTS, rank, sum(widths))
    ranks = torch.tensor([slot[:siblings] for slot in RANKS], dtype=torch.int32, device=DEVICE)
    x, base = normal(len(mixes), k), normal(len(mixes), sum(widths))
    expected = base.double()
    for row, mix in enumerate(mixes):
        for slot, weight in mix:
            only = torch.tensor([slot], device=DEVICE)
            v = shrink_reference(x[row : row + 1], a, ranks, only)
            expected[row] += weight * expand_reference(v, b, widths, only)[0]
    column = 0
    for i, width in enumerate(widths):
        for slot in range(SLOTS):
            a[slot, i, RANKS[slot][i] :] = float("nan")
            b[slot, RANKS[slot][i] :, column : column + width] = float("nan")
        column += width
    return Case(strided(x), base, a, b, ranks, widths, mixes, expected)


def route(mixes: list[Mix], height: int) -> TileRouting:
    mix_of_row, different = number_mixes(mixes)
    return route_host(mix_of_row, Mixes.of(different, SLOTS, DEVICE), height)


def grouped(case: Case, routing: TileRouting, splits: int = 1, place: int = 0) -> Tensor:
    siblings, rank = case.a.shape[1:3]
    members = routing.mixes.slots.shape[1]
    v = torch.full((splits, members, routing.rows, siblings * rank), float("nan"), device=DEVICE)
    itemsize = case.x.dtype.itemsize
    y = strided(case.base)
    listed = shrink_blocks(routing.height, itemsize)
    shrink(case.x, case.a, case.ranks, routing, v, listed[min(place, len(listed) - 1)])
    listed = expand_blocks(routing.height, itemsize)
    expand(y, Bridge(v), case.b, case.widths, case.ranks, routing, listed[min(place, len(listed) - 1)])
    return y


def by_row(case: Case, routing: TileRouting, splits: int = 1) -> Tensor:
    siblings, rank = case.a.shape[1:3]
    members = routing.mixes.slots.shape[1]
    v = torch.full((splits, members, routing.rows, siblings * rank), float("nan"), device=DEVICE)
    y = strided(case.base)
    row_shrink(case.x, case.a, case.ranks, routing, v)
    row_expand(y, Bridge(v), case.b, case.widths, case.ranks, routing)
    return y


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_grouped_tiles(batch: str, dtype: torch.dtype) -> None:
    case = make(BATCHES[batch], dtype)
    y = grouped(case, route(case.mixes, 16))
    assert case.error(y) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("batch", ["one row", "one row of the base", "uniform 15", "mixes"])
def test_rows_of_their_own(batch: str, dtype: torch.dtype) -> None:
    case = make(BATCHES[batch], dtype)
    y = by_row(case, route(case.mixes, 16))
    assert case.error(y) < BOUNDS[dtype]
