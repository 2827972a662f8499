"""Staging, accepting and refusing jobs; looking at them; ending them."""

import pytest

from loramill.schemas.job import JobError, JobStatus
from loramill.store.contract import RETENTION_S, STAGING_S
from loramill.store.errors import JobNotFound, StoreError, StoreRefused
from loramill.store.packing import unpack_shard
from loramill.store.records import DoneRow, Job, Reaped, ShardInfo, ShardState, Verdict
from tests.contract.building import a_chunk, a_manifest, a_shard, a_spec, claimed, line_of, rows_of, submitted
from tests.contract.places import Place


def test_a_staged_job_is_seen_by_no_worker(place: Place) -> None:
    with place.open() as store:
        manifest = a_manifest()
        store.publish(manifest)
        store.stage(a_spec("j", metadata={"k": "v"}))
        store.add_shard("j", a_shard(0, 3))
        assert store.claim("w", manifest.id) is None
        assert store.ready() == {}
        assert store.job("j").status is JobStatus.VALIDATING
        assert store.job("j").spec == a_spec("j", metadata={"k": "v"})
        assert [shard.state for shard in store.shards("j")] == [ShardState.STAGED]


def test_an_id_is_taken_once(place: Place) -> None:
    with place.open() as store:
        store.stage(a_spec("j"))
        with pytest.raises(StoreRefused, match="j"):
            store.stage(a_spec("j", priority=3))
        assert store.job("j").spec.priority == 0


def test_accepting_makes_all_shards_ready_at_once(place: Place) -> None:
    with place.open() as store:
        store.stage(a_spec("j", window_s=60.0))
        place.clock.advance(1)
        store.add_shard("j", a_shard(0, 3, "a"))
        store.add_shard("j", a_shard(1, 4, "ab"))
        job = store.accept("j")
        now = place.clock.now_ms
        assert job == store.job("j") == Job(
            spec=a_spec("j", window_s=60.0), status=JobStatus.IN_PROGRESS, total=7, completed=0, failed=0,
            prompt_tokens=0, completion_tokens=0, shards=2, shards_done=0, chunks=0, created_ms=now - 1000,
            accepted_ms=now, expires_ms=now + 60_000,
        )  # fmt: skip
        assert store.ready() == {a_manifest().base_id: 2}
        assert store.info().pending_rows == 7
        assert store.shards("j") == [
            ShardInfo(0, ShardState.READY, 3, 0, ("a",), 0, None),
            ShardInfo(1, ShardState.READY, 4, 0, ("a", "b"), 0, None),
        ]


def test_nothing_is_added_to_what_is_not_staged(place: Place) -> None:
    with place.open() as store:
        submitted(store, "accepted", a_shard())
        for job_id in ("accepted", "never"):
            with pytest.raises(JobNotFound):
                store.add_shard(job_id, a_shard(1))
            with pytest.raises(JobNotFound):
                store.add_results(job_id, [DoneRow(9, True, b"x")])
        with pytest.raises(JobNotFound):
            store.accept("never")
        with pytest.raises(JobNotFound):
            store.refuse("never", [])
        assert store.job("accepted").total == 4


def test_accepting_again_changes_nothing(place: Place) -> None:
    """Whoever did not hear that it was accepted asks once more."""
    with place.open() as store:
        submitted(store, "j", a_shard())
        job, ready = store.job("j"), store.ready()
        place.clock.advance(5)
        assert store.accept("j") == job
        assert store.ready() == ready


def test_a_job_without_shards_is_completed_by_its_acceptance(place: Place) -> None:
    with place.open() as store:
        store.stage(a_spec("j"))
        store.add_results("j", [DoneRow(0, True, b"bad", 1, 2), DoneRow(4, False, b"good", 3, 4)])
        store.add_results("j", [DoneRow(7, True, b"worse")])
        job = store.accept("j")
        assert (job.status, job.total, job.completed, job.failed) == (JobStatus.COMPLETED, 3, 1, 2)
        assert (job.prompt_tokens, job.completion_tokens, job.ended_ms) == (4, 6, place.clock.now_ms)
        assert {number: row.line for number, row in rows_of(store, "j").items()} == {0: b"bad", 4: b"good", 7: b"worse"}


