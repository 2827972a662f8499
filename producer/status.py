"""`loramill status`, `list` and `watch`: how far jobs are."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from loramill.producer.offers import able
from loramill.producer.outcomes import as_data, in_words, why_refused
from loramill.schemas.errors import printable
from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.records import Event, Job, ShardInfo, ShardState, WorkerRecord
from loramill.worker.durations import in_words as time_in_words

LOOK_S = 1.0
"""Between the two looks that say how fast a running job is."""
EVENTS = 5


@dataclass(slots=True, frozen=True)
class Pace:
    """How fast a job is."""

    rows_per_s: float | None
    tokens_per_s: float | None
    """Prompt and completion tokens."""
    eta_s: float | None


@dataclass(slots=True, frozen=True)
class Status:
    """A job as one screen shows it."""

    job: Job
    shards: dict[str, int]
    """How many are in each state."""
    holders: dict[str, int]
    """Worker -> shards that it holds."""
    workers: dict[str, WorkerRecord]
    """Those that were heard of, by id."""
    able: str | None
    """Who could run it, where nobody does."""
    pace: Pace
    events: list[Event]
    """The last few."""


def look(store: JobStore, job_id: str, *, sleep: Callable[[float], None] = time.sleep) -> Status:
    """A job's status; of one that is running it takes a second, to see how fast. Raises JobNotFound."""
    first, started_s = store.job(job_id), time.monotonic()
    shards = store.shards(job_id)
    held = any(shard.state is ShardState.LEASED for shard in shards)
    job, spent_s = first, 0.0
    if held and not first.status.ended:
        sleep(LOOK_S)
        job, spent_s = store.job(job_id), time.monotonic() - started_s
    return status_of(store, job, shards, pace(first, job, spent_s))


def status_of(store: JobStore, job: Job, shards: list[ShardInfo], pace: Pace, events: int = EVENTS) -> Status:
    """The status of a job that was just looked at. Raises JobNotFound."""
    held = any(shard.state is ShardState.LEASED for shard in shards)
    return Status(
        job=job,
        shards=dict(Counter(str(shard.state) for shard in shards)),
        holders=_holders(shards),
        workers={worker.id: worker for worker in store.workers()},
        able=_able(store, job, shards) if not held and job.status is JobStatus.IN_PROGRESS else None,
        pace=pace,
        events=store.events(job.id)[-events:],
    )


def pace(first: Job, job: Job, spent_s: float) -> Pace:
    """Of an ended job over all its time, of another one between two looks, `spent_s` apart, or, if nothing came between
    them, since it was accepted."""
    rows, tokens = done(job) - done(first), _tokens(job) - _tokens(first)
    if (job.status.ended or not rows) and job.accepted_ms is not None:
        rows, tokens = done(job), _tokens(job)
        until_ms = job.ended_ms if job.ended_ms is not None else time.time() * 1000
        spent_s = (until_ms - job.accepted_ms) / 1000
    if not rows or spent_s <= 0:
        return Pace(None, None, None)
    rows_s = rows / spent_s
    return Pace(rows_s, tokens / spent_s, None if job.status.ended else (job.total - done(job)) / rows_s)


def done(job: Job) -> int:
    """Rows that have a result."""
    return job.completed + job.failed


def as_json(status: Status) -> str:
    """One object: the job's fields, and beside them what is known of its shards, workers, rates and events."""
    more: dict[str, Any] = {
        "shard_states": status.shards,
        "holders": status.holders,
        "able": status.able,
        **asdict(status.pace),
        "events": [{"number": e.number, "at_ms": e.at_ms, "what": e.what} for e in status.events],
    }
    return json.dumps(as_data(status.job) | more)


def as_lines(status: Status) -> Iterator[str]:
    """The screen."""
    job, spec = status.job, status.job.spec
    yield in_words(job)
    for line in why_refused(job):
        yield f"  {line}"
    yield printable(f"input     {spec.input_name}, {job.total:,} rows for {spec.names.base}{_of(spec.retry_of)}")
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(status.shards.items()))
    yield f"shards    {job.shards_done:,} of {job.shards:,} done" + (f" ({states})" if states else "")
    yield f"tokens    {job.prompt_tokens:,} in, {job.completion_tokens:,} out"
    pace = status.pace
    if pace.rows_per_s:
        eta = f", ETA {time_in_words(pace.eta_s)}" if pace.eta_s is not None else ""
        yield f"rate      {pace.rows_per_s:,.1f} rows/s, {pace.tokens_per_s or 0:,.0f} tok/s{eta}"
    yield f"times     {', '.join(_times(job))}"
    if spec.priority:
        yield f"priority  {spec.priority}"
    if spec.metadata:
        yield printable("metadata  " + ", ".join(f"{key}={value}" for key, value in spec.metadata.items()))
    for worker, count in status.holders.items():
        yield f"held by   {printable(_worker(worker, status.workers.get(worker)))}: {count:,} shards"
    if status.able:
        yield printable(f"waiting   {status.able}")
    for event in status.events:
        yield event_line(event)


def table(jobs: list[Job]) -> Iterator[str]:
    """A line for each job under a head."""
    head = ("id", "status", "done", "failed", "rows", "priority", "created", "input")
    rows = [
        (
            job.id,
            str(job.status),
            f"{done(job) / job.total:.0%}" if job.total else "-",
            f"{job.failed:,}",
            f"{job.total:,}",
            str(job.spec.priority),
            _clock(job.created_ms),
            printable(job.spec.input_name),
        )
        for job in jobs
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def event_line(event: Event) -> str:
    """An event as `watch` says it."""
    return printable(f"{_clock(event.at_ms)}  {event.what}")


def _able(store: JobStore, job: Job, shards: list[ShardInfo]) -> str:
    names = {pinned.key: name for name, pinned in job.spec.names.adapters.items()}
    waiting = {shard.adapters for shard in shards if shard.state is ShardState.READY}
    return able(store.manifests(), store.workers(), waiting, job.spec.base_id).in_words(names)


def _holders(shards: list[ShardInfo]) -> dict[str, int]:
    held = (shard.worker for shard in shards if shard.state is ShardState.LEASED and shard.worker is not None)
    return dict(Counter(held).most_common())


def _tokens(job: Job) -> int:
    return job.prompt_tokens + job.completion_tokens


def _of(parent: str | None) -> str:
    return f", a retry of {parent}" if parent else ""


def _times(job: Job) -> Iterator[str]:
    yield f"created {_clock(job.created_ms)}"
    if job.ended_ms is not None:
        took = f" after {time_in_words((job.ended_ms - job.accepted_ms) / 1000)}" if job.accepted_ms else ""
        yield f"{job.status} {_clock(job.ended_ms)}{took}"
    elif job.expires_ms is not None:
        yield f"expires {_clock(job.expires_ms)}"


def _worker(worker: str, record: WorkerRecord | None) -> str:
    if record is None:
        return f"{worker} (not heard of lately)"
    return f"{worker} ({record.device} on {record.host}, {record.state})"


def _clock(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")
