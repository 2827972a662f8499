"""What the page shows of jobs, from the store's data: numbers, links, and what may be done. Nothing is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loramill.producer.api.batch_book import Batch
from loramill.producer.api.batch_view import of_job, status_of
from loramill.producer.api.context import Caller
from loramill.producer.status import Pace, done
from loramill.schemas.job import JobError, JobStatus
from loramill.store.records import Job
from loramill.worker.durations import in_words

_TONES = {
    JobStatus.COMPLETED: "good",
    JobStatus.FAILED: "bad",
    JobStatus.CANCELLED: "rest",
    JobStatus.EXPIRED: "warn",
    JobStatus.CANCELLING: "rest",
}


@dataclass(slots=True, frozen=True)
class Action:
    """Something that a button does."""

    name: str
    """`cancel` or `retry`."""
    words: str
    url: str


@dataclass(slots=True, frozen=True)
class JobView:
    """A job, or a batch whose lines are being looked at, as a row of the table."""

    id: str
    input_name: str
    owner: str
    status: str
    tone: str
    is_open: bool
    created_ms: int
    never_run: int
    total: int = 0
    """0 while nobody knows."""
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    expires_ms: int | None = None
    took: str | None = None
    rows_per_s: float | None = None
    tokens_per_s: float | None = None
    eta: str | None = None
    retry_of: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    base: str = ""
    input_file: str | None = None
    """Where a batch's input is."""
    results: str | None = None
    """Where its answers are."""
    errors: str | None = None
    """Where its error lines are."""
    actions: tuple[Action, ...] = ()
    problems: tuple[JobError, ...] = ()
    """Of an input that was refused."""

    @property
    def name(self) -> str:
        """Its input's, without the folder that a command read it from."""
        return self.input_name.rstrip("/").rpartition("/")[2] or self.id

    @property
    def share(self) -> float | None:
        """Of its rows that are done; None while nobody knows how many there are."""
        return self.done / self.total if self.total else None


def may_see(caller: Caller, owner: str) -> bool:
    """Whether a caller may know that the job is there, and how it does."""
    return caller.operator or owner == caller.name


def may_read(caller: Caller, owner: str) -> bool:
    """Whether what its rows say is the caller's, or a command's whose operator the caller is."""
    return owner == caller.name or (caller.operator and not owner)


def job_view(job: Job, pace: Pace, caller: Caller) -> JobView:
    """A command's job."""
    spec, status = job.spec, job.status
    never_run = job.total - done(job) if status.ended else 0
    actions = list[Action]()
    if status is JobStatus.IN_PROGRESS:
        actions.append(Action("cancel", "Cancel", f"/jobs/{job.id}/cancel"))
    reads = may_read(caller, spec.owner)
    if reads and status.ended and status is not JobStatus.FAILED and job.failed + never_run:
        actions.append(_retry(f"/jobs/{job.id}/retry", never_run))
    return JobView(
        id=job.id,
        input_name=spec.input_name,
        owner=spec.owner,
        created_ms=job.created_ms,
        never_run=never_run,
        total=job.total if status is not JobStatus.VALIDATING else 0,
        done=done(job),
        failed=job.failed,
        prompt_tokens=job.prompt_tokens,
        completion_tokens=job.completion_tokens,
        expires_ms=None if status.ended else job.expires_ms,
        metadata=spec.metadata,
        priority=spec.priority,
        base=spec.names.base,
        retry_of=spec.retry_of,
        results=f"/jobs/{job.id}/results" if reads and job.completed else None,
        errors=f"/jobs/{job.id}/errors" if reads and job.failed + never_run else None,
        actions=tuple(actions),
        problems=job.errors,
        **_of_status(status, job.failed),
        **_of_pace(status, pace, job.accepted_ms, job.ended_ms),
    )


def batch_view(batch: Batch, job: Job | None, pace: Pace, name: str, caller: Caller) -> JobView:
    """A batch; `job` is its own, None before its lines were looked at and once it was removed, `name` its input's."""
    status = status_of(batch, job)
    data = batch.data.model_copy(update=of_job(job)) if job and not batch.ended else batch.data
    done_rows = data.completed + data.failed
    never_run = data.total - done_rows if batch.ended else 0
    mine, path = batch.owner == caller.name, f"/v1/batches/{batch.id}"
    actions = list[Action]()
    if status in (JobStatus.VALIDATING, JobStatus.IN_PROGRESS) and (mine or job is not None):
        actions.append(Action("cancel", "Cancel", f"{path if mine else f'/jobs/{batch.id}'}/cancel"))
    if mine and batch.ended and status is not JobStatus.FAILED and data.failed + never_run:
        actions.append(_retry(f"{path}/retry", never_run))
    return JobView(
        id=batch.id,
        input_name=name,
        owner=batch.owner,
        created_ms=batch.record.created_ms,
        never_run=never_run,
        total=data.total,
        done=done_rows,
        failed=data.failed,
        prompt_tokens=data.prompt_tokens,
        completion_tokens=data.completion_tokens,
        expires_ms=None if batch.ended else batch.deadline_ms,
        metadata=data.metadata or {},
        priority=data.priority,
        base=job.spec.names.base if job else "",
        retry_of=data.retry_of,
        input_file=_content(data.input_file_id) if mine else None,
        results=_content(data.output_file_id) if mine else None,
        errors=_content(data.error_file_id) if mine else None,
        actions=tuple(actions),
        problems=data.errors,
        **_of_status(status, data.failed),
        **_of_pace(status, pace, data.in_progress_ms, data.ended_ms),
    )


def _of_status(status: JobStatus, failed: int) -> dict[str, Any]:
    words = "running" if status is JobStatus.IN_PROGRESS else str(status)
    tone = "warn" if status is JobStatus.COMPLETED and failed else _TONES.get(status, "run")
    return {"status": words, "tone": tone, "is_open": not status.ended}


def _of_pace(status: JobStatus, pace: Pace, accepted_ms: int | None, ended_ms: int | None) -> dict[str, Any]:
    took = ended_ms is not None and accepted_ms is not None and in_words((ended_ms - accepted_ms) / 1000)
    return {
        "rows_per_s": pace.rows_per_s,
        "tokens_per_s": pace.tokens_per_s,
        "eta": in_words(pace.eta_s) if pace.eta_s is not None and status is JobStatus.IN_PROGRESS else None,
        "took": took or None,
    }


def _retry(url: str, never_run: int) -> Action:
    return Action("retry", "Retry the rest" if never_run else "Retry failed", url)


def _content(file_id: str | None) -> str | None:
    return file_id and f"/v1/files/{file_id}/content"
