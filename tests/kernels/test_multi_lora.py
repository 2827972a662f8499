"""The multi-LoRA operator against the formula in float64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from loramill.kernels.check import LiveRanks
from loramill.kernels.mixes import Mix, number_mixes, only
from loramill.kernels.multi_lora import Routing, multi_lora, multi_lora_reference
from loramill.kernels.router import Router
from loramill.kernels.routing import Mixes, route_host
from loramill.kernels.segments import Segment, segments_of

CPU = torch.device("cpu")
SLOTS, RANK, K = 6, 24, 40
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
MIXES: dict[str, list[tuple[Mix, int]]] = {
    "identical": [(only(2), 130)],
    "distinct": [(only(s), 1) for s in range(SLOTS)],
    "uniform": [(only(s), 17) for s in range(SLOTS)],
    "zipf": [(only(0), 60), (only(1), 30), (only(2), 20), (only(3), 15), (only(4), 12), (only(5), 10)],
    "long": [(only(0), 100), (only(3), 63), (only(5), 200)],
    "base among them": [((), 5), (only(1), 15), (only(3), 1), ((), 2)],
    "unsorted": [(only(4), 3), (only(1), 2), (only(4), 9), (only(0), 1)],
    "base only": [((), 7)],
    "one row": [(only(5), 1)],
    "strengths": [(((0, 0.5),), 3), (((0, -2.0),), 4), (only(0), 2), (((3, 0.25),), 5)],
    "mixed": [(only(0), 4), (((0, 0.5), (2, 1.5)), 20), (((1, 1.0), (0, 1.0), (5, -1.0)), 3), ((), 2), (only(2), 9)],
    "mixed, long": [(((0, 0.5), (2, 1.5)), 70), (((2, 1.0), (3, 0.5)), 90)],
}
RANKS = [[24, 24, 24], [8, 8, 8], [1, 3, 24], [0, 16, 0], [0, 0, 0], [5, 0, 2]]
"""Rank of each sibling in each slot: mixed, partly untouched, and one slot that touches none."""


def weights(widths: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(SLOTS, len(widths), RANK, K, generator=generator)
    b = [torch.randn(SLOTS, RANK, width, generator=generator) for width in widths]
    for slot in range(SLOTS):
        for i in range(len(widths)):
            a[slot, i, RANKS[slot][i] :] = 0
            b[i][slot, RANKS[slot][i] :] = 0
    return a.to(dtype), torch.cat(b, 2).to(dtype)


def live(ranks: list[list[int]]) -> LiveRanks:
    held = LiveRanks(len(ranks), len(ranks[0]), CPU)
    for slot, mine in enumerate(ranks):
        held.put(slot, mine)
    return held


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("widths", [(32,), (24, 8, 8)], ids=["single", "siblings"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_every_form_equals_the_formula(mix: list[tuple[Mix, int]], widths: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = weights(widths, dtype)
    rows = sum(n for _, n in mix)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(4)).to(dtype)
    base = torch.randn(rows, sum(widths), generator=torch.Generator().manual_seed(5)).to(dtype)
    segments = segments_of(mix)
    expected = base.double()
    multi_lora_reference(expected, x, a, b, widths, segments)
    ranks = [slot[: len(widths)] for slot in RANKS]
    for by_segment in (True, False):
        routing = Routing(segments, CPU)
        if routing.by_segment and not by_segment:
            continue  # a mix of long segments has no tiles made for it
        routing.by_segment = by_segment
        y = base.clone()
        multi_lora(y, x, a, b, widths, live(ranks), routing)
        error = (y.double() - expected).norm() / expected.norm()
        assert error < BOUNDS[dtype]
        untouched = torch.ones(rows, dtype=torch.bool)
        for start, end, slot, _ in segments:
            untouched[start:end] &= not any(ranks[slot])
        assert torch.equal(y[untouched], base[untouched]), "rows of no adapter must stay bit for bit"


def test_the_mixes_reach_both_forms() -> None:
    forms = {name: Routing(segments_of(mix), CPU).by_segment for name, mix in MIXES.items()}
    assert forms["identical"]
    assert forms["long"]
    assert forms["mixed, long"]
    assert not forms["mixed"]
    assert not forms["distinct"]
    assert not forms["zipf"]


def test_a_row_of_nan_stays_alone() -> None:
    a, b = weights((32,), torch.float32)
    x = torch.ones(34, K)
    x[3] = float("nan")
    y = torch.zeros(34, 32)
    multi_lora(y, x, a, b, [32], live([[24]] * SLOTS), Routing(segments_of([(only(0), 17), (only(1), 17)]), CPU))
    assert y[3].isnan().all()
    assert torch.isfinite(y[torch.arange(34) != 3]).all()


def test_a_cpu_routes_mixes_by_tiles() -> None:
    a, b = weights((24, 8, 8), torch.float32)
    mixes = [((0, 1.0),), (), ((1, 0.5), (2, -2.0)), ((4, 1.0),), ((1, 0.5), (2, -2.0))]
    x, base = torch.randn(5, K), torch.randn(5, 40)
    expected = base.double()
    for row, mix in enumerate(mixes):
        for slot, weight in mix:
            delta = torch.zeros(1, 40, dtype=torch.float64)
            multi_lora_reference(delta, x[row : row + 1], a, b, (24, 8, 8), [Segment(0, 1, slot)])
            expected[row] += weight * delta[0]
    mix_of_row, different = number_mixes(mixes)
    by_table = route_host(mix_of_row, Mixes.of(different, SLOTS, CPU), 16)
    for routing in (by_table, Router(SLOTS, CPU, tiled=True).route((mix, 1) for mix in mixes)):
        y = base.clone()
        multi_lora(y, x, a, b, (24, 8, 8), live(RANKS), routing)
        assert (y.double() - expected).norm() / expected.norm() < 1e-6
        assert torch.equal(y[[1, 3]], base[[1, 3]])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"x": torch.zeros(4, K + 1)}, r"x must be \[4, 40\]"),
        ({"x": torch.zeros(3, K)}, r"y must be \[3, 32\]"),
        ({"x": torch.zeros(K, 4).t()}, "x must be a matrix whose last dimension is contiguous"),
        ({"x": torch.zeros(4, K, dtype=torch.float64)}, "x must be torch.float32"),
        ({"x": torch.zeros(4, K, device="meta")}, "x must be on cpu"),
        ({"y": torch.zeros(4, 31)}, r"y must be \[4, 32\]"),
        ({"y": torch.zeros(4, 32, dtype=torch.float16)}, "y must be torch.float32"),
        ({"a": torch.zeros(SLOTS, 5, RANK, K)}, "a must be"),
        ({"a": torch.zeros(SLOTS, 1, K, RANK).mT}, "a must be contiguous"),
        ({"a": torch.zeros(SLOTS, 2, RANK, K)}, "widths must be 2"),
        ({"b": torch.zeros(SLOTS, RANK - 1, 32)}, "b must be"),
        ({"b": torch.zeros(SLOTS, RANK, 64)[:, :, :32]}, "b must be contiguous"),
        ({"b": torch.zeros(SLOTS, RANK, 32, dtype=torch.bfloat16)}, "b must be torch.float32"),
        ({"widths": [16]}, r"y must be \[4, 16\]"),
        ({"widths": [32, 0]}, "widths must be 1"),
        ({"ranks": live([[1]] * (SLOTS - 1))}, "ranks must be for 6 slots"),
        ({"ranks": live([[RANK + 1]] * SLOTS)}, "ranks must be at most 24"),
        ({"routing": Routing([Segment(0, 4, SLOTS)], CPU)}, r"routing must name slots from 0 to 5, not \[6\]"),
        ({"routing": Routing([Segment(0, 4, -2)], CPU)}, r"routing must name slots from 0 to 5, not \[-2\]"),
        ({"routing": Routing([Segment(0, 5, 0)], CPU)}, "routing must end within the 4 rows of x, not at 5"),
        ({"routing": Router(SLOTS + 1, CPU, tiled=True).route([(only(6), 4)])}, "routing must be by mixes of 6 slots"),
        ({"routing": Router(SLOTS, CPU, tiled=True).route([(only(0), 5)])}, r"x must be \[5, 40\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], names: str) -> None:
    a, b = weights((32,), torch.float32)
    given = {"y": torch.zeros(4, 32), "x": torch.zeros(4, K), "a": a, "b": b, "widths": [32]}
    given |= {"ranks": live([[1]] * SLOTS), "routing": Routing(segments_of([(only(0), 4)]), CPU), **change}
    with pytest.raises(ValueError, match=names):
        multi_lora(**given)


@pytest.mark.parametrize(
    ("slot", "ranks", "names"), [(2, [1], "slot must be from 0 to 1"), (0, [1, 1], "ranks"), (0, [-1], "ranks")]
)
def test_ranks_that_do_not_fit_are_named(slot: int, ranks: list[int], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        LiveRanks(2, 1, CPU).put(slot, ranks)


def test_the_operators_are_there_without_triton() -> None:
    """As off Linux, where no triton is installed."""
    modules = ", ".join(f"loramill.kernels.{name}" for name in ("multi_lora", "embedding", "routing", "plan", "tune"))
    code = f"import sys; sys.modules['triton'] = None; import {modules}"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
