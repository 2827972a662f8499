"""A small cluster: real workers on one store, jobs submitted as anybody submits them, and the end of all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import orjson

from loramill.producer.ask import Ask
from loramill.producer.reader import open_input
from loramill.producer.results import ResultsOptions, results
from loramill.producer.served import published
from loramill.producer.submit import submit
from loramill.producer.targets import errors_beside
from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.errors import StoreError
from loramill.store.opening import open_store
from loramill.store.records import Job, ShardInfo, ShardState, WorkerRecord
from tests.chaos import oracle
from tests.chaos.hooks import Chaos
from tests.chaos.oracle import Expected
from tests.chaos.processes import Process, command_of, is_alive, is_stopped, until
from tests.stub_engine import manifest

ROOT = Path(__file__).parents[2]
BASE = "stub"
HASHES: dict[str | None, str | None] = {None: None} | {one.name: one.sha256 for one in manifest()[0].adapters}

LEASE_S = 2.0
SHORT_TIMES = {
    "loramill.store.contract:WORKER_TTL_S": 4.0,
    "loramill.store.redis_link:READ_TIMEOUT_S": LEASE_S,
    "loramill.worker.housekeeping:HELLO_S": 0.5,
    "loramill.worker.housekeeping:REAP_S": 0.5,
    "loramill.worker.engine_process:LOOK_S": 0.2,
    "loramill.worker.engine_process:STALLED_S": 1.0,
    "loramill.worker.engine_process:FIRST_BACKOFF_S": 0.1,
    "loramill.worker.engine_process:MAX_BACKOFF_S": 1.0,
}
"""A lease takes 1/15 of its time, and so does what goes by it: what is 5, 40 and 90 s in a cluster is 0.3, 2.7 and 6 s
here. An engine starts again soon."""

Form = Literal["celery", "command"]


@dataclass(slots=True, frozen=True)
class Rows:
    """A job's input lines, and what they must come to."""

    lines: list[bytes] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)


def id_of(number: int) -> str:
    """Of the row with this number."""
    return f"r{number:05}"


def rows_of(
    count: int,
    adapters: Sequence[str | None] = (None, "a00", "a01", "a02", "a03"),
    special: Mapping[int, str] | None = None,
    failing: Mapping[int, str] | None = None,
) -> Rows:
    """`count` rows that go round `adapters`. `special`: words for the stub in the prompt of some rows; `failing`: the
    error codes with which some must fail."""
    special, failing, made = special or {}, failing or {}, Rows()
    for number in range(count):
        adapter = adapters[number % len(adapters)]
        prompt = f"row {number} {special[number]}" if number in special else f"row {number}"
        line: dict[str, object] = {"id": id_of(number), "prompt": prompt, "max_tokens": 4, "temperature": 0}
        made.lines.append(orjson.dumps(line | ({"adapter": adapter} if adapter else {})))
        if number in failing:
            made.expected.append(Expected(id_of(number), adapter, "", 500, failing[number]))
        else:
            made.expected.append(Expected(id_of(number), adapter, f"{adapter or BASE} ok:{prompt}"))
    return made


class Worker(Process):
    """A worker process with its engine child."""

    def pids(self) -> tuple[int, int] | None:
        """The process that feeds the engine, and the engine; None while there is none."""
        family = self.family()
        engine = next((pid for pid in family if "tests.chaos.child" in command_of(pid)), None)
        if engine is None:
            return None
        return int(Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[1]), engine

    def node(self) -> int:
        """The process that feeds the engine."""
        until(f"an engine of {self.name}", self.pids)
        found = self.pids()
        assert found is not None
        return found[0]

    def engine(self) -> int:
        """The engine child."""
        until(f"an engine of {self.name}", self.pids)
        found = self.pids()
        assert found is not None
        return found[1]

    def kill(self) -> None:
        """kill -9 of all but the engine, which has to notice by itself."""
        engines = [pid for pid in self.family() if "tests.chaos.child" in command_of(pid)]
        for pid in self.family():
            if pid not in engines:
                self.send(signal.SIGKILL, pid)
        self._popen.wait(10)
        until(f"the engine of {self.name} dead", lambda: not any(is_alive(pid) for pid in engines), 5)

    def stop(self) -> None:
        """SIGSTOP, as when the machine sleeps: the engine too."""
        for pid in self.family():
            self.send(signal.SIGSTOP, pid)
        until(f"{self.name} stopped", lambda: all(is_stopped(pid) for pid in self.family()), 5)

    def go_on(self) -> None:
        """SIGCONT."""
        for pid in self.family():
            self.send(signal.SIGCONT, pid)

    def term(self, timeout_s: float = 15.0) -> tuple[int, float]:
        """SIGTERM: its exit code, and after how many seconds."""
        begun_s = time.monotonic()
        self.send(signal.SIGTERM)
        return self.wait(timeout_s), time.monotonic() - begun_s


