"""The queue of a run on several devices: a job store in a file beside the output, which one process has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loramill.schemas.job import Lane
from loramill.schemas.manifest import Manifest
from loramill.store.errors import StoreError, StoreFull, StoreLost, StoreRefused
from loramill.store.packing import Chunk
from loramill.store.records import Claim, Committed, Lease
from loramill.store.sqlite_store import SqliteStore

LEASE_S = 3600.0
"""Nobody else takes shards, so that a lease need not run out; what a dead run had is taken back by the next."""
RETENTION_S = 100 * 366 * 86400.0
"""What a run finished waits for the files to be in place, however long nobody gives the command again."""


class RunQueue(SqliteStore):
    """A worker waits for a disk to have room again. Here a person waits, and is told."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Raises StoreError."""
        super().__init__(path, create=create, lease_s=LEASE_S, retention_s=RETENTION_S)
        self.broken: StoreError | None = None
        """Why nothing can be written any more."""

    def put_blob(self, data: bytes) -> str:
        with self._noting():
            return super().put_blob(data)

    def publish(self, manifest: Manifest) -> None:
        with self._noting():
            super().publish(manifest)

    def claim(
        self, worker: str, manifest: str, resident: Sequence[str] = (), *, lane: Lane = Lane.BULK
    ) -> Claim | None:
        with self._noting():
            return super().claim(worker, manifest, resident, lane=lane)

    def commit(self, lease: Lease, chunk: Chunk) -> Committed:
        with self._noting():
            return super().commit(lease, chunk)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except (StoreFull, StoreRefused) as error:
            self.broken = error
            raise


def has_rows(path: Path) -> bool:
    """Whether a run left finished rows there. Raises StoreError."""
    if not path.exists():
        return False
    try:
        with RunQueue(path, create=False) as queue:
            return any(job.completed + job.failed for job in queue.jobs())
    except StoreLost:  # killed before it was made
        return False


def remove_queue(path: Path) -> None:
    """Removes a queue that nobody has, with what SQLite keeps beside it."""
    # The database goes last: killed in between, the next run still finds a queue, not a log that belongs to nothing.
    for end in ("-journal", "-wal", "-shm", ""):
        path.with_name(path.name + end).unlink(missing_ok=True)
