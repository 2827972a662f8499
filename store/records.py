"""What the job store holds and hands out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from loramill.schemas.job import JobError, JobSpec, JobStatus


@dataclass(slots=True, frozen=True)
class DoneRow:
    """The final result of one row: its output line (no newline), or its line for the error file if `failed`."""

    row: int
    failed: bool
    line: bytes
    prompt_tokens: int = 0
    completion_tokens: int = 0
    adapter: str = field(default="", compare=False)
    """Who answered it, for the worker's statistics: it is not stored."""


@dataclass(slots=True, frozen=True)
class NewShard:
    """Rows that run together, on their way into the store."""

    number: int
    """From 0, each once in a job."""
    rows: Sequence[tuple[int, bytes]]
    """(row number in the job, line), in the order to start; a row's place here is its position."""
    adapters: tuple[str, ...] = ()
    """Keys of the adapters that the rows need, each once."""


@dataclass(slots=True, frozen=True)
class Job:
    """A job and how far it is. Times are the store's, in milliseconds since 1970."""

    spec: JobSpec
    status: JobStatus
    total: int
    """Rows."""
    completed: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    shards: int
    shards_done: int
    chunks: int
    """How many chunks of results there are."""
    created_ms: int
    accepted_ms: int | None = None
    expires_ms: int | None = None
    ended_ms: int | None = None
    cancelled_ms: int | None = None
    """When the cancel was asked for."""
    errors: tuple[JobError, ...] = ()

    @property
    def id(self) -> str:
        """The job's."""
        return self.spec.id


@dataclass(slots=True, frozen=True)
class Lease:
    """The right to commit a shard's rows, until it is lost. The token (epoch, counter) is never given twice."""

    job: str
    shard: int
    epoch: int
    counter: int
    seconds: float
    """How long it lasts from the claim or the last renewal."""

    @property
    def token(self) -> str:
        """For names and logs."""
        return f"{self.epoch}.{self.counter}"


@dataclass(slots=True, frozen=True)
class Claim:
    """A shard to run."""

    lease: Lease
    rows: int
    adapters: tuple[str, ...]
    done: bytes
    """Bit p (a byte's highest first) is set if the row at position p has its result; zeros at the end may lack."""
    suspects: Mapping[int, int] = field(default_factory=dict)
    """Positions that were running when an engine died -> how often it died while that row was alone."""
    attempts: int = 0
    """Leases of this shard that were lost before."""

    def is_done(self, position: int) -> bool:
        """Whether the row at this position has its result."""
        byte = position >> 3
        return byte < len(self.done) and bool(self.done[byte] >> (7 - (position & 7)) & 1)


class Verdict(StrEnum):
    """What became of a lease."""

    HELD = "held"
    FENCED = "fenced"
    """Lost: another has the shard, or may have."""
    OVER = "over"
    """Held, and the job is ending: commit what is finished, start nothing, release."""


@dataclass(slots=True, frozen=True)
class Committed:
    """What a commit came to."""

    new: int
    """Rows that had no result before."""
    shard_done: bool


class ShardState(StrEnum):
    """Where a shard is."""

    STAGED = "staged"
    READY = "ready"
    LEASED = "leased"
    DONE = "done"
    DROPPED = "dropped"
    """Its job ended without it."""


@dataclass(slots=True, frozen=True)
class ShardInfo:
    """A shard, for status and for reading inputs again."""

    number: int
    state: ShardState
    rows: int
    done: int
    adapters: tuple[str, ...]
    attempts: int
    worker: str | None
    """Who holds it."""
    suspects: Mapping[int, int] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Event:
    """Something that happened to a job; `number` grows from 1."""

    number: int
    at_ms: int
    what: str


@dataclass(slots=True, frozen=True)
class WorkerRecord:
    """A worker as others see it. Those that have not been heard of for `WORKER_TTL_S` are gone."""

    id: str
    manifest: str
    """Manifest.id."""
    base_id: str
    device: str
    state: str
    """loading, ready or draining."""
    started_ms: int
    pid: int
    host: str
    resident: tuple[str, ...] = ()
    """Keys of the adapters in device slots."""
    rows_done: int = 0
    restarts: int = 0
    """Times its engine died."""
    stats: Mapping[str, Any] = field(default_factory=dict)
    """What its engines counted since it started; see `worker/worker_stats.py`."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Names of adapters that it was told to load (or to let go) and cannot -> why."""
    answered: Mapping[str, str] = field(default_factory=dict)
    """Names of adapters that operators changed their mind about -> the stamp of the wish that it heeded last."""


@dataclass(slots=True, frozen=True)
class Backlog:
    """Shards that wait to be claimed."""

    shards: int
    rows: int
    """Of these shards, without a result."""
    oldest_ms: int
    """When the first of their jobs was accepted."""


@dataclass(slots=True, frozen=True)
class Reaped:
    """What a round of tidying came to."""

    leases: int = 0
    """Leases that had run out."""
    expired: int = 0
    """Jobs whose window passed."""
    abandoned: int = 0
    """Jobs whose submit was never finished."""
    purged: int = 0
    """Ended jobs past their retention."""


@dataclass(slots=True, frozen=True)
class StoreInfo:
    """The store as it is now."""

    url: str
    """Without its password."""
    id: str
    server: str
    """Such as `redis 7.0.15`, `sqlite 3.40.1`."""
    durable: bool
    """Whether a restart of the server keeps what was accepted."""
    used_bytes: int
    limit_bytes: int | None
    pending_rows: int
    """Rows of accepted jobs that have no result yet."""
    warnings: tuple[str, ...] = ()
    leases_expired: int = 0
    """Leases that were ever taken back because they had run out."""
