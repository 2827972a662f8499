"""How far a job is: its exit code, and the same in words and as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loramill.schemas.errors import printable
from loramill.schemas.failures import ExitCode
from loramill.schemas.job import JobStatus
from loramill.store.records import Job

_CODES = {
    JobStatus.FAILED: ExitCode.INPUT,
    JobStatus.CANCELLED: ExitCode.CANCELLED,
    JobStatus.EXPIRED: ExitCode.EXPIRED,
}


def exit_code(job: Job) -> ExitCode:
    """What a command that waited for this ended job returns."""
    return _CODES.get(job.status, ExitCode.ROWS_FAILED if job.failed else ExitCode.OK)


def in_words(job: Job) -> str:
    """One sentence without its full stop: `job x is in progress: 3,412 of 10,000 rows, 2 failed`."""
    done = job.completed + job.failed
    failed = f", {job.failed:,} failed" if job.failed else ""
    status = str(job.status).replace("_", " ")
    if job.status is JobStatus.FAILED:
        return f"job {job.id} failed: its input was refused, nothing ran"
    if job.status is JobStatus.COMPLETED:
        return f"job {job.id} is completed: {job.total:,} rows{failed}"
    return f"job {job.id} is {status}: {done:,} of {job.total:,} rows{failed}"


def why_refused(job: Job) -> list[str]:
    """The problems of a failed job's input, one line each."""
    lines = []
    for error in job.errors:
        where = f"{job.spec.input_name}:{error.line}: " if error.line is not None else ""
        lines.append(printable(f"{where}{f'{error.param}: ' if error.param else ''}{error.message}"))
    return lines


def as_data(job: Job) -> dict[str, Any]:
    """What `--json` prints of a job. Times are the store's, in milliseconds since 1970."""
    spec = job.spec
    said: Mapping[str, Any] = {
        "id": job.id,
        "status": str(job.status),
        "rows": job.total,
        "completed": job.completed,
        "failed": job.failed,
        "pending": job.total - job.completed - job.failed,
        "shards": job.shards,
        "shards_done": job.shards_done,
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "base": spec.names.base,
        "priority": spec.priority,
        "window_s": spec.window_s,
        "metadata": dict(spec.metadata),
        "input": spec.input_name,
        "input_sha256": spec.input_sha256,
        "retry_of": spec.retry_of,
        "created_ms": job.created_ms,
        "accepted_ms": job.accepted_ms,
        "expires_ms": job.expires_ms,
        "cancelled_ms": job.cancelled_ms,
        "ended_ms": job.ended_ms,
        "errors": [error.model_dump() for error in job.errors],
    }
    return dict(said)
