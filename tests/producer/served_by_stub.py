"""A store where stub workers said what they serve, and commands and inputs for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from loramill.producer.ask import Ask
from loramill.producer.cli import main
from loramill.producer.reader import open_input
from loramill.producer.served import published
from loramill.producer.submit import Submitted, submit
from loramill.schemas.manifest import AdapterOffer, Manifest
from loramill.store.contract import JobStore
from loramill.store.packing import Chunk
from loramill.store.records import WorkerRecord
from loramill.store.sqlite_store import SqliteStore
from tests import stub_engine
from tests.producer.queued import done_row

MANIFEST, BLOBS = stub_engine.manifest()


def offer(name: str, **other: Any) -> AdapterOffer:
    """An adapter of made-up content."""
    said = {"name": name, "key": f"key-{name}", "sha256": f"sha-{name}", "rank": 8, "targets": ("q_proj",)}
    return AdapterOffer(**(said | other))


def manifest(*adapters: AdapterOffer, **other: Any) -> Manifest:
    """The stub's with other adapters."""
    return Manifest(**(MANIFEST.model_dump() | {"adapters": adapters} | other))


class Place:
    """A store in a file, or another one."""

    def __init__(self, folder: Path, *manifests: Manifest, store: JobStore | None = None) -> None:
        """`manifests` are published in this order."""
        self.folder = folder
        self.url = f"sqlite:///{folder / 'jobs.db'}"
        self.input = folder / "in.jsonl"
        self.store: JobStore = store or SqliteStore(folder / "jobs.db")
        for content in BLOBS.values():
            self.store.put_blob(content)
        for one in manifests:
            self.store.publish(one)

    def hello(self, worker: str, serves: Manifest, state: str = "ready") -> None:
        """As a worker that is there."""
        self.store.hello(WorkerRecord(worker, serves.id, serves.base_id, "cpu", state, 1, 2, "here"))

    def write(self, rows: Iterable[dict[str, Any] | str]) -> Path:
        """The input."""
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        self.input.write_text("".join(line + "\n" for line in lines))
        return self.input

    def submit(self, rows: Iterable[dict[str, Any] | str], store: JobStore | None = None, **ask: Any) -> Submitted:
        """What `submit` makes of these rows."""
        path = self.write(rows)
        with open_input(str(path), str(self.folder)) as source:
            return submit(store or self.store, source, Ask(**ask), lambda: published(self.store, None))

    def work(self, serves: Manifest = MANIFEST, fail: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """Answers all that waits."""
        while claim := self.store.claim("w", serves.id):
            rows = self.store.read_shard(claim.lease.job, claim.lease.shard)
            done = [done_row(claim.lease.job, *row, fail=fail) for row in rows]
            self.store.commit(claim.lease, Chunk.of(done, range(len(done))))

    def lines(self, job_id: str) -> dict[int, bytes]:
        """All rows of its shards, each once."""
        rows = [row for shard in self.store.shards(job_id) for row in self.store.read_shard(job_id, shard.number)]
        assert len({number for number, _ in rows}) == len(rows)
        return dict(rows)


class Command:
    """Runs the command line in this process, with the store of a place."""

    def __init__(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        self._place, self._capsys = place, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--store", self._place.url])
        said = self._capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err


def rows(count: int, *adapters: str | None, **fields: Any) -> list[dict[str, Any]]:
    """Native rows that go round these adapters."""
    names = adapters or (None,)
    shared = {"max_tokens": 4, "temperature": 0, **fields}
    return [{"id": f"r{at}", "adapter": names[at % len(names)], "prompt": f"row {at}", **shared} for at in range(count)]
