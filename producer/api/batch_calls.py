"""What can be done with batches, for the routes and for whoever else does it in a caller's name. The errors that any of
it raises are ApiError and StoreError."""

from __future__ import annotations

from loramill.producer.api.batch_book import Batch, BatchData, Book, new_batch_id, now_ms
from loramill.producer.api.batch_view import shown, status_of
from loramill.producer.api.contents import Contents
from loramill.producer.api.context import Api, Caller
from loramill.producer.api.errors import ApiError, invalid, not_found
from loramill.producer.api.idempotency import Once
from loramill.producer.api.minder import nudge
from loramill.schemas.batch_objects import BatchCreate, BatchList, BatchObject, window_s
from loramill.schemas.job import JobStatus
from loramill.store.errors import JobNotFound
from loramill.store.records import Job
from loramill.store.shelf import RecordChanged, RecordNotFound

_NO_RETRY = {"x-should-retry": "false"}


def create(api: Api, caller: Caller, asked: BatchCreate, *, key: str | None = None) -> BatchObject:
    """A new batch of an uploaded file; the one that the same create with this Idempotency-Key, or an equal one within
    the last minute, has made. With a key, a file of the same content is the same file: who submits again after a crash
    has uploaded again. Raises ApiError: 404 for the file, 429 beyond the caller's quotas."""
    try:
        file = Contents(api.shelf).find(caller.name, asked.input_file_id)
    except RecordNotFound:
        raise not_found("file", asked.input_file_id, param="input_file_id") from None
    if file.purpose != "batch":
        message = f"the file {file.id} has the purpose `{file.purpose}`: a batch's input has `batch`"
        raise invalid(message, param="input_file_id", code="invalid_file_purpose")
    data = BatchData(
        endpoint=asked.endpoint,
        input_file_id=asked.input_file_id,
        completion_window=asked.completion_window,
        window_s=window_s(asked.completion_window),
        metadata=asked.metadata,
        priority=asked.loramill.priority,
        on_invalid=asked.loramill.on_invalid,
        output_ttl_s=asked.output_expires_after.seconds if asked.output_expires_after else api.limits.retention_s,
        adapters=caller.adapters,
        pending_rows=caller.quota.pending_rows,
    )
    same = asked if key is None else asked.model_copy(update={"input_file_id": file.sha256})
    return _create(api, caller, data, Once(api.shelf, caller.name, "batch", same.model_dump_json().encode(), key))


def retrieve(api: Api, caller: Caller, batch_id: str) -> BatchObject:
    """As it is now. Raises ApiError (404)."""
    batch = find(api, caller, batch_id)
    return shown(batch, job_of(api, batch))


def list_(api: Api, caller: Caller, *, after: str | None = None, limit: int = 20) -> BatchList:
    """Those of the caller, the newest first. Raises ApiError (404) for `after`."""
    try:
        found, has_more = Book(api.shelf).list(caller.name, after, limit)
    except RecordNotFound:
        raise not_found("batch", after or "", param="after") from None
    data = [shown(batch, job_of(api, batch)) for batch in found]
    return BatchList(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=has_more
    )


def cancel(api: Api, caller: Caller, batch_id: str) -> BatchObject:
    """Starts nothing more of it; what is finished is kept. Raises ApiError: 404, 400 if there is nothing to cancel."""
    while True:
        batch = find(api, caller, batch_id)
        job = job_of(api, batch)
        status = status_of(batch, job)
        if status is JobStatus.CANCELLING:
            return shown(batch, job)
        if status not in (JobStatus.VALIDATING, JobStatus.IN_PROGRESS):
            message = f"the batch {batch.id} is {status}: it cannot be cancelled"
            raise ApiError(400, message, code="batch_not_cancellable", headers=_NO_RETRY)
        if job is not None:
            api.store.cancel(job.id)
            nudge(api)
            continue
        try:
            # Its job, if there is one by now, is cancelled by whoever submits it.
            batch = Book(api.shelf).change(batch, cancelling_ms=now_ms(batch))
        except RecordChanged:
            continue
        nudge(api)
        return shown(batch, None)


def retry(api: Api, caller: Caller, batch_id: str, *, failed_only: bool = False, key: str | None = None) -> BatchObject:
    """A new batch of the rows of an ended one that failed or, without `failed_only`, never ran. Raises ApiError: 404,
    400 if there are none, 429."""
    batch = find(api, caller, batch_id)
    data = batch.data
    if not batch.ended or data.status is JobStatus.FAILED:
        why = "its input was refused" if batch.ended else "it has not ended: cancel it, or wait"
        raise ApiError(400, f"the batch {batch.id} cannot be retried: {why}", code="batch_not_retryable")
    if not (data.failed if failed_only else data.total - data.completed):
        raise ApiError(400, f"every row of the batch {batch.id} has its answer", code="nothing_to_retry")
    try:
        api.store.job(batch.job_id or batch.id)
    except JobNotFound:
        message = f"the rows of the batch {batch.id} are not kept any more: submit them again"
        raise ApiError(400, message, code="batch_not_retryable") from None
    asked = BatchData(
        endpoint=data.endpoint,
        input_file_id=data.input_file_id,
        completion_window=data.completion_window,
        window_s=data.window_s,
        metadata=data.metadata,
        priority=data.priority,
        output_ttl_s=data.output_ttl_s,
        adapters=caller.adapters,
        pending_rows=caller.quota.pending_rows,
        retry_of=batch.id,
        failed_only=failed_only,
    )
    once = Once(api.shelf, caller.name, "retry", asked.model_dump_json().encode(), key)
    return _create(api, caller, asked, once)


def find(api: Api, caller: Caller, batch_id: str) -> Batch:
    """Raises ApiError (404), for another's too."""
    try:
        return Book(api.shelf).find(caller.name, batch_id)
    except RecordNotFound:
        raise not_found("batch", batch_id) from None


def job_of(api: Api, batch: Batch) -> Job | None:
    """Of a batch whose job was accepted; None of one without, or that has ended."""
    if batch.data.status is not JobStatus.IN_PROGRESS or batch.job_id is None:
        return None
    try:
        return api.store.job(batch.job_id)
    except JobNotFound:
        return None


def _create(api: Api, caller: Caller, data: BatchData, once: Once) -> BatchObject:
    book = Book(api.shelf)
    if (earlier := once.known()) is not None:
        try:
            batch = book.get(earlier)
        except RecordNotFound:
            pass  # a server died between the two steps below, or is between them
        else:
            if once.keyed or batch.data.status not in (JobStatus.CANCELLED, JobStatus.FAILED):
                return shown(batch, job_of(api, batch))
            once.forget()
    _check_quota(book, caller)
    batch = book.put(once.claim(new_batch_id()), caller.name, data)
    nudge(api)
    return shown(batch, job_of(api, batch))


def _check_quota(book: Book, caller: Caller) -> None:
    usage, quota = book.usage(caller.name), caller.quota
    if usage.count >= quota.open_batches:
        message = f"{usage.count:,} of your batches have not ended, and there may be {quota.open_batches:,}"
        raise ApiError(429, message, code="too_many_open_batches", headers=_NO_RETRY)
    if usage.size >= quota.pending_rows:
        message = f"your open batches have {usage.size:,} rows, and may have {quota.pending_rows:,}"
        raise ApiError(429, message, code="too_many_pending_rows", headers=_NO_RETRY)
