"""The job store's contract: what every store does, and what they share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

from loramill.schemas.job import JobError, JobSpec, Lane
from loramill.schemas.manifest import Manifest
from loramill.store.errors import JobNotFound
from loramill.store.packing import Chunk, pack_shard, unpack_shard
from loramill.store.part_files import Files
from loramill.store.parts import fetch, fetch_chunk, keep, keep_chunk, part_name
from loramill.store.records import (
    Backlog,
    Claim,
    Committed,
    DoneRow,
    Event,
    Job,
    Lease,
    NewShard,
    Reaped,
    ShardInfo,
    StoreInfo,
    Verdict,
    WorkerRecord,
)
from loramill.store.shelf import Shelf

LEASE_S = 30.0
STAGING_S = 3600.0
"""A submit that adds nothing for this long is taken for dead, and what it stored is removed."""
RETENTION_S = 7 * 86400.0
"""How long an ended job's input and results are kept."""
ASK_RETENTION_S = 300.0
"""The same for a question, whose answer somebody was waiting for."""
ASK_SUFFIX = "/ask"
WORKER_TTL_S = 30.0
PRIORITY_S = 600.0
"""What one step of priority is worth: as much as having been submitted so much earlier."""
DEADLINE_LEAD_S = 3600.0
"""A job is as urgent as one that was submitted so long before its window ends, if that is earlier than it was."""
AFFINITY_S = 300.0
"""What it is worth that all adapters of a shard are in the worker's slots; part of it for some of them."""
HEAD = 64
"""Shards looked at in rank order before one is chosen."""
PER_ADAPTER = 4
"""And those first in rank for each adapter in a slot."""


def rank_s(accepted_s: float, priority: int, expires_s: float | None) -> float:
    """A job's place in the queue, smaller first. It never changes, so a shard is passed over only for shards of rank
    below its own + AFFINITY_S, of which no more come once their time has passed."""
    rank = accepted_s - PRIORITY_S * priority
    return rank if expires_s is None else min(rank, expires_s - DEADLINE_LEAD_S)


def queue_of(base_id: str, lane: Lane) -> str:
    """The name of the queue in which a job's shards wait."""
    return base_id + ASK_SUFFIX if lane is Lane.ASK else base_id


