"""Workers on a Redis of their own that dies, comes back, is silent, or comes back empty."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.store.redis_store import RedisStore
from tests.e2e.test_worker import Site
from tests.servers import RedisServer
from tests.worker.queueing import answers, staged, until

ROWS = 400


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", appendfsync="always") as server:
        yield server


@pytest.fixture
def site(server: RedisServer) -> Iterator[Site]:
    site = Site(server.url, RedisStore(server.url), STUB_STEP_S="0.2", STUB_SEQS="8")
    yield site
    site.close()


def under_way(site: Site) -> None:
    """A job of about ten seconds, some of it done."""
    staged(site.store, "j", [f"row {row}" for row in range(ROWS)], per_shard=64)
    until(lambda: site.store.job("j").completed > 0)


def finished(site: Site) -> None:
    until(lambda: site.store.job("j").status.ended, 60)
    assert answers(site.store, "j") == {row: f"ok:row {row}" for row in range(ROWS)}


def test_a_killed_server_that_comes_back(site: Site, server: RedisServer) -> None:
    worker = site.start()
    under_way(site)
    server.kill()
    time.sleep(2)
    server.start()
    finished(site)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0


def test_a_silence_longer_than_a_lease(site: Site, server: RedisServer) -> None:
    site.start()
    under_way(site)
    server.pause()
    time.sleep(5)
    server.resume()
    finished(site)


def test_connections_that_flap(site: Site, server: RedisServer) -> None:
    site.start()
    under_way(site)
    for _ in range(5):
        server.cli("CLIENT", "KILL", "TYPE", "normal")
        time.sleep(0.5)
    finished(site)
    staged(site.store, "after", ["row 0"])
    until(lambda: site.store.job("after").status.ended)


def test_a_stopped_worker_loses_its_shards(site: Site) -> None:
    first = site.start("--id", "first")
    under_way(site)
    children = site.family(first)
    for pid in children:
        site.signal(pid, signal.SIGSTOP)
    time.sleep(4)
    site.start("--id", "second")
    until(lambda: any(shard.worker == "second" for shard in site.store.shards("j")))
    for pid in children:
        site.signal(pid, signal.SIGCONT)
    finished(site)


def test_a_server_that_comes_back_empty(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", appendonly="no") as server:
        site = Site(f"{server.url}?volatile=1", RedisStore(server.url, volatile=True), STUB_STEP_S="0.2")
        try:
            worker = site.start()
            staged(site.store, "j", [f"SLOW {row}" for row in range(20)])
            until(lambda: any(shard.worker for shard in site.store.shards("j")))
            server.kill()
            server.start()
            _, err = worker.communicate(timeout=40)
            assert worker.returncode == 1, err
            assert "Traceback" not in err and "raised" not in err
            [said] = [line for line in err.splitlines() if " Error: " in line]
            assert "lost" in said or "not the store" in said
        finally:
            site.close()
