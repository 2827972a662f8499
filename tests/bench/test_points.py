"""The points of the kernel benchmark: what each must move and compute, counted by hand."""

from __future__ import annotations

import pytest

from bench.points import MODELS, Ceilings, Point, Projection, percents, points, sets_of

SMALL = Point("m", Projection("qkv", 10, (4, 2, 2)), rows=6, rank=3, adapters=4, popularity="zipf")


def test_the_points_are_many_named_once_and_cover_what_was_asked() -> None:
    every = points()
    assert len({point.name for point in every}) == len(every) > 40
    assert {point.model for point in every} == set(MODELS)
    assert {point.rank for point in every} >= {8, 16, 64, 128}
    assert {point.adapters for point in every} >= {1, 8, 32, 256}
    assert {point.rows for point in every} >= {1, 8, 64, 512, 8192}
    for model, projections in MODELS.items():
        for projection in projections:
            mine = [point for point in every if (point.model, point.projection) == (model, projection)]
            assert {point.decode for point in mine} == {True, False}, f"{model} {projection.name}"


def test_the_targets_points_come_first() -> None:
    assert points()[0].name == "llama-3-8b qkv, 256 rows, 32 zipf, rank 16"
    assert all(point.model == "llama-3-8b" for point in points()[:20])


def test_bytes_and_operations_are_those_counted_by_hand() -> None:
    assert SMALL.counts() == [3, 1, 1, 1]
    x, y, a, b = 6 * 10, 2 * 6 * 8, 4 * 3 * 3 * 10, 4 * 3 * 8
    assert SMALL.bytes() == 2 * (x + y + a + b)
    assert SMALL.flops() == 2 * 6 * (3 * 3 * 10 + 3 * 8)


def test_adapters_without_rows_are_not_counted() -> None:
    many = Point("m", SMALL.projection, rows=2, rank=3, adapters=100, popularity="uniform")
    assert sum(many.counts()) == 2
    few = Point("m", SMALL.projection, rows=2, rank=3, adapters=2, popularity="uniform")
    assert many.bytes() == few.bytes()


@pytest.mark.parametrize(("gemm", "bound"), [(1e9, "copy"), (1e3, "gemm")])
def test_a_percentage_is_of_what_bounds(gemm: float, bound: str) -> None:
    seconds = 1e-3
    found = percents(SMALL, seconds, Ceilings(copy=1e6, gemm=gemm))
    assert found["bound"] == bound
    assert found["of_copy"] == pytest.approx(SMALL.bytes() / 1e6 / seconds * 100)
    assert found["of_gemm"] == pytest.approx(SMALL.flops() / gemm / seconds * 100)
    assert found["of_bound"] == max(found["of_copy"], found["of_gemm"])


def test_sets_fill_the_cache_four_times() -> None:
    assert sets_of(10, 100) == 40
    assert sets_of(7, 100) == 58
    assert sets_of(1000, 100) == 1
    assert sets_of(1, 10**9) == 256