class JobStore(ABC):
    """Jobs, their shards, leases on them, and results.

    Every method is one atomic step, durable when it returns as far as the server is; any thread may call it. The
    store's clock is the only one that counts. Payloads (shards' rows, results' lines) are in the store itself, or in
    `files` where there are any. Every method may raise StoreUnreachable, StoreFull, StoreRefused, StoreLost.
    """

    def __init__(self, files: Files | None) -> None:
        self.files = files

    # Submitting: a job is staged piece by piece, seen by no worker, and then accepted or abandoned as a whole.

    @abstractmethod
    def stage(self, spec: JobSpec) -> None:
        """Begins a job. Raises StoreRefused if its id is taken."""

    def add_shard(self, job_id: str, shard: NewShard) -> None:
        """Stores one shard of a staged job. Raises JobNotFound if it is not staged (any more)."""
        kept = keep(self.files, f"{job_id}/in-{shard.number:06}.zst", pack_shard(shard.rows))
        self._add_shard(job_id, shard, kept)

    def add_results(self, job_id: str, rows: Sequence[DoneRow]) -> None:
        """Results of rows of a staged job that belong to no shard, since there is nothing to run: invalid lines."""
        chunk = Chunk.of(rows, range(len(rows)))
        name = f"{job_id}/part-invalid-{rows[0].row:09}.jsonl.zst"
        self._add_results(job_id, chunk, keep_chunk(self.files, name, chunk))

    @abstractmethod
    def accept(self, job_id: str) -> Job:
        """Lets workers see all shards of a staged job, at once. A job without shards is completed by it. Done again,
        in case nobody heard of it, changes nothing. Raises JobNotFound if it is neither staged nor accepted."""

    @abstractmethod
    def refuse(self, job_id: str, errors: Sequence[JobError]) -> Job:
        """Ends a staged job as failed, for its input is invalid."""

    def abandon(self, job_id: str) -> None:
        """Removes a staged job without a trace; nothing if there is none."""
        self._remove(job_id, only_staged=True)
        try:
            # A submit that did not hear of its acceptance abandons an accepted job, which needs its files.
            self.job(job_id)
        except JobNotFound:
            self._remove_files(job_id)

    # Looking.

    @abstractmethod
    def job(self, job_id: str) -> Job:
        """Raises JobNotFound."""

    @abstractmethod
    def jobs(self, *, after: str | None = None, limit: int = 20) -> list[Job]:
        """The newest first, questions left out; those older than `after`, a job's id. Raises JobNotFound for it."""

    @abstractmethod
    def shards(self, job_id: str) -> list[ShardInfo]:
        """By number. Raises JobNotFound."""

    @abstractmethod
    def events(self, job_id: str, after: int = 0) -> list[Event]:
        """What happened since event number `after`; the oldest of very many are forgotten. Raises JobNotFound."""

    def results(self, job_id: str, start: int = 0, limit: int = 16) -> list[Chunk]:
        """Chunks `start`, `start`+1, ... in the order of their commits, at most `limit`. A row may be in two of them;
        the first counts. Raises JobNotFound."""
        return [fetch_chunk(self.files, entry) for entry in self._results(job_id, start, limit)]

    def read_shard(self, job_id: str, number: int) -> list[tuple[int, bytes]]:
        """(row number, line) of a shard's rows. Raises JobNotFound."""
        return unpack_shard(self.read_shard_blob(job_id, number))

    def read_shard_blob(self, job_id: str, number: int) -> bytes:
        """The same as `pack_shard` made it. Raises JobNotFound."""
        return fetch(self.files, self._shard_kept(job_id, number))

    # Ending.

    @abstractmethod
    def cancel(self, job_id: str) -> Job:
        """Starts nothing more of a job; what is finished stays. It is cancelled once no shard of it is leased. One
        that has ended, or is ending, stays as it is. Raises JobNotFound."""

    def purge(self, job_id: str) -> None:
        """Removes an ended job with all that it has. Raises JobNotFound, or StoreRefused while it has not ended."""
        self._remove(job_id, only_staged=False)
        self._remove_files(job_id)

    # Working.

    @abstractmethod
    def claim(
        self, worker: str, manifest: str, resident: Sequence[str] = (), *, lane: Lane = Lane.BULK
    ) -> Claim | None:
        """The ready shard of a lane that suits a worker best, leased to it: among those that its published `manifest`
        can serve the one with the lowest `rank_s - AFFINITY_S * share`, where share is the part of the shard's adapters
        that are `resident` (1 for a shard of the base alone). Looked at are the first HEAD by rank and the first
        PER_ADAPTER of each resident adapter; of equals the lower rank, then job id, then number. None if nothing suits.

        Raises StoreLost if the manifest is not there.
        """

    @abstractmethod
    def reclaim(self, worker: str, lease: Lease) -> Claim | None:
        """A new lease on the very shard of a lease that was lost, if nobody else holds it: work done for it need not be
        thrown away. None if it is another's, done or dropped."""

    @abstractmethod
    def pulse(self, leases: Sequence[Lease], *, renew: bool) -> list[Verdict]:
        """What became of each lease; with `renew` those that are held last LEASE_S from now. One that has run out is
        never renewed."""

    def commit(self, lease: Lease, chunk: Chunk) -> Committed:
        """Results of rows of the leased shard, all or none, durable. Rows that have one keep it. The shard is done,
        and the lease over, once every row has one. Raises Fenced if the lease is not held."""
        return self._commit(lease, chunk, keep_chunk(self.files, part_name(lease, chunk), chunk))

    @abstractmethod
    def strike(self, lease: Lease, position: int) -> int:
        """An engine died while this row was alone in it: how often it has. Raises Fenced."""

    @abstractmethod
    def release(self, lease: Lease, *, suspects: Iterable[int] = ()) -> None:
        """Gives a shard back to whoever comes next, without blame; `suspects` are the positions that ran when an engine
        died. Does nothing if the lease is not held."""

    @abstractmethod
    def reap(self) -> Reaped:
        """Takes back leases that have run out, ends jobs whose window passed, removes what nobody will want any more.
        Anybody may call it at any time."""

    @abstractmethod
    def ready(self) -> Mapping[str, int]:
        """How many shards of the bulk lane wait to be claimed, by base_id."""

    @abstractmethod
    def backlog(self) -> Mapping[str, Backlog]:
        """What of the bulk lane waits to be claimed, by base_id, in full."""

    # Who serves what.

    @abstractmethod
    def publish(self, manifest: Manifest) -> None:
        """Lets others know what can be served. It stays when workers go."""

    @abstractmethod
    def manifests(self) -> list[Manifest]:
        """All that were published, the latest published first."""

    @abstractmethod
    def hello(self, worker: WorkerRecord) -> None:
        """A worker says that it is there, and how it does."""

    @abstractmethod
    def goodbye(self, worker: str) -> None:
        """A worker has ended."""

    @abstractmethod
    def workers(self) -> list[WorkerRecord]:
        """Those that were heard of within WORKER_TTL_S, by id."""

    def put_blob(self, data: bytes) -> str:
        """Keeps bytes by their hash, which is returned. For files that manifests speak of."""
        digest = hashlib.sha256(data).hexdigest()
        self._put_blob(digest, data)
        return digest

    @abstractmethod
    def get_blob(self, digest: str) -> bytes:
        """Raises StoreError if it is not there."""

    @abstractmethod
    def has_blob(self, digest: str) -> bool:
        """Whether it is there."""

    # The store itself.

    @property
    @abstractmethod
    def shelf(self) -> Shelf:
        """What it keeps beside jobs."""

    @abstractmethod
    def info(self) -> StoreInfo:
        """What it is, and how it is."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of connections and files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What a store implements for the methods above.

    @abstractmethod
    def _add_shard(self, job_id: str, shard: NewShard, kept: bytes) -> None: ...
    @abstractmethod
    def _add_results(self, job_id: str, chunk: Chunk, entry: bytes) -> None: ...
    @abstractmethod
    def _remove(self, job_id: str, *, only_staged: bool) -> None: ...
    @abstractmethod
    def _results(self, job_id: str, start: int, limit: int) -> list[bytes]: ...
    @abstractmethod
    def _shard_kept(self, job_id: str, number: int) -> bytes: ...
    @abstractmethod
    def _commit(self, lease: Lease, chunk: Chunk, entry: bytes) -> Committed: ...
    @abstractmethod
    def _put_blob(self, digest: str, data: bytes) -> None: ...

    def _remove_files(self, job_id: str) -> None:
        if self.files is not None:
            self.files.remove(job_id)
