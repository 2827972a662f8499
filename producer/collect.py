"""What a job came to, row by row: its chunks gathered, the rows that never ran told so, its retries' answers put in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loramill.producer.outcomes import in_words
from loramill.producer.spool import Spool, write_all
from loramill.producer.waiting import chunks
from loramill.schemas.job import JobStatus
from loramill.schemas.request import custom_id_of
from loramill.schemas.response import never_run_line, result_id_of
from loramill.store.contract import JobStore
from loramill.store.errors import StoreError
from loramill.store.files import atomic_writer, remove_file
from loramill.store.packing import Chunk
from loramill.store.records import Job

_NEVER_RUN = {
    JobStatus.CANCELLED: ("batch_cancelled", "the job was cancelled before this row was run"),
    JobStatus.EXPIRED: ("batch_expired", "the job's window passed before this row was run"),
}
_SCAN = 200
_BATCH = 1024


class Seen:
    """Which rows of a job have had a result: of two, the first counts."""

    def __init__(self, total: int) -> None:
        self._seen = np.zeros(total, np.bool_)

    def first(self, chunk: Chunk) -> NDArray[np.bool_]:
        """(rows of the chunk,) whether this is the row's first result. Raises StoreError for a row that cannot be."""
        rows = chunk.index["row"].astype(np.int64)
        if len(rows) and rows.max() >= len(self._seen):
            raise StoreError(f"stored results are damaged: row {rows.max()} of {len(self._seen):,}")
        new = np.zeros(len(rows), np.bool_)
        new[np.unique(rows, return_index=True)[1]] = True
        new &= ~self._seen[rows]
        self._seen[rows] = True
        return new


def pick(chunk: Chunk, wanted: NDArray[np.bool_]) -> Chunk:
    """The chunk with only these of its rows."""
    if wanted.all():
        return chunk
    ends = np.cumsum(chunk.index["length"], dtype=np.int64)
    places = zip((ends - chunk.index["length"])[wanted].tolist(), ends[wanted].tolist(), strict=True)
    return Chunk(chunk.index[wanted], b"".join(chunk.lines[start:end] for start, end in places))


def put(spool: Spool, chunk: Chunk, rows: NDArray[np.int64] | None = None) -> None:
    """Adds a chunk, whose rows are `rows` of the spool or, without, the same."""
    index = chunk.index
    numbers = index["row"].astype(np.int64) if rows is None else rows
    spool.add(numbers, index["length"], index["failed"] != 0, chunk.lines)


def put_lines(spool: Spool, rows: Sequence[tuple[int, bytes]], *, failed: bool) -> None:
    """Adds (row number, line without its newline)."""
    numbers = np.array([row for row, _ in rows], np.int64)
    lengths = np.array([len(line) + 1 for _, line in rows], np.uint32)
    lines = b"".join(part for _, line in rows for part in (line, b"\n"))
    spool.add(numbers, lengths, np.full(len(rows), failed), lines)


def put_never_run(store: JobStore, job: Job, spool: Spool) -> NDArray[np.int64]:
    """Adds an error line for every row that a cancelled or expired job ended without: their numbers, in order."""
    never_run = np.flatnonzero(~spool.has) if job.status in _NEVER_RUN else np.zeros(0, np.int64)
    if not len(never_run):
        return never_run
    code, message = _NEVER_RUN[job.status]
    for batch in batches(stored_lines(store, job, ~spool.has, unfinished=True)):
        put_lines(
            spool,
            [(row, never_run_line(job.id, row, custom_id_of(line), code=code, message=message)) for row, line in batch],
            failed=True,
        )
    return never_run


def stored_lines(
    store: JobStore, job: Job, wanted: NDArray[np.bool_], *, unfinished: bool = False
) -> Iterator[tuple[int, bytes]]:
    """(row number, line as it was submitted) of the `wanted` rows of a job, a shard at a time in the order of its plan;
    with `unfinished` only shards with rows that have no result are looked at.

    Invalid lines that a submit skipped are in no shard, and do not come.
    """
    if not wanted.any():
        return
    for shard in store.shards(job.id):
        if unfinished and shard.done == shard.rows:
            continue
        for row, line in store.read_shard(job.id, shard.number):
            if wanted[row]:
                yield row, line


def retries_of(store: JobStore, job: Job) -> list[Job]:
    """The retries of a job, and theirs, the oldest first."""
    newer: list[Job] = []
    after: str | None = None
    while page := store.jobs(after=after, limit=_SCAN):
        at = next((at for at, one in enumerate(page) if one.id == job.id), None)
        newer += page if at is None else page[:at]
        if at is not None:
            break
        after = page[-1].id
    family, found = {job.id}, []
    for one in reversed(newer):
        if one.spec.retry_of in family and one.status is not JobStatus.VALIDATING:
            family.add(one.id)
            found.append(one)
    return found


def put_retries(store: JobStore, job: Job, spool: Spool, retries: Sequence[Job]) -> list[str]:
    """Puts what the retries came to in the place of rows without an answer, the latest in that of earlier failures.
    A row is known by its custom_id. Returns what is to be said of each retry."""
    said: list[str] = []
    if not retries:
        return said
    ids = _Ids(stored_lines(store, job, ~spool.answered))
    for retry in retries:
        seen, mended = Seen(retry.total), 0
        for chunk in chunks(store, retry):
            first = pick(chunk, seen.first(chunk))
            rows = ids.rows_of(first)
            # An answer is never replaced: two retries may have run the same row.
            open_ = (rows >= 0) & ~spool.is_answered(rows)
            put(spool, pick(first, open_), rows[open_])
            mended += int((open_ & (first.index["failed"] == 0)).sum())
        said.append(f"{in_words(retry)}; {mended:,} rows are answered by it")
    return said


def assemble(spool: Spool, rows: NDArray[np.int64], path: Path) -> None:
    """Puts the lines of these rows at `path`, whole or not at all. Raises StoreError."""
    # Through a link, to where it leads: replacing the link itself would surprise.
    with atomic_writer(path.resolve()) as write:
        write_all(spool.lines(rows), write)


def assemble_errors(spool: Spool, path: Path) -> None:
    """Puts all failed rows at `path`; where there are none, no file is left there. Raises StoreError."""
    failed = np.flatnonzero(spool.failed)
    if len(failed):
        assemble(spool, failed, path)
    else:
        remove_file(path)


class _Ids:
    """Rows by custom_id: 16 bytes a row, for they are kept by their hashes."""

    def __init__(self, lines: Iterator[tuple[int, bytes]]) -> None:
        pairs = ((_hash(custom_id_of(line)), row) for row, line in lines)
        known = np.fromiter(pairs, [("id", "<u8"), ("row", "<i8")])
        self._known = known[np.argsort(known["id"], kind="stable")]

    def rows_of(self, chunk: Chunk) -> NDArray[np.int64]:
        """(rows of the chunk,) the row of each line's custom_id, -1 for one that is not known."""
        ids = np.array([_hash(result_id_of(row.line) or "") for row in chunk.rows()], np.uint64)
        if not len(self._known) or not len(ids):
            return np.full(len(ids), -1, np.int64)
        at = np.minimum(np.searchsorted(self._known["id"], ids), len(self._known) - 1)
        found: NDArray[np.int64] = np.where(self._known["id"][at] == ids, self._known["row"][at], -1)
        return found


def _hash(custom_id: str) -> int:
    return int.from_bytes(blake2b(custom_id.encode(), digest_size=8).digest(), "little")


def batches(rows: Iterator[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """The same, some at a time."""
    batch: list[tuple[int, bytes]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
