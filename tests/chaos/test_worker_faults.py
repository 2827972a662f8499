"""What happens to whole workers: killed, stopped, told to end, with a wrong clock."""

import signal
import time
from pathlib import Path

import pytest

from loramill.store.records import ShardState
from tests.chaos.cluster import LEASE_S, SHORT_TIMES, Cluster, rows_of, times_computed
from tests.chaos.hooks import Chaos, Point
from tests.chaos.processes import is_alive, is_stopped, until

SLOW = {"STUB_STEP_S": "0.05", "STUB_SEQS": "8"}


def _chaos_at(point: Point, folder: Path, which: str = "SIGKILL") -> Chaos:
    return Chaos(times=SHORT_TIMES, at=point, signal=which, once=str(folder / "once"))


@pytest.mark.parametrize("point", Point)
def test_kill_9_loses_nothing_and_only_uncommitted_rows_run_again(cluster: Cluster, point: Point) -> None:
    if point is Point.MID_COMMIT:
        cluster.files = f"file://{cluster.folder}/files"
    rows = rows_of(150)
    victim = cluster.worker(chaos=_chaos_at(point, cluster.folder), **SLOW)
    cluster.ready(victim)
    engine = victim.engine()
    job = cluster.submit(rows)
    assert victim.wait(30) == -signal.SIGKILL
    until("the engine dead with its worker", lambda: not is_alive(engine), 5)
    committed = cluster.committed(job)
    assert bool(committed) == (point is Point.AFTER_COMMIT)
    cluster.worker(**SLOW)
    outcome = cluster.finish(job, rows)
    again = {row for row, times in times_computed(cluster).items() if times > 1}
    assert not again & committed
    assert outcome.committed_twice == 0


def test_a_worker_command_that_is_killed_takes_celery_and_the_engine_with_it(cluster: Cluster) -> None:
    rows = rows_of(150)
    victim = cluster.worker(form="command", **SLOW)
    cluster.ready(victim)
    family = victim.family()
    assert len(family) == 3
    job = cluster.submit(rows)
    cluster.until("some rows finished", lambda: cluster.finished(job) >= 8)
    victim.send(signal.SIGKILL)
    until("all of it dead", lambda: not any(is_alive(pid) for pid in family), 5)
    cluster.worker()
    cluster.finish(job, rows)


def test_a_commit_after_a_pause_beyond_the_lease_is_fenced(cluster: Cluster) -> None:
    rows = rows_of(150)
    paused = cluster.worker(chaos=_chaos_at(Point.MID_COMMIT, cluster.folder, "SIGSTOP"), **SLOW)
    cluster.ready(paused)
    node = paused.node()
    job = cluster.submit(rows)
    cluster.until("the worker stopped amid a commit", lambda: is_stopped(node))
    cluster.worker()
    cluster.wait(job)
    before = cluster.store.job(job)
    paused.go_on()
    cluster.until("the late commit refused", lambda: paused.said("lost to another worker"))
    assert cluster.store.job(job) == before
    assert cluster.finish(job, rows).committed_twice == 0
    # It goes on as before.
    cluster.workers[1].end()
    again = cluster.submit(rows)
    cluster.finish(again, rows)


def test_sigterm_gives_the_shard_back_within_ten_seconds_with_what_is_finished(cluster: Cluster) -> None:
    rows = rows_of(120, special=dict.fromkeys(range(60, 120), "SLOW"))
    first = cluster.worker(**SLOW)
    cluster.ready(first)
    job = cluster.submit(rows)
    cluster.until("some rows finished", lambda: cluster.finished(job) >= 8)
    assert cluster.leased(job)
    code, took_s = first.term()
    assert code == 0
    assert took_s < 10
    committed = cluster.committed(job)
    assert 8 <= len(committed) < len(rows.lines)
    shards = cluster.store.shards(job)
    assert {shard.state for shard in shards} <= {ShardState.READY, ShardState.DONE}
    assert all(shard.attempts == 0 and not shard.suspects for shard in shards)
    assert not cluster.store.workers()
    cluster.worker(STUB_SLOW_PASSES="2")
    cluster.finish(job, rows)
    ran = times_computed(cluster)
    assert all(ran[row] == 1 for row in committed)


def test_a_clock_that_is_wrong_by_an_hour_changes_nothing(cluster: Cluster) -> None:
    rows = rows_of(200)
    for shift_s in (3600.0, -3600.0):
        chaos = Chaos(times=SHORT_TIMES, clock_s=shift_s)
        cluster.worker(chaos=chaos, threads=1, STUB_STEP_S="0.2", STUB_SEQS="4")
    cluster.ready()
    begun_s = time.monotonic()
    job = cluster.submit(rows)
    cluster.finish(job, rows)
    assert time.monotonic() - begun_s > 1.5 * LEASE_S
    # Nobody took a lease for run out, nobody a worker for gone, and both took part.
    assert set(times_computed(cluster).values()) == {1}
    assert all(shard.attempts == 0 for shard in cluster.store.shards(job))
    cluster.until("both workers at it", lambda: sum(one.rows_done > 0 for one in cluster.store.workers()) == 2, 5)
