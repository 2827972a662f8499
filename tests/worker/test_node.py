"""A worker with a real store and real engine children, which are stubs."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.records import ShardState
from loramill.store.redis_store import RedisStore
from loramill.store.sqlite_store import SqliteStore
from loramill.worker import engine_process
from loramill.worker.leases import Leases
from loramill.worker.worker_settings import AGAIN
from tests.worker.queueing import ENVIRONMENT, answers, staged, until, working

Opening = Callable[..., JobStore]


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine_process, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(engine_process, "LOOK_S", 0.1)


@pytest.fixture(params=["sqlite", "redis"])
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opening]:
    """Opens the same store each time; they are closed at the end."""
    prefix, opened = uuid.uuid4().hex, list[JobStore]()

    def make(**given: Any) -> JobStore:
        if request.param == "sqlite":
            opened.append(SqliteStore(tmp_path / "jobs.db", **given))
        else:
            opened.append(RedisStore(request.getfixturevalue("redis_server").url, prefix=prefix, **given))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def ended(store: JobStore, job: str = "j") -> Callable[[], bool]:
    return lambda: store.job(job).status.ended


def test_a_job_is_done_and_the_worker_is_seen(opening: Opening) -> None:
    store = opening()
    staged(store, "j", [f"row {row}" for row in range(50)])
    with working(opening()):
        until(ended(store))
        [seen] = store.workers()
        assert (seen.id, seen.state, seen.device) == ("here", "ready", "cpu")
        [offered] = store.manifests()
        assert seen.manifest == offered.id
        assert all(store.has_blob(sha) for files in offered.tokenizers.values() for sha in files.values())
    job = store.job("j")
    assert (job.status, job.completed, job.failed) == (JobStatus.COMPLETED, 50, 0)
    assert answers(store, "j") == {row: f"ok:row {row}" for row in range(50)}
    assert store.workers() == []


def test_a_poison_row_is_found_and_fails_alone(opening: Opening) -> None:
    store = opening()
    prompts = [f"row {row}" for row in range(24)]
    prompts[9] = "ABORT now"
    staged(store, "j", prompts)
    with working(opening()) as (node, _):
        until(ended(store))
        deaths = sum(engine.restarts for engine in node.engines)
    assert deaths >= 4  # in company, and three times alone
    assert answers(store, "j") == {row: f"ok:row {row}" if row != 9 else "engine_crash" for row in range(24)}
    assert all(shard.attempts == 0 for shard in store.shards("j"))


def test_a_death_in_company_charges_nobody(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_STEP_S", "0.3")
    store = opening()
    staged(store, "j", [f"SLOW {row}" for row in range(4)])
    with working(opening()) as (node, _):
        [engine] = node.engines
        until(lambda: bool(engine._running) and all(engine._running.values()))
        monkeypatch.setenv("STUB_STEP_S", "0")  # the next one's
        engine.kill()
        until(lambda: bool(store.shards("j")[0].suspects) or ended(store)())
        assert set(store.shards("j")[0].suspects.values()) == {0}
        assert set(store.shards("j")[0].suspects) == {0, 1, 2, 3}


def test_an_engine_that_hangs_is_killed(opening: Opening) -> None:
    store = opening()
    staged(store, "j", ["row 0", "HANG", "row 2"])
    with working(opening(), hang_timeout_s=2.5):
        until(ended(store))
    assert answers(store, "j") == {0: "ok:row 0", 1: "engine_crash", 2: "ok:row 2"}


def test_a_cancel_reaches_rows_that_run(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_STEP_S", "0.2")
    store = opening()
    staged(store, "j", ["quick", *(f"SLOW {row}" for row in range(7))])
    with working(opening()):
        until(lambda: store.job("j").completed == 1)
        store.cancel("j")
        assert until(ended(store)) < 2.5
    job = store.job("j")
    assert (job.status, job.completed) == (JobStatus.CANCELLED, 1)


def test_a_drain_gives_back_what_is_not_done(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_STEP_S", "0.5")
    store = opening()
    staged(store, "j", ["quick", *(f"SLOW {row}" for row in range(7))])
    with working(opening()) as (node, _):
        until(lambda: store.job("j").completed == 1)
        began = time.monotonic()
        node.drain.ask()
        until(lambda: node.idle, 12)
    assert time.monotonic() - began < 10
    [shard] = store.shards("j")
    assert (shard.state, shard.done, shard.attempts, shard.suspects) == (ShardState.READY, 1, 0, {})


def test_a_lease_that_ran_out_is_taken_again_if_nobody_has_it(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leases, "keep", lambda self, ended: None)
    store = opening()
    staged(store, "j", [f"SLOW {row}" for row in range(4)])
    with working(opening(lease_s=0.5)):
        until(ended(store))
    assert store.job("j").completed == 4


def test_a_lease_that_another_has_is_lost(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leases, "keep", lambda self, ended: None)
    store = opening()
    staged(store, "j", [f"SLOW {row}" for row in range(4)])
    with working(opening(lease_s=0.5), threads=1) as (node, _):
        until(lambda: not node.idle)
        offered = store.manifests()[0].id
        taken = []
        until(lambda: bool(store.reap()) and bool(taken.append(store.claim("other", offered)) or taken[-1]))
        until(lambda: node.shards_done == 1)
        assert node.rows_done == 0
    assert store.job("j").completed == 0


def test_leases_are_kept_while_the_engine_steps(opening: Opening) -> None:
    store = opening()
    staged(store, "j", [f"SLOW {row}" for row in range(4)])
    with working(opening(lease_s=1.5)):
        while not ended(store)():
            assert store.reap().leases == 0
            time.sleep(0.1)
    assert store.shards("j")[0].attempts == 0


def test_no_ticket_for_long_ends_the_worker(opening: Opening) -> None:
    store = opening()
    sent = list[tuple[str, int]]()
    with working(opening(), threads=0, watchdog_s=1.5) as (_, housekeeping):
        housekeeping._top_up = lambda base, ready: sent.append((base, ready))
        time.sleep(1)
        assert housekeeping.code is None
        staged(store, "j", ["row 0"])
        until(lambda: housekeeping.code == AGAIN)
    assert set(sent) == {("stub", 1)}


def test_until_empty_waits_for_others(opening: Opening) -> None:
    store, other = opening(), opening()
    staged(store, "j", [f"row {row}" for row in range(16)])
    with working(opening(), until_empty=True, threads=0) as (node, housekeeping):
        until(lambda: node.ready)
        offered = store.manifests()[0].id
        held = [other.claim("other", offered), other.claim("other", offered)]
        time.sleep(1.5)
        assert housekeeping.code is None
        other.cancel("j")
        for claim in held:
            assert claim is not None
            other.release(claim.lease)
        until(lambda: housekeeping.code == 0)


@pytest.mark.parametrize(
    ("command", "says"),
    [("/does/not/exist", "cannot be started"), ("false", "died 3 times in a row before it was ready")],
)
def test_an_engine_that_never_starts_ends_the_worker(
    command: str, says: str, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAMILL_CHILD", command)
    with working(opening()) as (node, housekeeping):
        until(lambda: housekeeping.code == 1)
        assert node.failure is not None
        assert says in str(node.failure)


def test_the_child_goes_with_its_worker(opening: Opening) -> None:
    with working(opening()) as (node, _):
        until(lambda: node.ready)
        child = node.engines[0]._child
        assert child is not None
        os.kill(child.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