def test_a_refused_job_has_failed_with_its_errors(place: Place) -> None:
    with place.open() as store:
        store.stage(a_spec("j"))
        store.add_shard("j", a_shard())
        errors = [JobError(code="invalid_json", message="line 3 is not JSON", line=3), JobError(code="x", message="y")]
        job = store.refuse("j", errors)
        assert (job.status, job.errors, job.ended_ms) == (JobStatus.FAILED, tuple(errors), place.clock.now_ms)
        assert store.job("j") == job
        assert store.ready() == {}
        store.purge("j")


def test_abandoning_leaves_no_trace(place: Place) -> None:
    with place.open() as store:
        store.stage(a_spec("j"))
        store.add_shard("j", a_shard())
        store.abandon("j")
        store.abandon("j")
        with pytest.raises(JobNotFound):
            store.job("j")
        assert store.jobs() == []
        store.stage(a_spec("j"))
        assert store.job("j").total == 0


def test_an_accepted_job_cannot_be_abandoned(place: Place) -> None:
    """A submit whose acceptance was done and not heard of cleans up after itself: nothing of the job may go."""
    with place.open() as store:
        submitted(store, "j", a_shard(0, 2))
        store.abandon("j")
        assert store.job("j").status is JobStatus.IN_PROGRESS
        assert store.read_shard("j", 0) == [(0, line_of(0)), (1, line_of(1))]


def test_a_submit_that_goes_quiet_is_removed(place: Place) -> None:
    with place.open() as store:
        store.stage(a_spec("quiet"))
        store.stage(a_spec("slow"))
        place.clock.advance(STAGING_S - 1)
        store.add_shard("slow", a_shard())
        assert store.reap() == Reaped()
        place.clock.advance(2)
        assert store.reap() == Reaped(abandoned=1)
        with pytest.raises(JobNotFound):
            store.accept("quiet")
        assert store.accept("slow").total == 4


def test_shards_are_read_as_they_were_written(place: Place) -> None:
    with place.open() as store:
        shard = a_shard(3, 5)
        submitted(store, "j", shard)
        assert store.read_shard("j", 3) == list(shard.rows)
        assert unpack_shard(store.read_shard_blob("j", 3)) == list(shard.rows)


def test_every_question_about_an_unknown_job_is_refused(place: Place) -> None:
    with place.open() as store:
        for ask in (store.job, store.shards, store.events, store.results, store.cancel, store.purge):
            with pytest.raises(JobNotFound, match="nobody"):
                ask("nobody")
        with pytest.raises(JobNotFound):
            store.read_shard("nobody", 0)
        with pytest.raises(JobNotFound):
            store.jobs(after="nobody")


def test_jobs_come_newest_first_page_by_page(place: Place) -> None:
    with place.open() as store:
        for name in "cabd":
            store.stage(a_spec(name))
            place.clock.advance(1)
        assert [job.id for job in store.jobs()] == ["d", "b", "a", "c"]
        assert [job.id for job in store.jobs(limit=2)] == ["d", "b"]
        assert [job.id for job in store.jobs(after="b", limit=1)] == ["a"]
        assert [job.id for job in store.jobs(after="c")] == []


def test_events_are_numbered_from_one(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 2))
        place.clock.advance(5)
        claim = claimed(store)
        store.commit(claim.lease, a_chunk(0, [0, 1]))
        events = store.events("j")
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert events[-1].at_ms == place.clock.now_ms
        assert store.events("j", after=1) == events[1:]
        assert store.events("j", after=len(events)) == []


def test_cancelling_keeps_what_is_finished(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 2), a_shard(1, 2))
        claim = claimed(store)
        store.commit(claim.lease, a_chunk(0, [0]))
        job = store.cancel("j")
        assert (job.status, job.cancelled_ms) == (JobStatus.CANCELLING, place.clock.now_ms)
        assert [shard.state for shard in store.shards("j")] == [ShardState.LEASED, ShardState.DROPPED]
        assert store.ready() == {}
        assert store.pulse([claim.lease], renew=True) == [Verdict.OVER]
        place.clock.advance(1)
        assert store.cancel("j") == job, "one that is ending stays as it is"
        store.commit(claim.lease, a_chunk(0, [1]))
        ended = store.job("j")
        assert (ended.status, ended.completed, ended.ended_ms) == (JobStatus.CANCELLED, 2, place.clock.now_ms)
        assert store.cancel("j") == ended
        assert sorted(rows_of(store, "j")) == [0, 1]


