"""`python -m tests.chaos.long`: four workers on one Redis, and a fault every few seconds for as long as is asked. At
the end of every job the oracle speaks. The same `--seed` makes the same faults after the same pauses."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import redis

from loramill.store.errors import StoreError
from tests.chaos.cluster import LEASE_S, Cluster, times_computed
from tests.chaos.oracle import digest
from tests.chaos.processes import is_alive
from tests.chaos.proxy import Proxy
from tests.chaos.rows import rows_of
from tests.chaos.worker import Worker
from tests.servers import RedisServer

WORKERS = 4
SPEED = {"STUB_STEP_S": "0.25", "STUB_SEQS": "8"}
PAUSE_S = (2.0, 6.0)
"""Between faults."""
PATIENCE_S = 180.0
"""A job on which nothing moves for so long has failed."""


class Chaos:
    """The cluster, and what goes wrong with it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.server = RedisServer(folder / "redis").start()
        self.proxies = [Proxy(self.server.port) for _ in range(WORKERS)]
        self.cluster = Cluster(folder, self.server.url)
        self.faults: Counter[str] = Counter()
        self.restarts = 0
        self.next_s = time.monotonic() + self.random.uniform(*PAUSE_S)
        self._names = 0
        self.workers = [self._start(at) for at in range(WORKERS)]

    def _start(self, at: int) -> Worker:
        # A name of its own for every life: its log stays.
        self._names += 1
        url = f"redis://127.0.0.1:{self.proxies[at].port}/0"
        return self.cluster.worker(f"w{at}-{self._names}", url=url, LORAMILL_WATCHDOG="10s", **SPEED)

    def supervise(self) -> None:
        """Starts workers again that have ended, as an init system would."""
        for at, worker in enumerate(self.workers):
            if worker.code is not None:
                self.restarts += 1
                self.workers[at] = self._start(at)

    # Faults. Each draws all that it needs before it does anything, so that the schedule goes by the seed alone.

    def kill_worker(self) -> str:
        worker = self.workers[self.random.randrange(WORKERS)]
        worker.send(signal.SIGKILL)
        return f"kill -9 of {worker.name}"

    def kill_engine(self) -> str:
        worker = self.workers[self.random.randrange(WORKERS)]
        if found := worker.pids():
            worker.send(signal.SIGKILL, found[1])
        return f"kill -9 of the engine of {worker.name}"

    def stop_worker(self) -> str:
        worker, seconds = self.workers[self.random.randrange(WORKERS)], self.random.uniform(1, 3) * LEASE_S
        pids = worker.family()
        for pid in pids:
            worker.send(signal.SIGSTOP, pid)
        self._later(seconds, lambda: [worker.send(signal.SIGCONT, pid) for pid in pids if is_alive(pid)])
        return f"SIGSTOP of {worker.name} for {seconds:.1f} s"

    def restart_redis(self) -> str:
        seconds = self.random.uniform(0, 2)
        self.server.kill()
        time.sleep(seconds)
        self.server.start()
        return f"kill -9 of Redis, started again after {seconds:.1f} s"

    def partition(self) -> str:
        at, seconds, lose = self.random.randrange(WORKERS), self.random.uniform(0.1, 3) * LEASE_S, self.random.random()
        proxy = self.proxies[at]
        proxy.partition(lose=lose < 0.3)
        self._later(seconds, proxy.heal)
        return f"partition of w{at} for {seconds:.1f} s" + (", its connections forgotten" if lose < 0.3 else "")

    def slow_network(self) -> str:
        at, seconds, delay_s = self.random.randrange(WORKERS), self.random.uniform(1, 8), self.random.uniform(0.01, 0.5)
        proxy = self.proxies[at]
        proxy.delay_s = delay_s

        def end() -> None:
            proxy.delay_s = 0.0

        self._later(seconds, end)
        return f"all that w{at} sends and gets takes {delay_s:.2f} s longer, for {seconds:.1f} s"

    def reset_connections(self) -> str:
        at = self.random.randrange(WORKERS)
        self.proxies[at].reset()
        return f"the connections of w{at} reset"

    def kill_clients(self) -> str:
        with suppress(redis.RedisError):
            self.server.cli("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        return "CLIENT KILL TYPE normal"

    def fault(self) -> None:
        """One of them, at random."""
        faults: Sequence[Callable[[], str]] = (
            self.kill_worker, self.kill_worker, self.kill_engine, self.stop_worker, self.restart_redis, self.partition,
            self.kill_clients, self.reset_connections, self.slow_network,
        )  # fmt: skip
        do = self.random.choice(faults)
        said = do()
        self.faults[do.__name__.replace("_", " ")] += 1
        print(f"{time.strftime('%H:%M:%S')} {said}", flush=True)
        self.next_s = time.monotonic() + self.random.uniform(*PAUSE_S)

    def close(self) -> None:
        self.cluster.close()
        for proxy in self.proxies:
            proxy.close()
        self.server.kill()

    def _later(self, seconds: float, do: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        timer.start()


def run(folder: Path, *, seed: int, minutes: float, rows: int) -> None:
    """Jobs and faults until the time is up, and the last job's end without faults. Raises AssertionError."""
    chaos = Chaos(folder, seed)
    try:
        until_s = time.monotonic() + 60 * minutes
        chaos.cluster.ready()
        jobs = 0
        while time.monotonic() < until_s or not jobs:
            _job(chaos, rows, until_s)
            jobs += 1
        print(f"seed {seed}: {jobs} jobs right; faults: {sum(chaos.faults.values())} ({_counts(chaos.faults)})")
        print(f"workers started again: {chaos.restarts}")
    except BaseException:
        print(f"seed {seed}: failed; the logs are in {folder}", flush=True)
        raise
    finally:
        chaos.close()


def _job(chaos: Chaos, rows: int, until_s: float) -> None:
    cluster, wanted = chaos.cluster, rows_of(rows)
    cluster.ran.write_bytes(b"")  # engines have it open
    before = digest(wanted.expected)
    job = _insist(lambda: cluster.submit(wanted))
    print(f"job {job}: {rows} rows, the digest must be {before}", flush=True)
    done, moved_s = 0, time.monotonic()
    while True:
        now_s = time.monotonic()
        chaos.supervise()
        if chaos.next_s <= now_s < until_s:
            chaos.fault()
        with suppress(StoreError):
            finished = cluster.finished(job)
            if finished == rows and cluster.is_over(job):
                break
            if finished != done:
                done, moved_s = finished, now_s
        assert now_s < moved_s + PATIENCE_S, f"nothing moves\n{cluster.tails()}"
        time.sleep(0.2)
    outcome = _insist(lambda: cluster.finish(job, wanted))
    ran = times_computed(cluster)
    again = sum(times > 1 for times in ran.values())
    print(
        f"job {job}: the digest is {outcome.digest}; {outcome.committed_twice} rows were committed twice, "
        f"{again} computed more than once ({ran.total() - len(ran)} times more)", flush=True,
    )  # fmt: skip
    assert outcome.digest == before


_Value = TypeVar("_Value")


def _insist(do: Callable[[], _Value]) -> _Value:
    """Again while the store is away."""
    given_up_s = time.monotonic() + 30
    while True:
        try:
            return do()
        except StoreError:
            if time.monotonic() > given_up_s:
                raise
            time.sleep(0.5)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.long", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=20_000)
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}: --seed {given.seed} makes the same faults again", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="loramill-chaos-"))
    run(folder, seed=given.seed, minutes=given.minutes, rows=given.rows)
    shutil.rmtree(folder)  # what failed stays


if __name__ == "__main__":
    main(sys.argv[1:])
