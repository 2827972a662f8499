"""Batches as they are recorded: what was asked for, and what only the API knows of how they went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from loramill.producer.api.contents import new_id
from loramill.schemas.job import JobError, JobStatus
from loramill.store.records import Job
from loramill.store.shelf import Record, RecordExists, RecordNotFound, Shelf, Usage

_BATCH = "batch"
_OPEN = "open-batch"
"""A record for each batch that has not ended, under its id: few, whatever there was before. It holds the id of the
batch's job, once that was accepted; its size is the job's rows."""
_PAGE = 100


class BatchData(BaseModel):
    """The inside of a batch's record. Times are in milliseconds since 1970."""

    model_config = ConfigDict(frozen=True)

    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: float
    """From the batch's creation."""
    metadata: dict[str, str] | None = None
    priority: int = 0
    on_invalid: Literal["fail", "skip"] = "fail"
    output_ttl_s: float | None = None
    adapters: tuple[str, ...] = ("*",)
    """Patterns of what its owner may use."""
    pending_rows: int
    """How many rows of open batches its owner may have."""
    retry_of: str | None = None
    failed_only: bool = False

    status: Literal[
        JobStatus.VALIDATING, JobStatus.IN_PROGRESS, JobStatus.FAILED, JobStatus.COMPLETED, JobStatus.CANCELLED,
        JobStatus.EXPIRED,
    ] = JobStatus.VALIDATING  # fmt: skip
    """What is known without its job, which says the rest."""
    cancelling_ms: int | None = None
    """When it was cancelled while it was being validated."""
    submits: int = 0
    """How often its input was begun to be submitted: each time under another job's id, so that a server which was taken
    for dead adds nothing to what its successor stores."""
    publishes: int = 0
    """How often its files were begun: each time under other ids, for the same reason."""
    model: str | None = None
    errors: tuple[JobError, ...] = ()
    in_progress_ms: int | None = None
    expires_ms: int | None = None
    finalizing_ms: int | None = None
    ended_ms: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None


@dataclass(slots=True, frozen=True)
class Batch:
    """A batch as it was read."""

    record: Record
    data: BatchData

    @property
    def id(self) -> str:
        """The batch's."""
        return self.record.id

    @property
    def owner(self) -> str:
        """Whose it is."""
        return self.record.owner

    @property
    def ended(self) -> bool:
        """Whether it stays as it is."""
        return self.data.status.ended

    @property
    def job_id(self) -> str | None:
        """Of the job that it is, or may be about to become; None before the first attempt."""
        submits = self.data.submits
        return None if not submits else self.id if submits == 1 else f"{self.id}-{submits}"

    @property
    def deadline_ms(self) -> int:
        """When its window ends."""
        return self.record.created_ms + round(self.data.window_s * 1000)

    def file_id(self, what: str) -> str:
        """Of the `output` or the `error` file of the present attempt to publish it."""
        digest = blake2b(f"{self.id}\0{what}\0{self.data.publishes}".encode(), digest_size=12)
        return f"file-{digest.hexdigest()}"


@dataclass(slots=True, frozen=True)
class Open:
    """A batch that has not ended, or not been put away."""

    id: str
    job_id: str | None
    """Of its job, once that was accepted."""


def new_batch_id() -> str:
    """Of a batch to come."""
    return new_id("batch_")


def now_ms(batch: Batch) -> int:
    """By this machine's clock, and not before the batch was made by the store's."""
    return max(round(time.time() * 1000), batch.record.created_ms)


class Book:
    """A store's batches. Every method may raise StoreError."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def put(self, id: str, owner: str, data: BatchData) -> Batch:
        """A new one; the one of that id, if it is there."""
        with suppress(RecordExists):
            # First, for nobody would mind a batch that is not among the open ones.
            self._shelf.put(_OPEN, id, owner, b"")
        try:
            return Batch(self._shelf.put(_BATCH, id, owner, _bytes(data)), data)
        except RecordExists:
            return self.get(id)

    def get(self, id: str) -> Batch:
        """Whosever it is. Raises RecordNotFound."""
        return _read(self._shelf.get(_BATCH, id))

    def find(self, owner: str, id: str) -> Batch:
        """Raises RecordNotFound, for another's too."""
        batch = self.get(id)
        if batch.owner != owner:
            raise RecordNotFound(f"there is no batch {id}")
        return batch

    def list(self, owner: str | None, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """The newest first, and whether there are more. Raises RecordNotFound for `after`."""
        found = self._shelf.records(_BATCH, owner, after=after, limit=limit + 1)
        return [_read(record) for record in found[:limit]], len(found) > limit

    def change(self, batch: Batch, **fields: Any) -> Batch:
        """The batch with other `fields` of its data. Raises RecordChanged, RecordNotFound."""
        data = batch.data.model_copy(update=fields)
        return Batch(self._shelf.replace(batch.record, _bytes(data)), data)

    def open(self) -> Iterator[Open]:
        """Those that have not ended, the oldest first."""
        after: str | None = None
        # One that was put away between two pages hides those that follow: whoever looks again sees them.
        with suppress(RecordNotFound):
            while page := self._shelf.records(_OPEN, after=after, limit=_PAGE, oldest_first=True):
                for record in page:
                    yield Open(record.id, record.data.decode() or None)
                after = page[-1].id

    def is_open(self, id: str) -> bool:
        """Whether it has not been put away."""
        try:
            self._shelf.get(_OPEN, id)
        except RecordNotFound:
            return False
        return True

    def runs(self, id: str, job: Job) -> None:
        """Takes note that an open batch has an accepted job."""
        self._shelf.replace(self._shelf.get(_OPEN, id), job.id.encode(), size=job.total)

    def put_away(self, id: str) -> None:
        """Takes an ended batch out of the open ones."""
        self._shelf.remove(_OPEN, id)

    def usage(self, owner: str) -> Usage:
        """Open batches, and their rows as far as they are known."""
        return self._shelf.usage(_OPEN, owner)


def _read(record: Record) -> Batch:
    return Batch(record, BatchData.model_validate_json(record.data))


def _bytes(data: BatchData) -> bytes:
    return data.model_dump_json(exclude_defaults=True).encode()
