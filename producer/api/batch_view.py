"""A batch as clients see it: its record and its job, put together. Pure."""

from __future__ import annotations

from typing import Any

from loramill.producer.api.batch_book import Batch, BatchData
from loramill.schemas.batch_objects import BatchErrors, BatchExtras, BatchObject, BatchUsage, RequestCounts
from loramill.schemas.job import JobStatus
from loramill.store.records import Job

_ENDING = {
    JobStatus.COMPLETED: JobStatus.FINALIZING,
    JobStatus.EXPIRED: JobStatus.FINALIZING,
    JobStatus.CANCELLED: JobStatus.CANCELLING,
}
"""Of a job that has ended: where its batch is until the files are there."""


def of_job(job: Job) -> dict[str, Any]:
    """What a job says of its batch, as fields of BatchData."""
    return {
        "total": job.total,
        "completed": job.completed,
        "failed": job.failed,
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "in_progress_ms": job.accepted_ms,
        "expires_ms": job.expires_ms,
        "cancelling_ms": job.cancelled_ms,
        "finalizing_ms": None if job.status is JobStatus.CANCELLED else job.ended_ms,
    }


def status_of(batch: Batch, job: Job | None) -> JobStatus:
    """The one that is shown; `job` of a batch that has one, and has not ended."""
    status: JobStatus = batch.data.status
    if status is JobStatus.VALIDATING and batch.data.cancelling_ms is not None:
        return JobStatus.CANCELLING
    if status is JobStatus.IN_PROGRESS and job is not None:
        return _ENDING.get(job.status, job.status)
    return status


def shown(batch: Batch, job: Job | None) -> BatchObject:
    """The object; `job` as above."""
    status = status_of(batch, job)
    data = batch.data if batch.ended or job is None else batch.data.model_copy(update=of_job(job))
    ended_at = _seconds(data.ended_ms)

    def ended_as(one: JobStatus) -> int | None:
        return ended_at if status is one else None

    return BatchObject(
        id=batch.id,
        endpoint=data.endpoint,
        model=data.model,
        errors=BatchErrors(data=list(data.errors)) if data.errors else None,
        input_file_id=data.input_file_id,
        completion_window=data.completion_window,
        status=status,
        output_file_id=data.output_file_id,
        error_file_id=data.error_file_id,
        created_at=batch.record.created_ms // 1000,
        in_progress_at=_seconds(data.in_progress_ms),
        expires_at=_seconds(batch.deadline_ms if data.expires_ms is None else data.expires_ms),
        finalizing_at=_seconds(data.finalizing_ms),
        completed_at=ended_as(JobStatus.COMPLETED),
        failed_at=ended_as(JobStatus.FAILED),
        expired_at=ended_as(JobStatus.EXPIRED),
        cancelling_at=_seconds(data.cancelling_ms),
        cancelled_at=ended_as(JobStatus.CANCELLED),
        request_counts=RequestCounts(total=data.total, completed=data.completed, failed=data.failed),
        usage=_usage(data) if data.in_progress_ms is not None else None,
        metadata=data.metadata,
        loramill=BatchExtras(priority=data.priority, on_invalid=data.on_invalid, retry_of=data.retry_of),
    )


def _usage(data: BatchData) -> BatchUsage:
    tokens = data.prompt_tokens, data.completion_tokens
    return BatchUsage(input_tokens=tokens[0], output_tokens=tokens[1], total_tokens=sum(tokens))


def _seconds(ms: int | None) -> int | None:
    return None if ms is None else ms // 1000
