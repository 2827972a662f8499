"""Tickets on a real broker."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from loramill.schemas.failures import ExitCode, Failure
from loramill.store.errors import StoreUnreachable
from loramill.worker.tickets import broker_of, make_app, top_up
from tests.servers import RedisServer, free_port


def test_as_many_as_there_are_shards_and_no_more(redis_server: RedisServer) -> None:
    # Other tests of this server send tickets too.
    prefix, base = uuid.uuid4().hex, f"tiny-{uuid.uuid4().hex}"
    app = make_app(redis_server.url, prefix=prefix)
    key = f"{prefix}:tickets:loramill-{base}"
    assert top_up(app, base, 3) == 3
    assert top_up(app, base, 3) == 0
    assert redis_server.cli("LLEN", key) == 3
    assert top_up(app, base, 1000, cap=5) == 2
    redis_server.cli("DEL", key)
    assert top_up(app, base, 2) == 2
    assert top_up(app, "other", 1) == 1
    # Every key is under the prefix; a ticket says nothing of what there is to do.
    keys = {name.decode() for name in redis_server.cli("KEYS", "*")}
    assert {name for name in keys if base in name} <= {name for name in keys if name.startswith(prefix)}
    assert len(redis_server.cli("LRANGE", key, 0, 0)[0]) < 1000


def test_over_tls_and_over_a_socket(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "tls", tls=True) as server:
        assert top_up(make_app(broker_of(server.url)), "tiny", 2) == 2
        with pytest.raises(StoreUnreachable, match="certificate"):
            top_up(make_app(broker_of(server.url.split("?")[0])), "tiny", 2)
    socket = tmp_path / "s"
    with RedisServer(tmp_path / "unix", unixsocket=str(socket)) as server:
        assert top_up(make_app(broker_of(f"unix://{socket}?db=3")), "tiny", 2) == 2
        assert b"db3" in server.cli("INFO", "keyspace") or "db3" in str(server.cli("INFO", "keyspace"))


def test_a_broker_that_is_not_there() -> None:
    with pytest.raises(StoreUnreachable, match="tickets cannot be sent"):
        top_up(make_app(f"redis://127.0.0.1:{free_port()}/0"), "tiny", 1)


@pytest.mark.parametrize(
    ("store", "broker", "is_at"),
    [
        ("redis://:pw@h:1/2?volatile=1", None, "redis://:pw@h:1/2"),
        ("rediss://h:1/0?ssl_ca_certs=/x.crt", None, "rediss://h:1/0?ssl_ca_certs=%2Fx.crt"),
        ("unix:///run/redis.sock?db=3", None, "redis+socket:///run/redis.sock?virtual_host=3"),
        ("sqlite:///x.db", "redis://b", "redis://b"),
    ],
)
def test_the_broker_is_the_stores_redis(store: str, broker: str | None, is_at: str) -> None:
    assert broker_of(store, broker) == is_at


def test_a_file_is_no_broker() -> None:
    with pytest.raises(Failure, match="--broker") as refused:
        broker_of("sqlite:///x.db")
    assert refused.value.code is ExitCode.USAGE
