"""Claims, leases, commits; and who there is to make them."""

import threading
from collections import Counter

import pytest

from loramill.schemas.job import JobStatus
from loramill.store.contract import AFFINITY_S, DEADLINE_LEAD_S, LEASE_S, PER_ADAPTER, PRIORITY_S, WORKER_TTL_S
from loramill.store.errors import Fenced, StoreLost
from loramill.store.records import Claim, Committed, Lease, Reaped, ShardState, Verdict
from tests.contract.building import a_chunk, a_manifest, a_shard, a_worker, claimed, rows_of, submitted
from tests.contract.places import ModelPlace, Place

NOT_A_LEASE = Lease("nobody", 0, 1, 1, 1.0)


def test_a_claim_says_what_there_is_to_run(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(7, 5, "ac"))
        claim = claimed(store, "w-1")
        assert (claim.lease.job, claim.lease.shard, claim.lease.seconds) == ("j", 7, LEASE_S)
        assert (claim.rows, claim.adapters, claim.suspects, claim.attempts) == (5, ("a", "c"), {}, 0)
        assert not any(claim.is_done(position) for position in range(5))
        [shard] = store.shards("j")
        assert (shard.state, shard.worker) == (ShardState.LEASED, "w-1")
        assert store.claim("w-2", a_manifest().id) is None, "a shard is one worker's"


def test_a_worker_gets_only_what_its_manifest_can_serve(place: Place) -> None:
    with place.open() as store:
        submitted(store, "foreign", a_shard(0, 1), base="another")
        submitted(store, "needs-d", a_shard(0, 1, "ad"))
        submitted(store, "needs-three", a_shard(0, 1, "abc"))
        two = a_manifest("abc", max_loras=2)
        store.publish(two)
        assert store.claim("w", two.id) is None
        assert claimed(store, adapters="abc").lease.job == "needs-three"
        assert claimed(store, adapters="ad").lease.job == "needs-d"
        assert store.ready() == {a_manifest(base="another").base_id: 1}


def test_shards_that_a_worker_cannot_serve_hide_none_that_it_can(place: Place) -> None:
    with place.open() as store:
        submitted(store, "first", *(a_shard(number, 1, "d") for number in range(200)))
        place.clock.advance(1)
        submitted(store, "second", a_shard(0, 1, "a"))
        assert claimed(store, adapters="abc").lease.job == "second"


def test_an_unknown_manifest_is_refused(place: Place) -> None:
    with place.open() as store, pytest.raises(StoreLost, match="manifest"):
        store.claim("w", "nobody's")


def test_the_oldest_comes_first_then_by_id_and_number(place: Place) -> None:
    with place.open() as store:
        submitted(store, "old", a_shard(1, 1), a_shard(0, 1))
        place.clock.advance(1)
        submitted(store, "b", a_shard(0, 1))
        submitted(store, "a", a_shard(0, 1))
        order = [(claim.lease.job, claim.lease.shard) for claim in (claimed(store) for _ in range(4))]
        assert order == [("old", 0), ("old", 1), ("a", 0), ("b", 0)]


def test_priority_is_worth_time(place: Place) -> None:
    with place.open() as store:
        submitted(store, "old", a_shard())
        place.clock.advance(PRIORITY_S - 1)
        submitted(store, "urgent", a_shard(), priority=1)
        place.clock.advance(2)
        submitted(store, "late", a_shard(), priority=1)
        submitted(store, "low", a_shard(), priority=-100)
        assert [claimed(store).lease.job for _ in range(4)] == ["urgent", "old", "late", "low"]


def test_a_deadline_that_is_near_comes_first(place: Place) -> None:
    with place.open() as store:
        submitted(store, "old", a_shard())
        place.clock.advance(100)
        submitted(store, "roomy", a_shard(), window_s=2 * DEADLINE_LEAD_S)
        submitted(store, "near", a_shard(), window_s=DEADLINE_LEAD_S - 200)
        assert [claimed(store).lease.job for _ in range(3)] == ["near", "old", "roomy"]


def test_resident_adapters_come_first_as_far_as_that_goes(place: Place) -> None:
    with place.open() as store:
        submitted(store, "old", a_shard(0, 1, "a"))
        place.clock.advance(AFFINITY_S / 2)
        submitted(store, "half", a_shard(0, 1, "ab"))
        place.clock.advance(1)
        submitted(store, "whole", a_shard(0, 1, "b"))
        place.clock.advance(AFFINITY_S)
        submitted(store, "late", a_shard(0, 1, "b"), a_shard(1, 1, ""))
        order = [(claim.lease.job, claim.lease.shard) for claim in (claimed(store, resident=["b"]) for _ in range(5))]
        assert order == [("whole", 0), ("old", 0), ("half", 0), ("late", 0), ("late", 1)]


