"""`loramill worker` as a process: Celery on a real Redis, threads on SQLite, and a stub for an engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.records import ShardState
from loramill.store.redis_store import RedisStore
from loramill.store.sqlite_store import SqliteStore
from tests.servers import RedisServer
from tests.worker.queueing import ENVIRONMENT, answers, staged, until

LEASE_S = 3


class Site:
    """A store, and workers on it."""

    def __init__(self, url: str, store: JobStore, **environment: str) -> None:
        self.url, self.store = url, store
        self.environment = {**os.environ, **ENVIRONMENT, **environment}
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self, *more: str, command: str = "loramill", app: str = "loramill.worker.app", **environment: str
    ) -> subprocess.Popen[str]:
        """A worker: by our command, or by Celery's with the same settings."""
        settings = {"store": self.url, "base-model": "stub", "device": "cpu", "lease": str(LEASE_S)}
        given = {**self.environment, **environment}
        if command == "loramill":
            code = "from loramill.producer.cli import main; main()"
            flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
            line = [sys.executable, "-c", code, "worker", *flags, *more]
        else:
            given |= {f"LORAMILL_{name.replace('-', '_').upper()}": value for name, value in settings.items()}
            line = [sys.executable, "-m", "celery", "-A", app, "worker", "-P", "threads", "-c", "4"]
        self.processes.append(
            subprocess.Popen(line, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return self.processes[-1]

    def ready(self) -> bool:
        return [worker.state for worker in self.store.workers()] == ["ready"]

    def end(self, process: subprocess.Popen[str], timeout_s: float = 15) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=timeout_s)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def family(self, process: subprocess.Popen[str]) -> list[int]:
        """It, and all that it started."""
        return [process.pid, *descendants(process.pid)]

    def signal(self, pid: int, number: int) -> None:
        os.kill(pid, number)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self.store.close()


@pytest.fixture
def on_redis(redis_server: RedisServer) -> Iterator[Site]:
    prefix = uuid.uuid4().hex
    store = RedisStore(redis_server.url, prefix=prefix)
    site = Site(redis_server.url, store, LORAMILL_STORE_PREFIX=prefix)
    yield site
    site.close()


@pytest.fixture
def on_sqlite(tmp_path: Path) -> Iterator[Site]:
    site = Site(f"sqlite:///{tmp_path}/jobs.db", SqliteStore(tmp_path / "jobs.db"))
    yield site
    site.close()


@pytest.mark.parametrize("command", ["loramill", "celery"])
def test_a_job_is_done_by_celery(on_redis: Site, command: str) -> None:
    staged(on_redis.store, "before", [f"row {row}" for row in range(100)])
    worker = on_redis.start(command=command)
    until(lambda: on_redis.store.job("before").status.ended)
    staged(on_redis.store, "after", ["row 0"])  # no ticket is sent: the idle worker sees it
    until(lambda: on_redis.store.job("after").status.ended)
    assert answers(on_redis.store, "before") == {row: f"ok:row {row}" for row in range(100)}
    worker.send_signal(signal.SIGTERM)
    code, out, err = on_redis.end(worker)
    assert code == 0, err
    assert on_redis.store.workers() == []
    if command == "loramill":
        assert out == ""


def test_a_celery_that_takes_its_time_to_end_is_not_waited_for(on_redis: Site, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "from celery import signals\n"
        "from loramill.worker.app import app\n"
        "\n\n"
        "@signals.worker_shutting_down.connect\n"
        "def wait(**_):\n"
        "    time.sleep(60)\n"
    )
    worker = on_redis.start(command="celery", app="slow", PYTHONPATH=str(tmp_path))
    until(on_redis.ready)
    worker.send_signal(signal.SIGTERM)
    code, _, err = on_redis.end(worker)
    assert code == 0, err
    assert on_redis.store.workers() == []


def test_until_empty(on_sqlite: Site) -> None:
    staged(on_sqlite.store, "j", [f"row {row}" for row in range(100)])
    code, out, err = on_sqlite.end(on_sqlite.start("--until-empty"), 60)
    assert (code, out) == (0, ""), err
    assert on_sqlite.store.job("j").status is JobStatus.COMPLETED


def test_until_empty_with_celery(on_redis: Site) -> None:
    staged(on_redis.store, "j", [f"row {row}" for row in range(100)])
    code, out, err = on_redis.end(on_redis.start("--until-empty"), 60)
    assert (code, out) == (0, ""), err
    assert on_redis.store.job("j").status is JobStatus.COMPLETED


@pytest.mark.parametrize("where", ["on_redis", "on_sqlite"])
def test_sigterm_gives_back_within_ten_seconds(where: str, request: pytest.FixtureRequest) -> None:
    site: Site = request.getfixturevalue(where)
    staged(site.store, "j", ["quick", *(f"SLOW {row}" for row in range(7))])
    worker = site.start(STUB_STEP_S="0.5")
    until(lambda: site.store.job("j").completed == 1)
    worker.send_signal(signal.SIGTERM)
    code, _, err = site.end(worker, 10.5)
    assert code == 0, err
    [shard] = site.store.shards("j")
    assert (shard.state, shard.done, shard.attempts, shard.suspects) == (ShardState.READY, 1, 0, {})


@pytest.mark.parametrize("where", ["on_redis", "on_sqlite"])
def test_a_second_signal_ends_at_once(where: str, request: pytest.FixtureRequest) -> None:
    site: Site = request.getfixturevalue(where)
    staged(site.store, "j", ["quick", *(f"SLOW {row}" for row in range(7))])
    worker = site.start(STUB_STEP_S="0.5")
    until(lambda: site.store.job("j").completed == 1)
    worker.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(1)
    worker.send_signal(signal.SIGINT)
    code, _, _ = site.end(worker, 3)
    assert code == 130


@pytest.mark.parametrize("where", ["on_redis", "on_sqlite"])
def test_a_killed_worker_takes_its_engine_along_and_another_goes_on(where: str, request: pytest.FixtureRequest) -> None:
    site: Site = request.getfixturevalue(where)
    staged(site.store, "j", ["quick", *(f"SLOW {row}" for row in range(7))])
    worker = site.start("--id", "first", STUB_STEP_S="0.5")
    until(lambda: site.store.job("j").completed == 1)
    family = descendants(worker.pid)
    assert family
    worker.kill()
    worker.communicate()
    until(lambda: not any(alive(pid) for pid in family), 5)
    site.start("--id", "second")
    until(lambda: site.store.job("j").status.ended, 40)
    assert len(answers(site.store, "j")) == 8
    assert site.store.shards("j")[0].attempts == 1


def test_a_lost_queue_is_filled_again(on_redis: Site, redis_server: RedisServer) -> None:
    on_redis.start()
    until(on_redis.ready)
    key = f"{on_redis.environment['LORAMILL_STORE_PREFIX']}:tickets:loramill-stub"
    for number in range(5):
        staged(on_redis.store, f"j{number}", ["row 0", "row 1"], per_shard=1)
        redis_server.cli("DEL", key)
        redis_server.cli("CLIENT", "KILL", "TYPE", "normal")
    until(lambda: all(on_redis.store.job(f"j{number}").status.ended for number in range(5)))


def test_a_worker_that_gets_no_tickets_is_started_again(on_redis: Site) -> None:
    staged(on_redis.store, "j", ["row 0"])
    worker = on_redis.start("--base-name", "other", "--watchdog", "1")  # it waits at a queue where nobody sends
    assert worker.stderr is not None
    said: list[str] = []
    while sum("no ticket comes" in line for line in said) < 2:
        said.append(worker.stderr.readline())
        assert said[-1], said
    worker.send_signal(signal.SIGTERM)
    assert on_redis.end(worker)[0] == 0


@pytest.mark.parametrize(
    ("flags", "environment", "code", "says"),
    [
        (["--store", "redis://127.0.0.1:1/0"], {}, 1, "127.0.0.1:1"),
        (["--device", "gpu"], {}, 2, "--device gpu: it is auto"),
        (["--lease", "soon"], {}, 2, "not a time"),
        (["--store", "sqlite:////does/not/exist.db"], {}, 1, "/does/not"),
        (["--store", "mysql://x"], {}, 2, "mysql"),
        ([], {"LORAMILL_CHILD": "/does/not/exist"}, 1, "cannot be started"),
        ([], {"LORAMILL_CHILD": ""}, 4, "--base-model stub"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    on_redis: Site, flags: list[str], environment: dict[str, str], code: int, says: str
) -> None:
    ended, out, err = on_redis.end(on_redis.start(*flags, **environment), 60)
    said = [line for line in err.splitlines() if "Error" in line]
    assert (ended, out, len(said)) == (code, "", 1), err
    assert says in said[0]


@pytest.mark.parametrize(
    ("environment", "code", "says"),
    [
        ({"LORAMILL_MAX_NUM_SEQS": "none"}, 2, "LORAMILL_MAX_NUM_SEQS"),
        ({"LORAMILL_CHILD": "false"}, 1, "died 3 times in a row"),
    ],
)
def test_celerys_own_command_says_it_in_one_line_too(
    on_redis: Site, environment: dict[str, str], code: int, says: str
) -> None:
    ended, _, err = on_redis.end(on_redis.start(command="celery", **environment), 60)
    said = [line for line in err.splitlines() if "Error" in line]
    assert (ended, len(said)) == (code, 1), err
    assert says in said[0]


def alive(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The processes that it started, and those that they started."""
    children = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and parent_of(path) == pid]
    return [*children, *(one for child in children for one in descendants(child))]


def parent_of(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return None