def test_a_release_ends_a_cancelled_job(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 2))
        claim = claimed(store)
        store.cancel("j")
        store.release(claim.lease)
        assert store.job("j").status is JobStatus.CANCELLED
        assert [shard.state for shard in store.shards("j")] == [ShardState.DROPPED]


def test_a_lost_lease_ends_a_cancelled_job(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 2))
        claim = claimed(store)
        store.cancel("j")
        place.clock.advance(claim.lease.seconds + 1)
        assert store.reap() == Reaped(leases=1)
        assert store.job("j").status is JobStatus.CANCELLED


def test_a_cancel_without_leases_ends_at_once(place: Place) -> None:
    with place.open() as store:
        submitted(store, "waiting", a_shard(0, 2))
        store.stage(a_spec("staged"))
        for name in ("waiting", "staged"):
            assert store.cancel(name).status is JobStatus.CANCELLED
        with pytest.raises(JobNotFound):
            store.add_shard("staged", a_shard())


def test_a_job_whose_window_passed_expires(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 2), a_shard(1, 2), window_s=10.0)
        claim = claimed(store)
        place.clock.advance(9)
        assert store.reap() == Reaped()
        place.clock.advance(2)
        assert store.reap() == Reaped(expired=1)
        assert store.job("j").status is JobStatus.FINALIZING
        assert store.pulse([claim.lease], renew=False) == [Verdict.OVER]
        store.commit(claim.lease, a_chunk(0, [0]))
        store.release(claim.lease)
        job = store.job("j")
        assert (job.status, job.completed, job.ended_ms) == (JobStatus.EXPIRED, 1, place.clock.now_ms)
        assert store.reap() == Reaped()


def test_only_ended_jobs_are_purged(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 2))
        with pytest.raises(StoreRefused, match="j"):
            store.purge("j")
        assert store.read_shard("j", 0)
        store.cancel("j")
        store.purge("j")
        with pytest.raises(JobNotFound):
            store.job("j")


def test_ended_jobs_go_when_nobody_will_want_them(place: Place) -> None:
    with place.open() as store:
        submitted(store, "ended", a_shard(0, 2))
        store.cancel("ended")
        submitted(store, "waiting", a_shard(0, 2))
        place.clock.advance(RETENTION_S - 1)
        assert store.reap() == Reaped()
        place.clock.advance(2)
        assert store.reap() == Reaped(purged=1)
        assert [job.id for job in store.jobs()] == ["waiting"]


def test_retention_is_the_operators(place: Place) -> None:
    with place.open(retention_s=10.0) as store:
        submitted(store, "j", a_shard(0, 2))
        store.cancel("j")
        place.clock.advance(11)
        assert store.reap() == Reaped(purged=1)


def test_blobs_are_kept_by_their_hash(place: Place) -> None:
    with place.open() as store:
        digest = store.put_blob(b"tokenizer")
        assert store.put_blob(b"tokenizer") == digest
        assert store.has_blob(digest)
        assert store.get_blob(digest) == b"tokenizer"
        assert not store.has_blob("0" * 64)
        with pytest.raises(StoreError, match="0000"):
            store.get_blob("0" * 64)


def test_all_of_it_is_there_for_another_handle(place: Place) -> None:
    with place.open() as first, place.open() as second:
        submitted(first, "j", a_shard(0, 2))
        claim = claimed(second)
        assert first.shards("j")[0].worker == "w"
        first.commit(claim.lease, a_chunk(0, [0, 1]))
        assert second.job("j").status is JobStatus.COMPLETED
        assert rows_of(second, "j") == rows_of(first, "j")
        assert first.info().id == second.info().id