def test_of_equals_the_lower_rank(place: Place) -> None:
    with place.open() as store:
        submitted(store, "b", a_shard(0, 1, "a"))
        place.clock.advance(AFFINITY_S)
        submitted(store, "a", a_shard(0, 1, "b"))
        assert claimed(store, resident=["b"]).lease.job == "b"


def test_a_resident_adapter_is_found_behind_many_others(place: Place) -> None:
    with place.open() as store:
        submitted(store, "many", *(a_shard(number, 1, "a") for number in range(300)))
        place.clock.advance(1)
        submitted(store, "one", *(a_shard(number, 1, "b") for number in range(PER_ADAPTER + 1)))
        found = [claimed(store, resident=["b"]).lease.job for _ in range(PER_ADAPTER + 2)]
        assert found == ["one"] * (PER_ADAPTER + 1) + ["many"]


def test_rows_that_are_done_come_with_the_next_claim(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 20))
        first = claimed(store)
        assert store.commit(first.lease, a_chunk(0, [17, 0, 8], failed=[8])) == Committed(3, False)
        store.release(first.lease)
        again = claimed(store, "w-2")
        assert [position for position in range(20) if again.is_done(position)] == [0, 8, 17]
        assert again.attempts == 0, "released without blame"
        assert (store.job("j").completed, store.job("j").failed) == (2, 1)
        assert (store.job("j").prompt_tokens, store.job("j").completion_tokens) == (9, 25)


def test_a_shard_is_done_with_its_last_row_and_the_job_with_its_last_shard(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 2), a_shard(1, 1))
        first, second = claimed(store), claimed(store)
        store.commit(first.lease, a_chunk(0, [1]))
        assert store.commit(first.lease, a_chunk(0, [0, 1], by="late")) == Committed(1, True)
        assert store.job("j").status is JobStatus.IN_PROGRESS
        assert store.job("j").shards_done == 1
        assert store.pulse([first.lease], renew=True) == [Verdict.FENCED], "the lease is over with the shard"
        place.clock.advance(1)
        assert store.commit(second.lease, a_chunk(1, [0])) == Committed(1, True)
        job = store.job("j")
        assert (job.status, job.ended_ms, job.completed) == (JobStatus.COMPLETED, place.clock.now_ms, 3)
        assert job.chunks == len(store.results("j", 0, 16))
        assert [shard.worker for shard in store.shards("j")] == [None, None]


def test_the_first_result_of_a_row_stays(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 3))
        claim = claimed(store)
        store.commit(claim.lease, a_chunk(0, [0, 1], by="first"))
        assert store.commit(claim.lease, a_chunk(0, [0, 1], by="first")) == Committed(0, False), "the same again"
        assert store.commit(claim.lease, a_chunk(0, [0, 2], by="next", failed=[0])) == Committed(1, True)
        assert (store.job("j").completed, store.job("j").failed) == (3, 0)
        by = [row.line.split(b'"')[-2] for _, row in sorted(rows_of(store, "j").items())]
        assert by == [b"first", b"first", b"next"]


def test_results_come_in_the_order_of_their_commits(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 6))
        claim = claimed(store)
        for position in (3, 0, 5, 1):
            store.commit(claim.lease, a_chunk(0, [position]))
        numbers = [[row.row for row in chunk.rows()] for chunk in store.results("j", 0, 16)]
        assert numbers == [[3], [0], [5], [1]]
        assert [[row.row for row in chunk.rows()] for chunk in store.results("j", 1, 2)] == [[0], [5]]
        assert store.results("j", 4, 16) == []


def test_a_lease_lasts_as_long_as_it_is_renewed(place: Place) -> None:
    with place.open(lease_s=10.0) as store:
        submitted(store, "j", a_shard())
        lease = claimed(store).lease
        assert lease.seconds == 10.0
        for _ in range(3):
            place.clock.advance(9)
            assert store.pulse([lease], renew=True) == [Verdict.HELD]
        place.clock.advance(9)
        assert store.pulse([lease], renew=False) == [Verdict.HELD]
        place.clock.advance(2)
        assert store.pulse([lease], renew=True) == [Verdict.FENCED], "never renewed once it has run out"
        assert store.pulse([lease, NOT_A_LEASE], renew=False) == [Verdict.FENCED, Verdict.FENCED]
        assert store.pulse([], renew=True) == []


