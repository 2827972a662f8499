"""What is Redis' own about the shelf: a full server, keys that go by themselves, and none that stays. More is in
tests/contract."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from loramill.schemas.job import Lane
from loramill.store.errors import StoreFull, StoreUnreachable
from loramill.store.redis_store import RedisStore
from loramill.store.shelf import SAID_TTL_S, RecordExists, RecordNotFound, Usage
from tests.contract.building import a_chunk, a_manifest, a_shard, submitted
from tests.servers import RedisServer


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[RedisStore]:
    """An empty one on the server that tests share."""
    with RedisStore(redis_server.url, prefix=uuid.uuid4().hex) as store:
        yield store


def keys(store: RedisStore, server: RedisServer) -> set[str]:
    """Those of the store, without its prefix."""
    prefix = store._link.prefix
    return {key.decode().removeprefix(f"{prefix}:") for key in server.cli("KEYS", f"{prefix}:*")}


def test_a_full_server_refuses_what_adds_and_takes_what_ends(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    with RedisStore(server.url) as store:
        shelf = store.shelf
        batch, late = shelf.put("batch", "b", "me", b"1", size=3), shelf.put("batch", "c", "me", b"2", size=4)
        shelf.put_piece("c", 0, b"x")
        shelf.lock("l", "me", 60.0)
        server.cli("CONFIG", "SET", "maxmemory", "1")
        adding: list[Callable[[], object]] = [
            lambda: shelf.put("batch", "d", "me", b"", size=1),
            lambda: shelf.put_piece("c", 1, b"x"),
            lambda: shelf.say("c", b"x"),
        ]
        for add in adding:
            with pytest.raises(StoreFull, match="maxmemory"):
                add()
        assert shelf.records("batch") == [late, batch] and shelf.usage("batch", "me") == Usage(2, 7)
        with pytest.raises(RecordNotFound):
            shelf.get("batch", "d")
        assert shelf.replace(batch, b"cancelled").data == b"cancelled"
        assert shelf.lock("l", "me", 60.0) and shelf.lock("another", "me", 60.0)
        shelf.unlock("l", "me")
        assert shelf.piece("c", 0) == b"x"
        assert shelf.overdue("batch") == shelf.heard("c") == []
        shelf.remove_content("c")
        assert shelf.remove("batch", "c")
        server.cli("CONFIG", "SET", "maxmemory", "0")
        shelf.put("batch", "d", "me", b"", size=1)
        assert shelf.usage("batch", "me") == Usage(2, 4)


def test_what_was_removed_leaves_no_key(store: RedisStore, redis_server: RedisServer) -> None:
    shelf = store.shelf
    shelf.put("file", "f", "me", b"1", size=3, ttl_s=60.0)
    shelf.put("file", "g", "me", b"1")
    shelf.put_piece("c", 0, b"x")
    shelf.lock("l", "me", 60.0)
    assert len(keys(store, redis_server)) > 5
    shelf.remove("file", "f")
    shelf.remove("file", "g")
    shelf.remove_content("c")
    shelf.unlock("l", "me")
    assert keys(store, redis_server) == {"store"}


def test_an_ended_question_leaves_no_key(store: RedisStore, redis_server: RedisServer) -> None:
    store.publish(a_manifest())
    before = keys(store, redis_server)
    submitted(store, "q", a_shard(0, 1, "a"), lane=Lane.ASK)
    claim = store.claim("w", a_manifest().id, lane=Lane.ASK)
    assert claim is not None
    store.commit(claim.lease, a_chunk(0, [0]))
    assert "answered" in keys(store, redis_server)
    store.purge("q")
    assert keys(store, redis_server) == before


def test_what_was_said_and_who_held_a_lock_goes_by_itself(store: RedisStore, redis_server: RedisServer) -> None:
    prefix = store._link.prefix
    store.shelf.say("c", b"1")
    redis_server.cli("PEXPIRE", f"{prefix}:said:c", 1000)
    store.shelf.say("c", b"2")
    left_ms = redis_server.cli("PTTL", f"{prefix}:said:c")
    assert SAID_TTL_S * 1000 - 60_000 < left_ms <= SAID_TTL_S * 1000, "after the last that was said"
    store.shelf.lock("l", "me", 30.0)
    assert 30_000 < redis_server.cli("PTTL", f"{prefix}:lock:l") <= 90_000, "not before its time is up"


def test_two_prefixes_do_not_see_each_other(redis_server: RedisServer) -> None:
    one, two = (RedisStore(redis_server.url, prefix=uuid.uuid4().hex) for _ in range(2))
    with one, two:
        one.shelf.put("file", "f", "me", b"1", size=1)
        one.shelf.lock("l", "me", 60.0)
        one.shelf.say("c", b"x")
        assert two.shelf.records("file") == two.shelf.heard("c") == []
        assert two.shelf.usage("file", "me") == Usage()
        assert two.shelf.lock("l", "you", 60.0)
        two.shelf.put("file", "f", "you", b"2")
        assert one.shelf.get("file", "f").owner == "me"


def test_a_put_that_may_have_arrived_is_not_lost(new_redis: Callable[..., RedisServer]) -> None:
    """A server that hangs has it or not; whoever puts it again hears which."""
    server = new_redis()
    with RedisStore(server.url, timeout_s=0.2) as store:
        server.pause()
        with pytest.raises(StoreUnreachable, match="does not answer"):
            store.shelf.put("file", "f", "me", b"1", size=1)
        server.resume()
        with suppress(RecordExists):
            store.shelf.put("file", "f", "me", b"1", size=1)
        assert store.shelf.get("file", "f").data == b"1"
        assert store.shelf.usage("file", "me") == Usage(1, 1)
