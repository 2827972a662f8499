"""Jobs, shards, manifests and results, as the tests of every store need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramill.schemas.job import JobNames, JobSpec
from loramill.schemas.manifest import AdapterOffer, Manifest
from loramill.store.contract import JobStore
from loramill.store.packing import Chunk
from loramill.store.records import Claim, DoneRow, NewShard, WorkerRecord


def a_manifest(
    adapters: str = "abc", *, max_loras: int = 4, base: str = "tiny", template: str | None = None
) -> Manifest:
    """Serves the adapters with these one-letter keys."""
    return Manifest(
        base=base, parts={"weights": base}, max_model_len=256, vocab_size=258, max_loras=max_loras,
        sampling_defaults={}, tokenizer="t", tokenizers={"t": {}},
        adapters=tuple(
            AdapterOffer(name=f"name-{key}", key=key, sha256=key * 8, rank=4, targets=("q_proj",)) for key in adapters
        ),
    )  # fmt: skip


def a_spec(job_id: str, *, base: str = "tiny", **given: Any) -> JobSpec:
    """Of a job for workers of `a_manifest(base=base)`."""
    base_id = a_manifest(base=base).base_id
    return JobSpec(id=job_id, base_id=base_id, names=JobNames(base=base), **given)


def a_shard(number: int = 0, rows: int = 4, adapters: str = "", *, first: int | None = None) -> NewShard:
    """`rows` rows, numbered in the job from `first` (1000 x the shard's number if not given)."""
    start = 1000 * number if first is None else first
    return NewShard(number, [(start + at, line_of(start + at)) for at in range(rows)], tuple(adapters))


def line_of(row: int) -> bytes:
    """A row's input."""
    return b'{"row":%d}' % row


def a_worker(worker: str, manifest: Manifest, **given: Any) -> WorkerRecord:
    """What it says of itself."""
    said = {"device": "cpu", "state": "ready", "started_ms": 1, "pid": 2, "host": "here"} | given
    return WorkerRecord(worker, manifest.id, manifest.base_id, **said)


def a_chunk(shard: int, positions: Sequence[int], *, by: str = "w", failed: Sequence[int] = ()) -> Chunk:
    """Results of these positions of `a_shard(shard)`; `by` makes the lines differ."""
    rows = [
        DoneRow(1000 * shard + at, at in failed, b'{"row":%d,"by":"%s"}' % (1000 * shard + at, by.encode()), 3, at)
        for at in positions
    ]
    return Chunk.of(rows, positions)


def submitted(store: JobStore, job_id: str, *shards: NewShard, **given: Any) -> None:
    """A job with these shards, accepted."""
    store.stage(a_spec(job_id, **given))
    for shard in shards:
        store.add_shard(job_id, shard)
    store.accept(job_id)


def claimed(store: JobStore, worker: str = "w", adapters: str = "abc", resident: Sequence[str] = ()) -> Claim:
    """The next shard for a worker with these adapters, which there must be."""
    manifest = a_manifest(adapters)
    store.publish(manifest)
    claim = store.claim(worker, manifest.id, resident)
    assert claim is not None
    return claim


def rows_of(store: JobStore, job_id: str) -> dict[int, DoneRow]:
    """What counts: every row's first result, read a few chunks at a time."""
    found: dict[int, DoneRow] = {}
    start = 0
    while chunks := store.results(job_id, start, 3):
        start += len(chunks)
        for chunk in chunks:
            for row in chunk.rows():
                found.setdefault(row.row, row)
    return found
