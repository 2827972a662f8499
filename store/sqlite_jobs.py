"""Jobs and what is counted of them, in SQL. Every function is part of one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from loramill.schemas.job import JobError, JobSpec, JobStatus, Lane
from loramill.store.contract import ASK_RETENTION_S, queue_of, rank_s
from loramill.store.errors import JobNotFound, StoreRefused
from loramill.store.packing import Chunk
from loramill.store.records import Job, NewShard, ShardInfo, ShardState

ENDING = {JobStatus.CANCELLING: JobStatus.CANCELLED, JobStatus.FINALIZING: JobStatus.EXPIRED}
"""The states of a job whose shards are only let go of -> what it comes to."""
EVENTS_KEPT = 1000
_COLUMNS = (
    "spec, status, total, completed, failed, prompt_tokens, completion_tokens, shards, shards_done, chunks, "
    "created_ms, accepted_ms, expires_ms, ended_ms, cancelled_ms, errors"
)


def find(db: sqlite3.Connection, job_id: str) -> Job:
    """Raises JobNotFound."""
    row = db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise _not_found(job_id)
    return _job(row)


def newest(db: sqlite3.Connection, after: str | None, limit: int) -> list[Job]:
    """As `JobStore.jobs`."""
    before = None
    if after is not None:
        found = db.execute("SELECT sequence FROM jobs WHERE id = ? AND lane = ?", (after, Lane.BULK)).fetchone()
        if found is None:
            raise _not_found(after)
        before = found[0]
    query = f"SELECT {_COLUMNS} FROM jobs WHERE lane = ? AND (? IS NULL OR sequence < ?) ORDER BY sequence DESC LIMIT ?"
    return [_job(row) for row in db.execute(query, (Lane.BULK, before, before, limit))]


def must_exist(db: sqlite3.Connection, job_id: str) -> None:
    """Raises JobNotFound."""
    if db.execute("SELECT 1 FROM jobs WHERE id = ?", (job_id,)).fetchone() is None:
        raise _not_found(job_id)


def stage(db: sqlite3.Connection, spec: JobSpec, now_ms: int) -> None:
    """Raises StoreRefused if the id is taken."""
    if db.execute("SELECT 1 FROM jobs WHERE id = ?", (spec.id,)).fetchone():
        raise StoreRefused(f"there is a job {spec.id} already")
    db.execute(
        "INSERT INTO jobs (id, spec, status, created_ms, touched_ms, lane) VALUES (?, ?, ?, ?, ?, ?)",
        (spec.id, spec.model_dump_json(), JobStatus.VALIDATING, now_ms, now_ms, spec.lane),
    )
    note(db, spec.id, "staged", now_ms)


def staged(db: sqlite3.Connection, job_id: str, now_ms: int) -> Job:
    """The job, which goes on being staged. Raises JobNotFound if it is not."""
    job = find(db, job_id)
    if job.status is not JobStatus.VALIDATING:
        raise JobNotFound(f"the job {job_id} is not being submitted any more: it is {job.status}")
    db.execute("UPDATE jobs SET touched_ms = ? WHERE id = ?", (now_ms, job_id))
    return job


def add_shard(db: sqlite3.Connection, job: Job, shard: NewShard, kept: bytes) -> None:
    """One shard of a staged job; one that is there already stays as it is."""
    adapters, rows = orjson.dumps(shard.adapters).decode(), len(shard.rows)
    queue = queue_of(job.spec.base_id, job.spec.lane)
    db.execute("INSERT INTO needs (adapters) VALUES (?) ON CONFLICT DO NOTHING", (adapters,))
    added = db.execute(
        "INSERT INTO shards (job, number, base_id, need, state, rows, done)"
        " SELECT ?, ?, ?, id, ?, ?, zeroblob(?) FROM needs WHERE adapters = ? ON CONFLICT DO NOTHING",
        (job.id, shard.number, queue, ShardState.STAGED, rows, (rows + 7) // 8, adapters),
    ).rowcount
    if added:
        db.execute("INSERT INTO inputs VALUES (?, ?, ?)", (job.id, shard.number, kept))
        db.execute("UPDATE jobs SET shards = shards + 1, total = total + ? WHERE id = ?", (rows, job.id))


def accept(db: sqlite3.Connection, job: Job, now_ms: int) -> None:
    """Makes all shards of a staged job ready."""
    window_s = job.spec.window_s
    expires_ms = None if window_s is None else now_ms + round(window_s * 1000)
    rank = rank_s(now_ms / 1000, job.spec.priority, None if expires_ms is None else expires_ms / 1000)
    db.execute(
        "UPDATE jobs SET status = ?, accepted_ms = ?, expires_ms = ? WHERE id = ?",
        (JobStatus.IN_PROGRESS, now_ms, expires_ms, job.id),
    )
    db.execute("UPDATE shards SET rank = ?, state = ? WHERE job = ?", (rank, ShardState.READY, job.id))
    note(db, job.id, "accepted", now_ms)
    settle(db, job.id, now_ms)


def refuse(db: sqlite3.Connection, job: Job, errors: Sequence[JobError], now_ms: int) -> None:
    """Ends a staged job as failed."""
    said = orjson.dumps([error.model_dump() for error in errors]).decode()
    db.execute("UPDATE jobs SET errors = ? WHERE id = ?", (said, job.id))
    _drop(db, job.id)
    _end(db, job.id, JobStatus.FAILED, now_ms)


def let_go(db: sqlite3.Connection, job_id: str, status: JobStatus, now_ms: int) -> None:
    """Starts nothing more of a job; `status` is one of ENDING."""
    db.execute("UPDATE jobs SET status = ? WHERE id = ?", (status, job_id))
    if status is JobStatus.CANCELLING:
        db.execute("UPDATE jobs SET cancelled_ms = ? WHERE id = ?", (now_ms, job_id))
    _drop(db, job_id)
    note(db, job_id, status, now_ms)
    settle(db, job_id, now_ms)


def count(db: sqlite3.Connection, job_id: str, chunk: Chunk, done: bytes, rows: int, entry: bytes) -> tuple[int, bytes]:
    """Takes up the rows of a chunk that are not `done` (bits by position, of `rows`): how many, and the bits then."""
    bits = np.unpackbits(np.frombuffer(done, np.uint8), count=rows)
    positions, first = np.unique(chunk.index["position"], return_index=True)
    new = chunk.index[first[bits[positions] == 0]]
    if len(new):
        bits[new["position"]] = 1
        failed = int(np.count_nonzero(new["failed"]))
        tokens = int(new["prompt_tokens"].sum()), int(new["completion_tokens"].sum())
        db.execute("INSERT INTO chunks SELECT id, chunks, ? FROM jobs WHERE id = ?", (entry, job_id))
        db.execute(
            "UPDATE jobs SET chunks = chunks + 1, completed = completed + ?, failed = failed + ?,"
            " prompt_tokens = prompt_tokens + ?, completion_tokens = completion_tokens + ? WHERE id = ?",
            (len(new) - failed, failed, *tokens, job_id),
        )
    return len(new), np.packbits(bits).tobytes()


def shards(db: sqlite3.Connection, job_id: str) -> list[ShardInfo]:
    """By number."""
    query = (
        "SELECT number, state, rows, rows_done, adapters, attempts, worker, suspects"
        " FROM shards JOIN needs ON id = need WHERE job = ? ORDER BY number"
    )
    return [
        ShardInfo(number, ShardState(state), rows, done, tuple(orjson.loads(adapters)), attempts, worker,
                  dict(orjson.loads(suspects)))
        for number, state, rows, done, adapters, attempts, worker, suspects in db.execute(query, (job_id,))
    ]  # fmt: skip


def settle(db: sqlite3.Connection, job_id: str, now_ms: int) -> None:
    """Ends a job if nothing is left to be done for it."""
    [(status, shards, done)] = db.execute("SELECT status, shards, shards_done FROM jobs WHERE id = ?", (job_id,))
    if status in ENDING:
        leased = "SELECT 1 FROM shards INDEXED BY shards_leased WHERE job = ? AND state = 'leased'"
        if db.execute(leased, (job_id,)).fetchone() is None:
            _end(db, job_id, ENDING[status], now_ms)
    elif done == shards:
        _end(db, job_id, JobStatus.COMPLETED, now_ms)


def note(db: sqlite3.Connection, job_id: str, what: str, now_ms: int) -> None:
    """One more event."""
    db.execute("UPDATE jobs SET events = events + 1 WHERE id = ?", (job_id,))
    db.execute("INSERT INTO events SELECT id, events, ?, ? FROM jobs WHERE id = ?", (now_ms, what, job_id))
    db.execute(
        "DELETE FROM events WHERE job = ? AND number <= (SELECT events FROM jobs WHERE id = ?) - ?",
        (job_id, job_id, EVENTS_KEPT),
    )


def outlived(db: sqlite3.Connection, now_ms: int, retention_ms: int) -> list[str]:
    """Those that ended and are not to be kept any longer."""
    asked_ms = now_ms - round(ASK_RETENTION_S * 1000)
    query = (
        "SELECT id FROM jobs WHERE ended_ms <= ? UNION"
        " SELECT id FROM jobs INDEXED BY jobs_answered WHERE ended_ms <= ? AND lane = 'ask'"
    )
    return [job_id for (job_id,) in db.execute(query, (now_ms - retention_ms, asked_ms))]


def remove(db: sqlite3.Connection, job_id: str) -> None:
    """With all that it has."""
    for table in ("shards", "inputs", "chunks", "events"):
        db.execute(f"DELETE FROM {table} WHERE job = ?", (job_id,))
    db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))


def _drop(db: sqlite3.Connection, job_id: str) -> None:
    db.execute("UPDATE shards SET state = 'dropped' WHERE job = ? AND state IN ('staged', 'ready')", (job_id,))


def _end(db: sqlite3.Connection, job_id: str, status: JobStatus, now_ms: int) -> None:
    db.execute("UPDATE jobs SET status = ?, ended_ms = ? WHERE id = ?", (status, now_ms, job_id))
    note(db, job_id, status, now_ms)


def _job(row: tuple[Any, ...]) -> Job:
    spec, status, *counts, errors = row
    said = tuple(JobError.model_validate(error) for error in orjson.loads(errors))
    values = (JobSpec.model_validate_json(spec), JobStatus(status), *counts, said)
    return Job(*values)


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"there is no job {job_id}")
