"""Questions beside jobs: a queue of their own, in no list, and soon gone. And what waits in the other one."""

from typing import Any

import pytest

from loramill.schemas.job import JobStatus, Lane
from loramill.store.contract import ASK_RETENTION_S, LEASE_S, STAGING_S
from loramill.store.errors import JobNotFound, StoreLost
from loramill.store.records import Backlog, Reaped, ShardState, Verdict
from tests.contract.building import a_chunk, a_manifest, a_shard, a_spec, claimed, rows_of, submitted
from tests.contract.places import Place

BASE = a_manifest().base_id


def asked(store: Any, job_id: str, adapters: str = "", **given: Any) -> None:
    """A question, accepted."""
    submitted(store, job_id, a_shard(0, 1, adapters), lane=Lane.ASK, **given)


def ask_claim(store: Any, adapters: str = "abc", **given: Any) -> Any:
    """What the express lane has for a worker with these adapters."""
    manifest = a_manifest(adapters, **given)
    store.publish(manifest)
    return store.claim("w", manifest.id, lane=Lane.ASK)


def test_each_lane_gives_only_what_is_its_own(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 1))
        asked(store, "q")
        assert ask_claim(store).lease.job == "q"
        assert ask_claim(store) is None
        assert claimed(store).lease.job == "j"
        assert store.claim("w", a_manifest().id) is None
        with pytest.raises(StoreLost, match="manifest"):
            store.claim("w", "nobody's", lane=Lane.ASK)


def test_a_question_waits_for_a_worker_that_serves_it(place: Place) -> None:
    with place.open() as store:
        asked(store, "q", "d")
        asked(store, "another", base="another")
        assert ask_claim(store, "abc") is None
        assert ask_claim(store, "d", base="another").lease.job == "another"
        assert ask_claim(store, "abcd").lease.job == "q"


def test_a_question_is_a_job_in_all_else(place: Place) -> None:
    with place.open() as store:
        asked(store, "q", owner="me", priority=100)
        job = store.job("q")
        assert (job.spec.lane, job.spec.owner, job.status) == (Lane.ASK, "me", JobStatus.IN_PROGRESS)
        lost = ask_claim(store).lease
        place.clock.advance(LEASE_S + 1)
        assert store.pulse([lost], renew=True) == [Verdict.FENCED]
        assert store.reap() == Reaped(leases=1)
        assert [shard.state for shard in store.shards("q")] == [ShardState.READY]
        lease = ask_claim(store).lease
        store.release(lease)
        lease = store.reclaim("w", lease).lease
        assert store.commit(lease, a_chunk(0, [0])).shard_done
        assert store.job("q").status is JobStatus.COMPLETED and list(rows_of(store, "q")) == [0]
        asked(store, "r")
        assert store.cancel("r").status is JobStatus.CANCELLED
        assert ask_claim(store) is None
        store.purge("r")
        with pytest.raises(JobNotFound):
            store.job("r")


def test_questions_are_in_no_list_and_no_count_of_what_waits(place: Place) -> None:
    with place.open() as store:
        submitted(store, "one", a_shard(0, 2))
        asked(store, "q")
        submitted(store, "two", a_shard(0, 3))
        store.stage(a_spec("staged", lane=Lane.ASK))
        assert [job.id for job in store.jobs()] == ["two", "one"]
        assert [job.id for job in store.jobs(after="two", limit=1)] == ["one"]
        with pytest.raises(JobNotFound, match="q"):
            store.jobs(after="q")
        assert store.ready() == {BASE: 2}
        assert store.backlog() == {BASE: Backlog(2, 5, place.clock.now_ms)}
        for _ in range(2):
            claimed(store)
        assert store.ready() == {} and store.backlog() == {}


def test_an_ended_question_is_kept_for_minutes(place: Place) -> None:
    with place.open() as store:
        asked(store, "q")
        submitted(store, "j", a_shard(0, 1))
        store.commit(ask_claim(store).lease, a_chunk(0, [0]))
        store.cancel("j")
        asked(store, "waits")
        place.clock.advance(ASK_RETENTION_S - 0.001)
        assert store.reap() == Reaped()
        assert len(rows_of(store, "q")) == 1
        place.clock.advance(0.001)
        assert store.reap() == Reaped(purged=1)
        with pytest.raises(JobNotFound):
            store.job("q")
        assert store.job("j").status is JobStatus.CANCELLED
        assert store.job("waits").status is JobStatus.IN_PROGRESS
        store.stage(a_spec("dead", lane=Lane.ASK))
        place.clock.advance(STAGING_S)
        assert store.reap() == Reaped(abandoned=1), "a question that was never accepted goes like any job"


def test_a_question_is_not_kept_longer_than_a_job(place: Place) -> None:
    with place.open(retention_s=10.0) as store:
        asked(store, "q")
        store.cancel("q")
        place.clock.advance(10)
        assert store.reap() == Reaped(purged=1)


# What waits.


def test_a_backlog_is_shards_and_their_open_rows_and_since_when(place: Place) -> None:
    with place.open() as store:
        assert store.backlog() == {}
        first_ms = place.clock.now_ms
        submitted(store, "old", a_shard(0, 4), a_shard(1, 2))
        place.clock.advance(5)
        second_ms = place.clock.now_ms
        submitted(store, "new", a_shard(0, 3), priority=1)
        submitted(store, "other", a_shard(0, 1), base="another")
        store.stage(a_spec("staged"))
        store.add_shard("staged", a_shard(0, 100))
        other = {a_manifest(base="another").base_id: Backlog(1, 1, second_ms)}
        assert store.backlog() == other | {BASE: Backlog(3, 9, first_ms)}
        new = claimed(store)
        assert new.lease.job == "new"
        half, whole = claimed(store), claimed(store)
        assert store.backlog() == other
        store.commit(half.lease, a_chunk(0, [1, 2, 3]))
        assert store.backlog() == other, "of what is leased nothing waits"
        store.release(half.lease)
        assert store.backlog() == other | {BASE: Backlog(1, 1, first_ms)}
        store.release(new.lease)
        assert store.backlog() == other | {BASE: Backlog(2, 4, first_ms)}
        store.commit(whole.lease, a_chunk(1, [0]))
        place.clock.advance(LEASE_S + 1)
        store.reap()
        assert store.backlog() == other | {BASE: Backlog(3, 5, first_ms)}
        store.reclaim("w", half.lease)
        assert store.backlog() == other | {BASE: Backlog(2, 4, first_ms)}
        store.cancel("old")
        assert store.backlog() == other | {BASE: Backlog(1, 3, second_ms)}
        store.cancel("new")
        assert store.backlog() == other


def test_what_expires_waits_no_more(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 4), a_shard(1, 2), window_s=10.0)
        place.clock.advance(10)
        store.reap()
        assert store.backlog() == store.ready() == {}


def test_leases_that_ran_out_are_counted(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 4), a_shard(1, 2))
        assert store.info().leases_expired == 0
        for leases, so_far in ((1, 1), (2, 3)):
            for _ in range(leases):
                claimed(store)
            place.clock.advance(LEASE_S + 1)
            store.reap()
            store.reap()
            assert store.info().leases_expired == so_far
        store.release(claimed(store).lease)
        assert store.info().leases_expired == 3
