"""Patience with stores that are away and with jobs that take long, on a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from loramill.producer.waiting import AWAY_S, LEAST_S, MOST_S, Patience, follow, looks, wait_for
from loramill.store.errors import JobNotFound, StoreLost, StoreUnreachable
from tests.producer.queued import Queue


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept = list[float]()

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now_s += seconds


def patience(time: Time, timeout_s: float | None = None, said: list[str] | None = None) -> Patience:
    return Patience(timeout_s, say=(said if said is not None else []).append, clock=time.clock, sleep=time.sleep)


def away(time: Time, until_s: float) -> Callable[[], str]:
    def look() -> str:
        if time.now_s < until_s:
            raise StoreUnreachable("nobody answers at x")
        return "there"

    return look


def test_a_store_that_comes_back_is_said_once() -> None:
    time, said = Time(), list[str]()
    patient = patience(time, said=said)
    assert patient.read(away(time, 160)) == "there"
    assert said == ["nobody answers at x; trying again", "the store is back after 1 m"]
    assert patient.read(away(time, 160)) == "there"
    assert len(said) == 2


def test_a_store_that_stays_away_is_given_up() -> None:
    time = Time()
    with pytest.raises(StoreUnreachable):
        patience(time).read(away(time, 1e9))
    assert AWAY_S <= time.now_s - 100 < AWAY_S + MOST_S


@pytest.mark.parametrize("timeout_s", [5, 2000])
def test_a_timeout_counts_while_the_store_is_away(timeout_s: float) -> None:
    time = Time()
    with pytest.raises(TimeoutError, match=r"waited .*: nobody answers at x"):
        patience(time, timeout_s).read(away(time, 1e9))
    assert time.now_s == pytest.approx(100 + timeout_s)


def test_a_store_that_lost_its_data_is_not_waited_for() -> None:
    time = Time()

    def look() -> None:
        raise StoreLost("it is another store")

    with pytest.raises(StoreLost):
        patience(time).read(look)
    assert time.slept == []


def test_pauses_grow_until_something_changes() -> None:
    time = Time()
    patient = patience(time)
    for changed in [False] * 8 + [True]:
        assert patient.pause(changed=changed)
    assert time.slept[:8] == sorted(time.slept[:8])
    assert time.slept[7] == MOST_S
    assert time.slept[8] == LEAST_S


def test_pauses_end_with_the_timeout() -> None:
    time = Time()
    patient = patience(time, 3)
    while patient.pause(changed=False):
        pass
    assert time.now_s == pytest.approx(103)


def test_a_job_is_looked_at_once_if_it_has_ended(queue: Queue) -> None:
    queue.submit(rows=2)
    queue.run()
    assert [job.status for job in looks(queue.store, "job", Patience(0))] == ["completed"]
    assert wait_for(queue.store, "job", 0.001).completed == 2


def test_a_wait_that_times_out_says_how_far_it_is(queue: Queue) -> None:
    queue.submit(rows=10)
    queue.run(shards=1)
    with pytest.raises(TimeoutError, match="waited 100 ms: job job is in progress: 4 of 10 rows; it goes on"):
        wait_for(queue.store, "job", 0.1)


def test_nobody_waits_for_a_job_that_is_not_there(queue: Queue) -> None:
    with pytest.raises(JobNotFound):
        wait_for(queue.store, "nobody")


def test_following_gives_every_chunk_once(queue: Queue) -> None:
    queue.submit(rows=40)
    totals = list[int]()

    def rows() -> Iterator[int]:
        for chunk in follow(queue.store, "job", Patience(30), lambda job: totals.append(job.completed)):
            yield from (row.row for row in chunk.rows())

    worker = threading.Thread(target=queue.run)
    worker.start()
    found = list(rows())
    worker.join()
    assert sorted(found) == list(range(40))
    assert totals == sorted(totals)
    assert totals[-1] == 40
