"""Tokens a second: what came between two looks, counted once, and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.producer.api.chart import HEIGHT, WIDTH, binned, chart, nice
from loramill.producer.api.failures import Failures
from loramill.producer.api.throughput import PACE_S, Sample, Throughput, Tokens
from loramill.store.errors import StoreUnreachable
from loramill.store.packing import Chunk
from tests.producer.api.paged import Site
from tests.producer.queued import done_row
from tests.producer.served_by_stub import MANIFEST

NOW_S = 1_000_000.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    with made.store:
        yield made


def looks(site: Site) -> tuple[Throughput, Clock]:
    clock = Clock()
    return Throughput(site.store, clock=clock), clock


def later(throughput: Throughput, clock: Clock, seconds: float = 5) -> None:
    clock.now_s += seconds
    throughput.look()


def test_what_came_between_two_looks_counts_once_and_for_its_owner(site: Site) -> None:
    site.job("before", 4)
    site.place.work()
    site.job("open", 4)
    throughput, clock = looks(site)
    throughput.look()
    assert throughput.samples() == []
    assert [job.id for job in throughput.open_jobs()] == ["open"]
    site.place.work()  # `open` ends
    site.job("quick", 8, owner="ann")
    site.place.work()  # `quick` came and ended between two looks
    later(throughput, clock)
    later(throughput, clock)
    # A row of `queued` is 3 tokens in and 2 out.
    assert throughput.samples() == [
        Sample(NOW_S + 5, 5, Tokens(36, 24)),
        Sample(NOW_S + 10, 5, Tokens(0, 0)),
    ]
    assert [sample.tokens for sample in throughput.samples("ann")] == [Tokens(24, 16), Tokens()]
    assert throughput.open_jobs() == []


def test_jobs_of_one_millisecond_are_each_seen(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, clock = looks(site)
    throughput.look()
    for number in range(30):
        site.job(f"job-{number}", 1)
        later(throughput, clock)
    site.place.work()
    later(throughput, clock)
    assert sum(sample.tokens.prompt for sample in throughput.samples()) == 30 * 3


def test_a_store_that_was_away_leaves_no_gap(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.job("one", 8)
    throughput, clock = looks(site)
    throughput.look()
    site.place.work()

    def away(**_: object) -> None:
        raise StoreUnreachable("it is away")

    with monkeypatch.context() as patch:
        patch.setattr(site.store, "jobs", away)
        with pytest.raises(StoreUnreachable):
            later(throughput, clock, 20)
    later(throughput, clock, 10)
    assert throughput.samples() == [Sample(NOW_S + 30, 30, Tokens(24, 16))]


def test_a_job_that_was_removed_is_forgotten(site: Site) -> None:
    site.job("one", 4)
    throughput, clock = looks(site)
    throughput.look()
    site.store.cancel("one")
    site.store.purge("one")
    later(throughput, clock)
    assert throughput.open_jobs() == []


def test_a_running_job_s_pace_is_that_of_the_last_minute(site: Site) -> None:
    site.job("one", 24)
    throughput, clock = looks(site)
    throughput.look()
    for _ in range(4):
        claim = site.store.claim("w", MANIFEST.id)
        assert claim is not None
        done = [done_row("one", *row) for row in site.store.read_shard("one", claim.lease.shard)]
        site.store.commit(claim.lease, Chunk.of(done, range(4)))
        later(throughput, clock, PACE_S / 2)
    pace = throughput.pace(site.store.job("one"))
    assert (pace.rows_per_s, pace.tokens_per_s, pace.eta_s) == (8 / PACE_S, 40 / PACE_S, PACE_S)


def test_it_looks_by_itself(site: Site) -> None:
    site.job("one", 4)
    throughput = Throughput(site.store)
    throughput.start()
    while not throughput.open_jobs():
        pass
    throughput.close()
    throughput.close()


@given(st.lists(st.tuples(st.integers(0, 3600), st.integers(0, 10**6)), max_size=50), st.sampled_from([5, 60]))
def test_bins_are_means_of_what_is_in_them(found: list[tuple[int, int]], bins: int) -> None:
    samples = [Sample(NOW_S - age, 5, Tokens(tokens, 2 * tokens)) for age, tokens in sorted(found, reverse=True)]
    rates = binned(samples, NOW_S, 3600, bins)
    assert len(rates) == bins
    assert sum(rate is not None for rate in rates) <= len({age for age, _ in found})
    most = max((tokens for _, tokens in found), default=0) / 5
    assert all(rate.prompt <= most and rate.completion == pytest.approx(2 * rate.prompt) for rate in rates if rate)


@given(st.floats(0, 10**9))
def test_the_chart_s_top_and_its_half_are_round(peak: float) -> None:
    top = nice(peak)
    assert top >= peak and (top == 10 or top < 2.5 * peak)
    assert str(top // 2).strip("0") in ("1", "2", "5") and top % 2 == 0


def test_a_chart_is_as_wide_as_what_there_is_to_show() -> None:
    def of(seconds: int) -> int:
        return chart([Sample(NOW_S - age, 5, Tokens(50, 50)) for age in range(seconds, -1, -5)], NOW_S).span_s

    assert [of(seconds) for seconds in (5, 295, 305, 1000, 3600)] == [300, 300, 900, 1800, 3600]
    assert chart([], NOW_S).span_s == 300


def test_a_chart_has_gaps_where_nobody_looked_and_stays_in_its_frame() -> None:
    ages = [*range(250, 200, -5), *range(100, -1, -5)]
    drawn = chart([Sample(NOW_S - age, 5, Tokens(100, age * 10)) for age in ages], NOW_S)
    assert drawn.line.count("M") == drawn.both.count("M") == drawn.completion.count("Z") == 2
    points = [
        tuple(map(float, point.split())) for point in drawn.line.replace("M", "L").replace(" L", "L").split("L")[1:]
    ]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert drawn.now.prompt == 20 and drawn.peak == 520 and drawn.top == 1000 and not drawn.is_empty


def test_failures_are_counted_by_their_code_and_each_row_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    job = site.job("one", 8)
    failures = Failures(site.store)
    assert failures.of(job).reasons == ()
    while claim := site.store.claim("w", MANIFEST.id):
        lines = site.store.read_shard("one", claim.lease.shard)
        done = [done_row("one", *row, fail={"r1", "r2", "r6"}) for row in lines]
        half = Chunk.of(done[:2], range(2))
        site.store.commit(claim.lease, half)
        site.store.commit(claim.lease, half)  # told twice, as by a worker that did not hear the answer
        seen = failures.of(site.store.job("one"))
        assert seen.counted == site.store.job("one").failed
        site.store.commit(claim.lease, Chunk.of(done[2:], range(2, 4)))
    [reason] = failures.of(site.store.job("one")).reasons
    assert (reason.code, reason.rows, reason.message, reason.custom_id) == ("engine_error", 3, "no", "r1")


def test_a_look_at_failures_ends_in_time_and_the_next_goes_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.job("one", 4 * 20)
    site.place.work(fail={f"r{row}" for row in range(80)})
    monkeypatch.setattr("loramill.producer.api.failures.LOOK_S", 0)
    job, failures = site.store.job("one"), Failures(site.store)
    assert failures.of(job).counted == 0
    monkeypatch.setattr("loramill.producer.api.failures.LOOK_S", 60)
    assert failures.of(job).counted == 80