def test_nothing_is_done_under_a_lost_lease(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard())
        lost = claimed(store, "w-1").lease
        place.clock.advance(LEASE_S + 1)
        for _ in range(2):  # run out, and then another's
            with pytest.raises(Fenced):
                store.commit(lost, a_chunk(0, [0]))
            with pytest.raises(Fenced):
                store.strike(lost, 0)
            store.release(lost, suspects=[1])
            if store.reap() == Reaped(leases=1):
                kept = claimed(store, "w-2")
        assert (kept.suspects, kept.attempts) == ({}, 1)
        assert store.job("j").completed == 0
        assert store.commit(kept.lease, a_chunk(0, [0])) == Committed(1, False)
        with pytest.raises(Fenced):
            store.commit(NOT_A_LEASE, a_chunk(0, [0]))


def test_a_lost_shard_is_leased_anew_to_the_one_who_had_it(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard())
        first = claimed(store, "w")
        store.commit(first.lease, a_chunk(0, [2]))
        place.clock.advance(LEASE_S + 1)
        second = store.reclaim("w", first.lease)  # nobody has noticed yet
        assert second is not None and second.lease.token != first.lease.token
        assert (second.attempts, second.is_done(2), second.is_done(0)) == (1, True, False)
        place.clock.advance(LEASE_S + 1)
        store.reap()
        third = store.reclaim("w", second.lease)  # taken back, and ready
        assert third is not None and third.attempts == 2
        with pytest.raises(Fenced):
            store.commit(second.lease, a_chunk(0, [0]))
        assert store.reclaim("w", first.lease) is None, "held"
        store.commit(third.lease, a_chunk(0, [0, 1, 3]))
        assert store.reclaim("w", third.lease) is None, "done"
        assert store.reclaim("w", NOT_A_LEASE) is None


def test_a_dropped_shard_is_not_leased_anew(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard())
        claim = claimed(store)
        store.cancel("j")
        store.release(claim.lease)
        assert store.reclaim("w", claim.lease) is None


def test_suspects_and_strikes_go_with_the_shard(place: Place) -> None:
    with place.open() as store:
        submitted(store, "j", a_shard(0, 9))
        first = claimed(store)
        assert [store.strike(first.lease, 4), store.strike(first.lease, 4)] == [1, 2]
        store.release(first.lease, suspects=[4, 7])
        second = claimed(store)
        assert second.suspects == {4: 2, 7: 0}
        assert store.shards("j")[0].suspects == {4: 2, 7: 0}
        assert store.strike(second.lease, 7) == 1
        store.release(second.lease)
        assert claimed(store).suspects == {4: 2, 7: 1}


def test_many_workers_at_once_share_the_shards(place: Place) -> None:
    """Each shard is claimed once, and each row counted once, whatever comes between."""
    if isinstance(place, ModelPlace):
        return  # one thread only
    with place.open() as store:
        submitted(store, "j", *(a_shard(number, 3) for number in range(40)))
        manifest = a_manifest()
        store.publish(manifest)
    claims: list[Claim] = []
    problems: list[BaseException] = []

    def work(name: str) -> None:
        try:
            with place.open() as mine:
                while claim := mine.claim(name, manifest.id):
                    claims.append(claim)
                    mine.commit(claim.lease, a_chunk(claim.lease.shard, [0, 1]))
                    mine.commit(claim.lease, a_chunk(claim.lease.shard, [1, 2], by=name))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(f"w-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert Counter(claim.lease.shard for claim in claims) == Counter(range(40))
    with place.open() as store:
        assert (store.job("j").status, store.job("j").completed) == (JobStatus.COMPLETED, 120)
        assert len(rows_of(store, "j")) == 120


def test_manifests_stay_the_latest_first(place: Place) -> None:
    with place.open() as store:
        for adapters in ("a", "b", "a"):
            store.publish(a_manifest(adapters))
            place.clock.advance(1)
        assert store.manifests() == [a_manifest("a"), a_manifest("b")]
        place.clock.advance(WORKER_TTL_S + 1)
        assert len(store.manifests()) == 2


def test_workers_are_those_that_were_heard_of(place: Place) -> None:
    with place.open() as store:
        one, two = a_worker("w-1", a_manifest()), a_worker("w-2", a_manifest(), resident=("a", "b"), rows_done=5)
        store.hello(two)
        store.hello(one)
        assert store.workers() == [one, two]
        place.clock.advance(WORKER_TTL_S - 1)
        store.hello(a_worker("w-2", a_manifest(), state="draining"))
        place.clock.advance(2)
        assert [(worker.id, worker.state) for worker in store.workers()] == [("w-2", "draining")]
        store.goodbye("w-2")
        store.goodbye("nobody")
        assert store.workers() == []