class Cluster:
    """Workers, and jobs for them, on the store at `url`."""

    def __init__(self, folder: Path, url: str, *, prefix: str = "loramill", files: str | None = None) -> None:
        self.folder, self.url, self.prefix, self.files = folder, url, prefix, files
        self.ran = folder / "ran.log"
        """A line for every row that an engine computed."""
        self.workers: list[Worker] = []
        self._stack = ExitStack()
        self._store: JobStore | None = None

    @property
    def store(self) -> JobStore:
        """This process's own handle."""
        if self._store is None:
            self._store = self._stack.enter_context(self.open())
        return self._store

    def open(self, **options: bool) -> JobStore:
        """Another one."""
        return open_store(self.url, files=self.files, prefix=self.prefix, **options)

    def environment(self) -> dict[str, str]:
        """Of everybody who is to use this store."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")}
        paths = (ROOT / "tests" / "chaos" / "site", ROOT / "src", ROOT)
        settings = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "LORAMILL_STORE": self.url,
            "LORAMILL_STORE_PREFIX": self.prefix,
        }
        if self.files is not None:
            settings["LORAMILL_FILES"] = self.files
        return kept | settings

    def worker(
        self, name: str | None = None, *, form: Form = "celery", chaos: Chaos | None = None, url: str | None = None,
        threads: int = 4, **environment: str,
    ) -> Worker:  # fmt: skip
        """Starts one; `form`: Celery itself, or `loramill worker`. `url`: where it sees the store, if elsewhere."""
        name = name or f"w{len(self.workers)}"
        command = {
            "celery": ["-m", "celery", "-A", "loramill.worker.app", "worker", "-P", "threads", "-c", str(threads)],
            "command": ["-c", "from loramill.producer.cli import main; main(['worker'])"],
        }[form]
        settings = {
            "LORAMILL_STORE": url or self.url,
            "LORAMILL_BASE_MODEL": BASE,
            "LORAMILL_DEVICE": "cpu",
            "LORAMILL_ID": name,
            "LORAMILL_LEASE": str(LEASE_S),
            "LORAMILL_CONCURRENCY": str(threads),
            "LORAMILL_CHILD": f"{sys.executable} -m tests.chaos.child",
            "STUB_RAN": str(self.ran),
        }
        told = (chaos or Chaos(times=SHORT_TIMES)).environment()
        given = self.environment() | settings | told | environment
        worker = Worker(name, [sys.executable, *command], given, self.folder / f"{name}.log")
        self.workers.append(worker)
        return worker

    def ready(self, *workers: Worker, timeout_s: float = 30.0) -> None:
        """Waits until these workers (all, if none are given) take shards."""
        for worker in workers or self.workers:

            def is_up(worker: Worker = worker) -> bool:
                assert worker.code is None, f"{worker.name} ended\n{worker.tail()}"
                return any(one.id.startswith(worker.name) and one.state == "ready" for one in self._heard())

            self.until(f"{worker.name} ready", is_up, timeout_s)

    def submit(self, rows: Rows, store: JobStore | None = None, **ask: object) -> str:
        """The id of an accepted job of these rows."""
        store = store or self.store
        with open_input(str(self.write(rows)), self.folder) as source:
            done = submit(store, source, Ask(**ask), lambda: published(store, None))  # type: ignore[arg-type]
        return done.job.id

    def write(self, rows: Rows) -> Path:
        """An input file of these rows."""
        path = self.folder / f"in-{time.monotonic_ns()}.jsonl"
        path.write_bytes(b"\n".join(rows.lines) + b"\n")
        return path

    def until(self, what: str, holds: Callable[[], object], timeout_s: float = 30.0) -> None:
        """Waits until `holds()`. Raises AssertionError with what every worker said last."""
        try:
            until(what, holds, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tails()}") from None

    def wait(self, job_id: str, timeout_s: float = 60.0) -> Job:
        """The job once it has ended. Raises AssertionError as `until`, with the job."""
        seen: list[Job] = []

        def has_ended() -> bool:
            try:
                seen[:] = [self.store.job(job_id)]
            except StoreError:
                return False
            return seen[0].status.ended

        try:
            self.until(f"job {job_id} ended", has_ended, timeout_s)
        except AssertionError as error:
            shards = [one for one in self.store.shards(job_id) if one.state is not ShardState.DONE]
            raise AssertionError(f"{error}\n{seen}\n{shards[:5]}\n{self.store.events(job_id)[-20:]}") from None
        return seen[0]

    def finish(
        self, job_id: str, rows: Rows, timeout_s: float = 60.0, *,
        hashes: Mapping[str | None, str | None] = HASHES, base: str = BASE,
    ) -> oracle.Outcome:  # fmt: skip
        """Waits for the job, and holds it against the oracle: the store, and the files that a person gets."""
        self.wait(job_id, timeout_s)
        twice = oracle.check_store(self.store, job_id, rows.expected)
        answered, failed = self.results(job_id)
        return oracle.Outcome(oracle.check_files(rows.expected, answered, failed, hashes, base), twice)

    def results(self, job_id: str) -> tuple[list[bytes], list[bytes]]:
        """The lines of the two files that `loramill results` makes."""
        output = self.folder / f"{job_id}.jsonl"
        options = ResultsOptions(
            store=self.url, files=self.files, store_prefix=self.prefix, job_id=job_id, output=output, quiet=True,
            overwrite=True,
        )  # fmt: skip
        results(options)
        errors = errors_beside(output)
        return output.read_bytes().splitlines(), errors.read_bytes().splitlines() if errors.exists() else []

    def command(self, *arguments: str, timeout_s: float = 60.0) -> tuple[int, str, str]:
        """How a command ends that a person gives: its exit code, stdout and stderr."""
        code = f"from loramill.producer.cli import main; main({list(arguments)!r})"
        ended = subprocess.run(
            [sys.executable, "-c", code], env=self.environment(), capture_output=True, text=True,
            timeout=timeout_s, cwd=self.folder,
        )  # fmt: skip
        return ended.returncode, ended.stdout, ended.stderr

    def leased(self, job_id: str, by: str | None = None) -> list[ShardInfo]:
        """The job's shards that a worker holds."""
        return [
            shard
            for shard in self.store.shards(job_id)
            if shard.state is ShardState.LEASED and (by is None or (shard.worker or "").startswith(by))
        ]

    def finished(self, job_id: str) -> int:
        """Rows with a result."""
        job = self.store.job(job_id)
        return job.completed + job.failed

    def committed(self, job_id: str) -> set[str]:
        """The ids of rows that have a result."""
        chunks = oracle.chunks_of(self.store, self.store.job(job_id))
        return {oracle.Found.of(row.line).custom_id for chunk in chunks for row in chunk.rows()}

    def is_over(self, job_id: str) -> bool:
        """Whether it is completed."""
        return self.store.job(job_id).status is JobStatus.COMPLETED

    def tails(self) -> str:
        """What every worker said last."""
        return "\n".join(worker.tail() for worker in self.workers)

    def close(self) -> None:
        """Ends every worker, however it is."""
        for worker in self.workers:
            worker.end()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heard(self) -> list[WorkerRecord]:
        try:
            return self.store.workers()
        except StoreError:
            return []


def times_computed(cluster: Cluster) -> Counter[str]:
    """How often engines computed each row, by its id."""
    prompts = cluster.ran.read_text().splitlines() if cluster.ran.exists() else []
    return Counter(id_of(int(prompt.split()[1])) for prompt in prompts)
