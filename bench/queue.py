"""`python -m bench.queue`: what the queue costs beside the model: many short rows, a stub in the engine's place.

One producer enqueues them into a Redis of its own (append-only file, synced every second), four workers as operators
run them (Celery with threads, a child each) answer them, and one process collects the results in input order. Every
part of the way of a row is real but the engine, which answers at once. Beside it the same rows by the same runner in
one process, into `loramill run`'s journal.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench import ROOT, hide_root, machine
from bench.keep import keep
from tests.servers import RedisServer

ROWS, EMBEDDED_ROWS, WORKERS = 1_000_000, 200_000, 4
ADAPTERS = 16
STUB = f"{sys.executable} -m tests.stub_engine"
SEQS = 512
"""Rows of the stub's pass: its loop should not be what is measured."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.queue", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--embedded-rows", type=int, default=EMBEDDED_ROWS)
    parser.add_argument("--fsync", choices=["everysec", "always"], default="everysec")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "queue.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _write_rows(folder / "rows.jsonl", options.rows)
        few = _write_rows(folder / "few.jsonl", options.embedded_rows)
        with RedisServer(folder / "redis", appendfsync=options.fsync) as server:
            queue = _queue(server, folder, rows, options)
        embedded = _embedded(folder, few)
    found = {
        "versions": machine.versions() | {"redis-server": server_version()},
        "rows": options.rows,
        "workers": options.workers,
        "fsync": options.fsync,
        **queue,
        "embedded": embedded,
    }
    keep(options.out, "queue", "bench.queue", arguments, found)
    return 0


def _queue(server: RedisServer, folder: Path, rows: Path, options: argparse.Namespace) -> dict[str, Any]:
    environment = _environment(server.url)
    with _workers(1, environment, folder):  # says what it serves, so that one can submit
        _until(lambda: _ready(environment, 1))
    empty = _memory(server)
    submitted = _timed(["submit", str(rows), "--json"], environment)
    with_rows = _memory(server)
    job = json.loads(submitted["stdout"])["id"]
    before = _cpu_s(server)
    started_s = time.monotonic()
    with _workers(options.workers, environment, folder) as workers:
        looks = _watch(job, environment, options.rows)
        worker_cpu_s = sum(map(_tree_cpu_s, workers))
    with_results = _memory(server)
    collected = _timed(["results", job, "-o", str(folder / "out.jsonl"), "--json"], environment)
    assert sum(1 for _ in (folder / "out.jsonl").open("rb")) == options.rows
    first, last = looks[0], looks[-1]
    return {
        "row_bytes": rows.stat().st_size / options.rows,
        "result_bytes": (folder / "out.jsonl").stat().st_size / options.rows,
        "submit": {key: submitted[key] for key in ("wall_s", "cpu_s", "max_rss_bytes")},
        "answer": {
            "wall_s": last[0] - first[0],
            "rows": last[1] - first[1],
            "all_rows": last[1],
            "rows_per_s": (last[1] - first[1]) / (last[0] - first[0]),
            "start_s": first[0] - started_s,
            "worker_cpu_s": worker_cpu_s,
            "redis_cpu_s": _cpu_s(server) - before,
        },
        "collect": {key: collected[key] for key in ("wall_s", "cpu_s", "max_rss_bytes")},
        "redis_bytes_per_row": {
            "input": (with_rows - empty) / options.rows,
            "output": (with_results - with_rows) / options.rows,
        },
    }


def _embedded(folder: Path, rows: Path) -> dict[str, Any]:
    """The same rows through ShardRunner and the journal, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.queue_embedded", str(rows), str(folder / "journal")],
        cwd=ROOT, env={**os.environ, "STUB_SEQS": str(SEQS)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _write_rows(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for number in range(count):
            line = {"id": f"row-{number}", "adapter": f"a{number * 7919 % ADAPTERS:02}", "prompt": f"question {number}"}
            file.write(json.dumps(line | {"max_tokens": 40, "temperature": 0}) + "\n")
    return path


def _environment(url: str) -> dict[str, str]:
    return {
        **os.environ,
        "LORAMILL_STORE": url,
        "LORAMILL_CHILD": STUB,
        "STUB_SEQS": str(SEQS),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
    }


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", "from loramill.producer.cli import main; main()", *arguments]


def _timed(arguments: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """A command, with what it took."""
    before, started_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(_command(arguments), env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peak = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    out = process.communicate()[0]
    assert process.returncode == 0, arguments
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.monotonic() - started_s, "cpu_s": cpu_s, "max_rss_bytes": peak, "stdout": out}


@contextmanager
def _workers(count: int, environment: dict[str, str], folder: Path) -> Iterator[list[psutil.Process]]:
    with (folder / "workers.log").open("ab") as log:
        started = [
            subprocess.Popen(
                _command(["worker", "--id", f"w{n}", "--base-model", "stub"]),
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
            for n in range(count)
        ]
        try:
            yield [psutil.Process(process.pid) for process in started]
        finally:
            for process in started:
                process.send_signal(signal.SIGTERM)
            for process in started:
                process.wait(30)


def _ready(environment: dict[str, str], count: int) -> bool:
    from loramill.store.opening import open_store

    with open_store(environment["LORAMILL_STORE"]) as store:
        return sum(worker.state == "ready" for worker in store.workers()) >= count


def _watch(job: str, environment: dict[str, str], rows: int) -> list[tuple[float, int]]:
    """(seconds, rows done) from the first commit to the last."""
    from loramill.store.opening import open_store

    looks: list[tuple[float, int]] = []
    with open_store(environment["LORAMILL_STORE"]) as store:
        while True:
            now = store.job(job)
            done = now.completed + now.failed
            if done:
                looks.append((time.monotonic(), done))
            if now.status.ended:
                assert done == rows and not now.failed, now
                return looks
            time.sleep(0.1)


def _until(true: Any, timeout_s: float = 60) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.2)


def _tree_cpu_s(process: psutil.Process) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)])


def _cpu_s(server: RedisServer) -> float:
    assert server.process is not None
    return float(sum(psutil.Process(server.process.pid).cpu_times()[:2]))


def _memory(server: RedisServer) -> int:
    with server.client() as client:
        return int(client.info("memory")["used_memory"])


def server_version() -> str:
    said = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("v=")[1].split()[0]


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
