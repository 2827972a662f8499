"""Servers that cannot hold a store: each is refused in one line that says why, without the password."""

import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramill.store.errors import StoreError, StoreLost, StoreRefused, StoreUnreachable
from loramill.store.redis_errors import unusable
from loramill.store.redis_store import RedisStore
from tests.contract.building import a_shard, submitted
from tests.servers import RedisServer, free_port

SECRET = "hunter2"


def refusal(url: str, kind: type[StoreError] = StoreRefused, **options: Any) -> str:
    """The one line with which a store at `url` is refused."""
    with pytest.raises(StoreError) as caught:
        RedisStore(url, **options)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert ("\n" not in message and SECRET not in message and "127.0.0.1" in message) or "localhost" in message
    return message


def test_a_wrong_password_or_none(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(requirepass=SECRET)
    at = f"127.0.0.1:{server.port}/0"
    assert "password" in refusal(f"redis://{at}")
    assert "password" in refusal(f"redis://:{SECRET}x@{at}")
    assert f"redis://somebody@{at}" in refusal(f"redis://somebody:{SECRET}@{at}")
    with RedisStore(f"redis://:{SECRET}@{at}") as store:
        assert store.info().url == f"redis://{at}"


def test_a_password_for_a_server_without(redis_server: RedisServer) -> None:
    assert "password" in refusal(f"redis://:{SECRET}@127.0.0.1:{redis_server.port}/0")


def test_too_few_rights(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    at = f"127.0.0.1:{server.port}/0"
    users = {
        "right": "~loramill:* +@all -@admin",
        "blind": "~loramill:* +@all -info",
        "elsewhere": "~other:* +@all",
        "reader": "~loramill:* +@read +@connection +info +eval +evalsha",
    }
    for user, rights in users.items():
        server.cli("ACL", "SETUSER", user, "on", f">{SECRET}", *rights.split())
    assert "info" in refusal(f"redis://blind:{SECRET}@{at}")
    assert "key" in refusal(f"redis://elsewhere:{SECRET}@{at}")
    assert "too few rights" in refusal(f"redis://reader:{SECRET}@{at}")
    with RedisStore(f"redis://right:{SECRET}@{at}") as store:
        submitted(store, "j", a_shard())
        assert store.ready()
    with (
        RedisStore(f"redis://reader:{SECRET}@{at}", create=False) as store,
        pytest.raises(StoreRefused, match="too few rights"),
    ):
        store.cancel("j")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls(new_redis: Callable[..., RedisServer], redis_server: RedisServer) -> None:
    server = new_redis(tls=True)
    for _ in range(20):
        with RedisStore(server.url) as store:
            assert store.info().url == f"rediss://localhost:{server.port}/0"
    assert "certificate is not trusted" in refusal(f"rediss://localhost:{server.port}/0")
    by_address = server.url.replace("localhost", "127.0.0.1")
    assert "certificate is not trusted" in refusal(by_address)
    assert "rediss://" in refusal(f"redis://127.0.0.1:{server.port}/0", StoreUnreachable)
    assert "redis://)" in refusal(f"rediss://127.0.0.1:{redis_server.port}/0", StoreUnreachable, timeout_s=0.5)


def test_what_is_no_redis() -> None:
    """Something that answers TLS, and not as Redis or any TLS server would."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert "TLS connection failed" in refusal(f"rediss://127.0.0.1:{port}/0")
        thread.join()


def test_a_replica(new_redis: Callable[..., RedisServer], redis_server: RedisServer) -> None:
    replica = new_redis(replicaof=f"127.0.0.1 {redis_server.port}")
    assert "replica" in refusal(replica.url)


def test_a_master_that_becomes_a_replica(new_redis: Callable[..., RedisServer], redis_server: RedisServer) -> None:
    server = new_redis()
    with RedisStore(server.url) as store:
        server.cli("REPLICAOF", "127.0.0.1", redis_server.port)
        with pytest.raises(StoreRefused, match="replica"):
            store.cancel("j")


def test_a_cluster(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(cluster_enabled="yes", cluster_port=str(free_port()))
    assert "Cluster" in refusal(server.url)


def test_a_policy_that_evicts(new_redis: Callable[..., RedisServer]) -> None:
    assert "allkeys-lru" in refusal(new_redis(maxmemory_policy="allkeys-lru").url)


def test_a_server_that_keeps_nothing_is_taken_only_if_that_is_wanted(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(appendonly="no")
    assert "appendonly yes" in refusal(server.url)
    with RedisStore(server.url, volatile=True) as store:
        assert not store.info().durable and "loses every job" in store.info().warnings[0]


def test_an_old_server() -> None:
    info = {"redis_version": "6.2.14", "role": "master", "maxmemory_policy": "noeviction"}
    assert unusable(info, "redis://host") == "redis://host is Redis 6.2.14: 7.0 or newer is needed"
    for version in ("7.0.15", "7.2.4", "10.0.0"):
        assert unusable(info | {"redis_version": version}, "redis://host") is None


def test_nobody_there(need_redis: None) -> None:
    assert "refused" in refusal(f"redis://127.0.0.1:{free_port()}/0", StoreUnreachable)


def test_a_store_that_was_never_written(redis_server: RedisServer) -> None:
    assert "nothing was ever submitted" in refusal(redis_server.url, StoreLost, create=False, prefix="never")


@pytest.mark.parametrize("letter", "/?#")
def test_a_password_that_tears_the_url_is_not_shown(letter: str) -> None:
    with pytest.raises(StoreRefused, match="%2F") as caught:
        RedisStore(f"redis://:secret{letter}{SECRET}@127.0.0.1/0")
    assert "secret" not in str(caught.value) and SECRET not in str(caught.value)


def test_a_unix_socket(new_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    path = tmp_path / "s"
    new_redis(unixsocket=str(path))
    with RedisStore(f"unix://{path}?db=1") as store:
        submitted(store, "j", a_shard())
        assert (store.info().url, store.job("j").total) == (f"unix://{path}", 4)


@pytest.mark.parametrize("url", ["redis://127.0.0.1/first", "redis://127.0.0.1/0?maxmemory=1", "redis://127.0.0.1:x/0"])
def test_urls_that_are_none(url: str) -> None:
    assert "URL" in refusal(url)
