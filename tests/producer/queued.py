"""Jobs in a real store, and a worker that answers their rows by the store's contract, without a model."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loramill.schemas.job import JobNames, JobSpec
from loramill.schemas.manifest import Manifest
from loramill.schemas.request import parse_line
from loramill.schemas.response import Answer, Choice, error_line, ok_line
from loramill.store.contract import JobStore
from loramill.store.packing import Chunk
from loramill.store.records import Claim, DoneRow, Job, NewShard, WorkerRecord
from loramill.store.sqlite_store import SqliteStore


class Queue:
    """A store, and what is done there by others."""

    def __init__(self, folder: Path, tokenizer: Path, store: JobStore | None = None, url: str = "") -> None:
        """A new file in `folder`, if no other `store` is given."""
        self.path = folder / "jobs.db"
        self.url = url or f"sqlite:///{self.path}"
        self.store: JobStore = store or SqliteStore(self.path)
        self.manifest = self._manifest(tokenizer)

    def _manifest(self, tokenizer: Path) -> Manifest:
        files = {path.name: self.store.put_blob(path.read_bytes()) for path in tokenizer.glob("*.json*")}
        return Manifest(
            base="tiny", parts={"weights": "tiny"}, max_model_len=256, vocab_size=258, max_loras=4,
            sampling_defaults={}, tokenizer="t", tokenizers={"t": files},
        )  # fmt: skip

    def publish(self) -> None:
        """As a worker does when it starts."""
        self.store.publish(self.manifest)

    def hello(self, worker: str = "w1") -> None:
        """As one does that is there."""
        self.publish()
        said = {"device": "cpu", "state": "ready", "started_ms": 1, "pid": 2, "host": "here"}
        self.store.hello(WorkerRecord(worker, self.manifest.id, self.manifest.base_id, **said))  # type: ignore[arg-type]

    def submit(self, job_id: str = "job", rows: int = 10, *, shard_rows: int = 4, invalid: int = 0, **spec: Any) -> Job:
        """A job whose shards have its rows out of order; the last `invalid` ones were skipped as such."""
        names = JobNames(base="tiny")
        self.store.stage(JobSpec(id=job_id, base_id=self.manifest.base_id, names=names, **spec))
        order = [*range(0, rows - invalid, 2), *reversed(range(1, rows - invalid, 2))]
        for number, start in enumerate(range(0, len(order), shard_rows)):
            mine = [(row, line_of(row)) for row in order[start : start + shard_rows]]
            self.store.add_shard(job_id, NewShard(number, mine))
        if invalid:
            bad = range(rows - invalid, rows)
            lines = [error_line(job_id, row, f"r{row}", "it is invalid", code="invalid_request") for row in bad]
            done = [DoneRow(row, True, line) for row, line in zip(bad, lines, strict=True)]
            self.store.add_results(job_id, done)
        return self.store.accept(job_id)

    def claim(self, worker: str = "w1") -> Claim | None:
        """The next shard."""
        self.publish()
        return self.store.claim(worker, self.manifest.id)

    def commit(self, claim: Claim, positions: Sequence[int], *, fail: Collection[str] = (), text: str = "") -> None:
        """Answers these rows of a claimed shard; those with the ids of `fail` fail."""
        job = claim.lease.job
        rows = self.store.read_shard(job, claim.lease.shard)
        done = [done_row(job, *rows[position], fail=fail, text=text) for position in positions]
        self.store.commit(claim.lease, Chunk.of(done, positions))

    def run(self, *, fail: Collection[str] = (), shards: int | None = None, text: str = "") -> None:
        """Answers all that waits, or so many shards of it."""
        while shards != 0 and (claim := self.claim()):
            half = claim.rows // 2
            for part in (range(half), range(half, claim.rows)):
                if part:
                    self.commit(claim, part, fail=fail, text=text)
            shards = None if shards is None else shards - 1


def until_open(process: subprocess.Popen[str], what: str) -> None:
    """Returns when a process has opened a file like this, and had a moment to go on."""
    give_up_s = time.monotonic() + 30
    while not any(what in link for link in _links(process.pid)):
        assert process.poll() is None
        assert time.monotonic() < give_up_s
        time.sleep(0.02)
    time.sleep(0.5)


def _links(pid: int) -> list[str]:
    links = list[str]()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.append(str(entry.readlink()))
    return links


def line_of(row: int) -> bytes:
    """A row's input line."""
    return json.dumps({"id": f"r{row}", "prompt": f"row {row}", "max_tokens": 4}).encode()


def done_row(job: str, number: int, line: bytes, *, fail: Collection[str] = (), text: str = "") -> DoneRow:
    """What a worker makes of a line."""
    row = parse_line(line)
    if row.custom_id in fail:
        return DoneRow(number, True, error_line(job, number, row.custom_id, "no", code="engine_error", status=500))
    answer = Answer([Choice(0, text or f"answer {row.prompt}", "stop", [1, 2])], 3, "tiny")
    return DoneRow(number, False, ok_line(job, number, row, answer, 1), 3, 2)


def ids(path: Path) -> list[str]:
    """The custom_ids of a file of results, in order."""
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]
