"""Commands that wait, while a real redis-server is killed and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loramill.producer.cli import main
from loramill.store.opening import open_store
from tests.producer.queued import Queue, ids
from tests.servers import RedisServer


def start(server: RedisServer, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    code = f"from loramill.producer.cli import main\nmain({list(arguments)!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=folder, env={**os.environ, "LORAMILL_STORE": server.url},
    )  # fmt: skip


def until_looked(process: subprocess.Popen[str], server: RedisServer) -> None:
    """Returns when the process has asked for its job, which is what it asks for after all else."""
    give_up_s = time.monotonic() + 30
    with server.client() as client:
        while not any(one["name"] == "loramill" and one["cmd"].startswith("eval") for one in client.client_list()):
            assert process.poll() is None
            assert time.monotonic() < give_up_s
            time.sleep(0.02)


@pytest.mark.parametrize("command", [["wait", "job"], ["results", "job", "--follow", "-o", "out.jsonl"]])
def test_a_wait_outlives_a_server_that_is_killed(
    need_redis: None, tmp_path: Path, tiny_base: Path, command: list[str]
) -> None:
    with RedisServer(tmp_path / "redis", appendfsync="always") as server:
        with open_store(server.url) as store:
            queue = Queue(tmp_path, tiny_base, store, server.url)
            queue.submit(rows=8)
            queue.run(shards=1)
        process = start(server, tmp_path, *command)
        until_looked(process, server)
        server.kill()
        time.sleep(2)
        assert process.poll() is None
        server.start()
        with open_store(server.url) as store:
            Queue(tmp_path, tiny_base, store, server.url).run()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == ""
    assert err.count("trying again") == 1
    assert err.count("the store is back after") == 1
    if command[0] == "results":
        assert ids(tmp_path / "out.jsonl") == [f"r{row}" for row in range(8)]


def test_a_server_that_is_away_from_the_start(
    need_redis: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody waits ten minutes for a mistyped port."""
    server = RedisServer(tmp_path / "redis")
    started_s = time.monotonic()
    with pytest.raises(SystemExit) as end:
        main(["wait", "job", "--store", server.url])
    assert end.value.code == 1
    assert time.monotonic() - started_s < 15
    err = capsys.readouterr().err
    assert str(server.port) in err
    assert len(err.splitlines()) == 1


def test_a_wait_ends_at_its_timeout_though_the_server_is_away(
    need_redis: None, tmp_path: Path, tiny_base: Path
) -> None:
    with RedisServer(tmp_path / "redis") as server:
        with open_store(server.url) as store:
            Queue(tmp_path, tiny_base, store, server.url).submit(rows=8)
        process = start(server, tmp_path, "wait", "job", "--timeout", "4s")
        until_looked(process, server)
        server.kill()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 124
    first, last = err.splitlines()
    assert first.endswith("; trying again")
    # The connection is reset at first, and then refused.
    assert last.startswith("Error: waited 4 s: ")
    assert all(str(server.port) in line for line in (first, last))


def test_an_interrupt_while_the_server_is_away(need_redis: None, tmp_path: Path, tiny_base: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        with open_store(server.url) as store:
            Queue(tmp_path, tiny_base, store, server.url).submit(rows=8)
        process = start(server, tmp_path, "wait", "job")
        until_looked(process, server)
        server.kill()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: job job goes on"


def test_a_server_that_came_back_empty_is_said_loudly(need_redis: None, tmp_path: Path, tiny_base: Path) -> None:
    with RedisServer(tmp_path / "redis", appendonly="no") as server:
        with open_store(server.url, volatile=True) as store:
            Queue(tmp_path, tiny_base, store, server.url).submit(rows=8)
        code = f"from loramill.producer.cli import main\nmain(['wait', 'job', '--store', '{server.url}?volatile=1'])"
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        until_looked(process, server)
        server.kill()
        server.start()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in err
