from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loramill.producer.shards import MAX_ROWS, MIN_ROWS, Need, cut, rows_a_shard

KEYS = [f"k{number}" for number in range(6)]


class Cut(NamedTuple):
    """A shard."""

    rows: list[int]
    adapters: tuple[str, ...]


class Drawn(NamedTuple):
    """Rows and limits."""

    order: list[int]
    mix: list[int]
    length: list[int]
    needs: list[Need]
    max_loras: int
    max_rows: int
    max_bytes: int

    def cut(self) -> list[Cut]:
        columns = np.array(self.order, np.int64), np.array(self.mix, np.int32), np.array(self.length, np.int32)
        limits = {"max_loras": self.max_loras, "max_rows": self.max_rows, "max_bytes": self.max_bytes}
        needs = [*self.needs, Need()]
        return [Cut(shard.rows.tolist(), shard.adapters) for shard in cut(*columns, needs, **limits)]

    def need(self, row: int) -> Need:
        return self.needs[self.mix[row]] if self.mix[row] >= 0 else Need()


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    dynamic = st.sets(st.sampled_from(KEYS[:4]), min_size=1, max_size=3).map(lambda keys: Need(frozenset(keys)))
    merged = st.sampled_from(KEYS[4:]).map(lambda key: Need(frozenset({key}), apart=key))
    needs = draw(st.lists(st.one_of(dynamic, merged), max_size=6))
    mix = draw(st.lists(st.integers(-1, len(needs) - 1), max_size=80))
    order = draw(st.permutations(range(len(mix))))
    length = [draw(st.integers(1, 60)) for _ in mix]
    return Drawn(
        list(order), mix, length, needs, draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 400))
    )


@given(drawn())
def test_every_row_once_in_order_and_no_limit_is_passed(job: Drawn) -> None:
    shards = job.cut()
    assert [row for shard in shards for row in shard.rows] == job.order
    for shard in shards:
        needs = [job.need(row) for row in shard.rows]
        assert shard.adapters == tuple(sorted({key for need in needs for key in need.adapters}))
        assert 1 <= len(shard.rows) <= job.max_rows
        assert len({need.apart for need in needs}) == 1
        if len(shard.rows) > 1:
            assert len(shard.adapters) <= max(job.max_loras, *(len(need.adapters) for need in needs))
            assert sum(job.length[row] + 1 for row in shard.rows) <= job.max_bytes


@given(drawn())
def test_a_shard_ends_only_where_it_must(job: Drawn) -> None:
    shards = job.cut()
    for shard, following in pairwise(shards):
        row = following.rows[0]
        needs = {job.need(one) for one in [*shard.rows, row]}
        adapters = {key for need in needs for key in need.adapters}
        assert (
            len(shard.rows) == job.max_rows
            or sum(job.length[one] + 1 for one in [*shard.rows, row]) > job.max_bytes
            or len({need.apart for need in needs}) > 1
            or len(adapters) > job.max_loras
            or (len(shard.rows) >= max(MIN_ROWS, job.max_rows // 2) and adapters > set(shard.adapters))
        )


@given(drawn())
def test_the_same_rows_are_cut_alike(job: Drawn) -> None:
    assert job.cut() == job.cut()


def test_a_row_beyond_the_limits_is_a_shard_of_its_own() -> None:
    wide, long = Need(frozenset(KEYS[:3])), Need()
    job = Drawn([0, 1, 2], [0, 1, 1], [10, 500, 10], [wide, long], max_loras=2, max_rows=40, max_bytes=100)
    assert [shard.rows for shard in job.cut()] == [[0], [1], [2]]


def test_adapters_of_few_rows_share_a_shard_and_a_full_one_takes_no_more() -> None:
    needs = [Need(frozenset({key})) for key in KEYS[:3]]
    rows = [0] * 20 + [1] * 20 + [2] * 20
    job = Drawn(list(range(60)), rows, [1] * 60, needs, max_loras=8, max_rows=40, max_bytes=10**6)
    assert [(len(shard.rows), shard.adapters) for shard in job.cut()] == [(20, ("k0",)), (20, ("k1",)), (20, ("k2",))]
    job = job._replace(max_rows=200)
    assert [(len(shard.rows), shard.adapters) for shard in job.cut()] == [(60, ("k0", "k1", "k2"))]


def test_small_jobs_reach_every_worker_and_are_not_cut_finer() -> None:
    assert rows_a_shard(1_000_000, 4) == MAX_ROWS
    assert rows_a_shard(100, 4) == 25
    assert rows_a_shard(100, 0) == 100
    assert rows_a_shard(20, 4) == MIN_ROWS
