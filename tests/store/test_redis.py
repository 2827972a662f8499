"""What only the Redis store must stand: restarts, a full server, dropped connections. More is in tests/contract."""

import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loramill.schemas.job import JobStatus
from loramill.store.errors import Fenced, StoreError, StoreFull, StoreLost, StoreRefused, StoreUnreachable
from loramill.store.records import Claim, Committed, DoneRow, Lease, Reaped, ShardState, Verdict
from loramill.store.redis_store import LOOK_ON, RedisStore
from loramill.store.shelf import Record, Shelf
from tests.contract.building import a_chunk, a_manifest, a_shard, a_spec, a_worker, claimed, rows_of, submitted
from tests.servers import RedisServer


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[RedisStore]:
    """An empty one on the server that tests share."""
    with RedisStore(redis_server.url, prefix=uuid.uuid4().hex) as store:
        yield store


# Restarts.


def test_a_killed_server_comes_back_with_everything(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(appendfsync="always")
    with RedisStore(server.url) as store:
        submitted(store, "j", a_shard(0, 3), a_shard(1, 3))
        before = claimed(store)
        store.commit(before.lease, a_chunk(0, [0]))
        job, rows = store.job("j"), rows_of(store, "j")
        server.kill()
        with pytest.raises(StoreUnreachable):
            store.job("j")
        server.start()
        assert (store.job("j"), rows_of(store, "j")) == (job, rows)
        assert store.commit(before.lease, a_chunk(0, [1, 2])) == Committed(2, True), "nobody claimed it meanwhile"
        after = claimed(store)
        assert after.lease.epoch != before.lease.epoch


def test_a_token_is_never_given_twice_though_the_counter_is(
    new_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    server, old = new_redis(appendfsync="always"), tmp_path / "old"
    claims: list[Claim] = []
    with RedisStore(server.url) as store:
        submitted(store, "j", a_shard(0, 3))
        store.publish(a_manifest())
        server.kill()
        shutil.copytree(server.folder, old)
        for _ in range(3):
            server.start()
            claims.append(claimed(store))
            server.kill()
            shutil.rmtree(server.folder)
            shutil.copytree(old, server.folder)
        server.start()
        last = claimed(store)
        assert {claim.lease.counter for claim in [*claims, last]} == {last.lease.counter}, "each was rolled back"
        assert len({claim.lease.token for claim in [*claims, last]}) == 4
        for claim in claims:
            assert store.pulse([claim.lease], renew=True) == [Verdict.FENCED]
            with pytest.raises(Fenced):
                store.commit(claim.lease, a_chunk(0, [0, 1, 2]))
        assert store.commit(last.lease, a_chunk(0, [0, 1, 2])) == Committed(3, True)


LEASE = Lease("j", 0, 1, 1, 30.0)
RECORD = Record("file", "f", "me", b"", 0, 1, 0, None)
EVERYTHING: dict[str, Callable[[RedisStore], object]] = {
    "stage": lambda store: store.stage(a_spec("k")),
    "add_shard": lambda store: store.add_shard("j", a_shard()),
    "add_results": lambda store: store.add_results("j", [DoneRow(0, True, b"x")]),
    "accept": lambda store: store.accept("j"),
    "refuse": lambda store: store.refuse("j", []),
    "abandon": lambda store: store.abandon("j"),
    "job": lambda store: store.job("j"),
    "jobs": lambda store: store.jobs(),
    "shards": lambda store: store.shards("j"),
    "events": lambda store: store.events("j"),
    "results": lambda store: store.results("j"),
    "read_shard": lambda store: store.read_shard("j", 0),
    "cancel": lambda store: store.cancel("j"),
    "purge": lambda store: store.purge("j"),
    "claim": lambda store: store.claim("w", a_manifest().id),
    "reclaim": lambda store: store.reclaim("w", LEASE),
    "pulse": lambda store: store.pulse([LEASE], renew=True),
    "commit": lambda store: store.commit(LEASE, a_chunk(0, [0])),
    "strike": lambda store: store.strike(LEASE, 0),
    "release": lambda store: store.release(LEASE),
    "reap": lambda store: store.reap(),
    "ready": lambda store: store.ready(),
    "backlog": lambda store: store.backlog(),
    "publish": lambda store: store.publish(a_manifest()),
    "manifests": lambda store: store.manifests(),
    "hello": lambda store: store.hello(a_worker("w", a_manifest())),
    "goodbye": lambda store: store.goodbye("w"),
    "workers": lambda store: store.workers(),
    "put_blob": lambda store: store.put_blob(b"x"),
    "get_blob": lambda store: store.get_blob("0"),
    "has_blob": lambda store: store.has_blob("0"),
    "info": lambda store: store.info(),
    "shelf.put": lambda store: store.shelf.put("file", "f", "me", b"{}"),
    "shelf.get": lambda store: store.shelf.get("file", "f"),
    "shelf.replace": lambda store: store.shelf.replace(RECORD, b"{}"),
    "shelf.remove": lambda store: store.shelf.remove("file", "f"),
    "shelf.records": lambda store: store.shelf.records("file"),
    "shelf.overdue": lambda store: store.shelf.overdue("file"),
    "shelf.usage": lambda store: store.shelf.usage("file", "me"),
    "shelf.put_piece": lambda store: store.shelf.put_piece("c", 0, b"x"),
    "shelf.piece": lambda store: store.shelf.piece("c", 0),
    "shelf.remove_content": lambda store: store.shelf.remove_content("c"),
    "shelf.lock": lambda store: store.shelf.lock("l", "me", 9.0),
    "shelf.unlock": lambda store: store.shelf.unlock("l", "me"),
    "shelf.say": lambda store: store.shelf.say("c", b"x"),
    "shelf.heard": lambda store: store.shelf.heard("c"),
}


def test_a_server_that_forgot_everything_is_noticed_by_every_method(new_redis: Callable[..., RedisServer]) -> None:
    """Never `0 jobs`: neither while the store is gone, nor once somebody made another in its place."""
    server = new_redis(appendonly="no")
    with RedisStore(server.url, volatile=True) as store:
        submitted(store, "j", a_shard())
        server.kill()
        server.start()
        for again in (False, True):
            for name, act in EVERYTHING.items():
                with pytest.raises(StoreLost, match="not the store that it was"):
                    act(store)
                    pytest.fail(f"{name} noticed nothing")
            if not again:
                with pytest.raises(StoreLost, match="nothing was ever submitted"):
                    RedisStore(server.url, volatile=True, create=False)
                RedisStore(server.url, volatile=True).close()


def test_every_method_is_in_that_list() -> None:
    public = {name for name in vars(RedisStore.__mro__[1]) if not name.startswith("_")}
    assert public - set(EVERYTHING) == {"close", "read_shard_blob", "shelf"}
    assert {f"shelf.{name}" for name in vars(Shelf) if not name.startswith("_")} <= set(EVERYTHING)


# Full.


def test_a_full_server_refuses_what_adds_and_takes_what_ends(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    with RedisStore(server.url) as store:
        submitted(store, "j", a_shard(0, 3), a_shard(1, 3))
        submitted(store, "waiting", a_shard(0, 3))
        store.stage(a_spec("staged"))
        store.add_shard("staged", a_shard(0, 3))
        first, second = claimed(store), claimed(store)
        before = [*store.jobs(), *store.shards("j")]
        server.cli("CONFIG", "SET", "maxmemory", "1")
        adding: list[Callable[[], object]] = [
            lambda: store.stage(a_spec("new")),
            lambda: store.add_shard("staged", a_shard(1, 3)),
            lambda: store.add_results("staged", [DoneRow(0, True, b"x")]),
            lambda: store.accept("staged"),
            lambda: store.commit(first.lease, a_chunk(0, [0, 1, 2])),
            lambda: store.claim("w", a_manifest().id),
            lambda: store.put_blob(b"x"),
        ]
        for add in adding:
            with pytest.raises(StoreFull, match="maxmemory"):
                add()
        assert [*store.jobs(), *store.shards("j")] == before, "nothing is there by half"
        assert store.info().warnings

        assert store.pulse([first.lease, second.lease], renew=True) == [Verdict.HELD, Verdict.HELD]
        assert store.strike(first.lease, 2) == 1
        store.release(first.lease, suspects=[1])
        assert store.cancel("waiting").status is JobStatus.CANCELLED
        store.hello(a_worker("w", a_manifest()))
        store.goodbye("w")
        assert store.reap() == Reaped()
        store.purge("waiting")
        store.abandon("staged")
        server.cli("CONFIG", "SET", "maxmemory", "0")
        assert [job.id for job in store.jobs()] == ["j"]
        assert store.shards("j")[0].suspects == {1: 0, 2: 1}
        assert store.commit(second.lease, a_chunk(1, [0, 1, 2])) == Committed(3, True)


def test_a_server_that_fills_up_holds_whole_shards(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(maxmemory="3mb")
    with RedisStore(server.url) as store:
        store.stage(a_spec("j"))
        added = 0
        with pytest.raises(StoreFull):
            while added < 10_000:
                store.add_shard("j", a_shard(added, 200))
                added += 1
        assert added > 10
        assert (store.job("j").total, store.job("j").shards, len(store.shards("j"))) == (200 * added, added, added)
        store.abandon("j")
        store.stage(a_spec("k"))


def test_a_server_that_cannot_write_its_snapshot_is_full(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(appendonly="no", save="3600 1")
    with RedisStore(server.url) as store:
        assert store.info().durable and "snapshot" in store.info().warnings[0]
        shutil.rmtree(server.folder)
        server.cli("BGSAVE")
        give_up = time.monotonic() + 10
        while server.client().info("persistence")["rdb_last_bgsave_status"] == "ok":
            assert time.monotonic() < give_up
            time.sleep(0.02)
        with pytest.raises(StoreFull, match="MISCONF"):
            store.stage(a_spec("j"))
        assert "could not write" in store.info().warnings[1]


# Connections.


def test_dropped_connections_and_forgotten_scripts_go_unnoticed(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    with RedisStore(server.url) as store:
        submitted(store, "j", *(a_shard(number, 1) for number in range(10)))
        store.publish(a_manifest())
        for number in range(10):
            server.cli("SCRIPT", "FLUSH")
            claim = store.claim("w", a_manifest().id)
            assert claim is not None
            server.cli("CLIENT", "KILL", "TYPE", "normal")
            assert store.commit(claim.lease, a_chunk(number, [0])) == Committed(1, True)
        assert store.job("j").status is JobStatus.COMPLETED


def test_a_server_that_hangs_is_unreachable_and_then_it_is_not(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    with RedisStore(server.url, timeout_s=0.2) as store:
        submitted(store, "j", a_shard())
        server.pause()
        began = time.monotonic()
        for act in (lambda: store.job("j"), lambda: store.cancel("j")):
            with pytest.raises(StoreUnreachable, match="does not answer"):
                act()
        assert time.monotonic() - began < 3
        server.resume()
        assert store.job("j").total == 4


# What is shared.


def test_two_prefixes_do_not_see_each_other(redis_server: RedisServer) -> None:
    one, two = (RedisStore(redis_server.url, prefix=uuid.uuid4().hex) for _ in range(2))
    with one, two:
        submitted(one, "j", a_shard())
        one.publish(a_manifest())
        assert two.jobs() == [] and two.ready() == {} and two.manifests() == []
        with pytest.raises(StoreLost, match="manifest"):
            two.claim("w", a_manifest().id)
        submitted(two, "j", a_shard(0, 9))
        assert (one.job("j").total, two.job("j").total) == (4, 9)
        two.cancel("j")
        two.purge("j")
        assert one.job("j").status is JobStatus.IN_PROGRESS
        assert one.info().id != two.info().id


def test_threads_get_each_shard_once(store: RedisStore) -> None:
    submitted(store, "j", *(a_shard(number, 2) for number in range(200)))
    store.publish(a_manifest())
    found: list[int] = []
    problems: list[BaseException] = []

    def work(name: str) -> None:
        try:
            while claim := store.claim(name, a_manifest().id):
                found.append(claim.lease.shard)
                store.commit(claim.lease, a_chunk(claim.lease.shard, [0, 1]))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(f"w-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert Counter(found) == Counter(range(200))
    assert store.job("j").status is JobStatus.COMPLETED
    assert store.info().pending_rows == 0


# Details of its own.


def test_what_is_sent_again_counts_once(store: RedisStore) -> None:
    store.stage(a_spec("j"))
    for _ in range(2):
        store.add_shard("j", a_shard(0, 3))
        store.add_results("j", [DoneRow(9, True, b"invalid")])
    assert store.accept("j") == store.accept("j")
    job = store.job("j")
    assert (job.total, job.failed, job.shards, job.chunks) == (4, 1, 1, 1)
    assert store.info().pending_rows == 3


def test_a_shard_behind_very_many_that_others_serve_is_found(store: RedisStore) -> None:
    submitted(store, "theirs", *(a_shard(number, 1, "d") for number in range(LOOK_ON + 1)))
    for adapters in ("a", ""):
        submitted(store, f"mine{adapters}", a_shard(0, 1, adapters))
        assert claimed(store, adapters="abc").lease.job == f"mine{adapters}"
    store.publish(a_manifest("abc"))
    assert store.claim("w", a_manifest("abc").id) is None


def test_a_purge_leaves_nothing(store: RedisStore, redis_server: RedisServer) -> None:
    prefix = store._link.prefix
    before = set(redis_server.cli("KEYS", f"{prefix}:*"))
    submitted(store, "j", a_shard(0, 2, "a"), a_shard(5, 2), window_s=50.0)
    claim = claimed(store, resident=["a"])
    store.commit(claim.lease, a_chunk(0, [0]))
    store.cancel("j")
    store.release(claim.lease)
    assert [shard.state for shard in store.shards("j")] == [ShardState.DROPPED, ShardState.DROPPED]
    store.purge("j")
    left = {key.decode() for key in set(redis_server.cli("KEYS", f"{prefix}:*")) - before}
    manifest = a_manifest().id
    kept = ("bases", "manifests", f"manifest:{manifest}", f"manifest:{manifest}:adapters")
    assert left == {f"{prefix}:{key}" for key in kept}


def test_events_say_what_became_of_shards(redis_server: RedisServer) -> None:
    now = 1_800_000_000.0
    with RedisStore(redis_server.url, prefix=uuid.uuid4().hex, clock=lambda: now) as store:
        submitted(store, "j", a_shard(0, 3), window_s=100.0)
        store.release(claimed(store).lease, suspects=[0, 2])
        store.strike(claimed(store, "w-2").lease, 2)
        now += 31
        store.reap()
        now += 100
        store.reap()
        assert [event.what for event in store.events("j")] == [
            "accepted",
            "the engine died with 2 rows of shard 0 in it",
            "the engine died with row 2 of shard 0 alone in it",
            "shard 0 taken back: w-2 was not heard of in time",
            "finalizing",
            "expired",
        ]


def test_rows_that_a_shard_does_not_have_are_refused(store: RedisStore) -> None:
    submitted(store, "j", a_shard(0, 3))
    claim = claimed(store)
    with pytest.raises(StoreError, match="does not have"):
        store.commit(claim.lease, a_chunk(0, [0, 3]))
    assert store.job("j").completed == 0


def test_another_format_is_refused_with_both(store: RedisStore, redis_server: RedisServer) -> None:
    prefix = store._link.prefix
    redis_server.cli("HSET", f"{prefix}:store", "format", 99)
    with pytest.raises(StoreRefused, match="format 99, and this loramill uses format 2"):
        RedisStore(redis_server.url, prefix=prefix)
