"""What is done with one batch at each stage of its life, by whoever has its lock. Whatever is interrupted here, by a
kill too, is done anew by whoever comes next, and what somebody does who lost the lock unaware is thrown away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from loramill.producer.announce import announce
from loramill.producer.api.batch_book import Batch, Book, now_ms
from loramill.producer.api.batch_view import of_job
from loramill.producer.api.contents import Contents
from loramill.producer.api.context import Api
from loramill.producer.api.intake import GoOn, model_of, served_to, take_in
from loramill.producer.api.outputs import publish, withdraw
from loramill.producer.invalid import Refused
from loramill.producer.submit import Submitted
from loramill.schemas.job import JobError, JobStatus
from loramill.store.errors import JobNotFound
from loramill.store.records import Job
from loramill.store.shelf import RecordChanged, RecordNotFound

_LOOK_S = 0.5
_log = logging.getLogger("loramill.api")


class Lost(Exception):
    """Another server sees to the batch now, or this one is closing."""


class _Cancelled(Exception):
    """The batch was cancelled while it was validated."""


class Steps:
    """Those of one server. `on_end` hears of every batch that has ended, maybe twice."""

    def __init__(self, api: Api, on_end: Callable[[Batch], None]) -> None:
        self._api, self._store, self._on_end = api, api.store, on_end
        self._book, self._contents = Book(api.shelf), Contents(api.shelf)

    def advance(self, batch: Batch, go_on: GoOn) -> None:
        """Takes the batch as far as it can go now. Raises what `go_on` does; RecordChanged if somebody else has changed
        it, NotYet, StoreError, OSError: and then it is to be done again."""
        if batch.ended:
            self._put_away(batch)
        elif batch.data.status is JobStatus.VALIDATING:
            self._validate(batch, go_on)
        else:
            self._finalize(batch, go_on)

    def _validate(self, batch: Batch, go_on: GoOn) -> None:
        if job := self._submitted(batch):
            return self._begin(batch, Submitted(job, None))
        if batch.data.cancelling_ms is not None:
            return self._end(batch, JobStatus.CANCELLED)
        if now_ms(batch) >= batch.deadline_ms:
            return self._refuse(batch, _because("batch_expired", "its window ended before it could be started"))
        served = served_to(self._api, batch)
        batch = self._book.change(batch, submits=batch.data.submits + 1)
        try:
            done = take_in(self._api, batch, served, self._unless_cancelled(batch, go_on))
        except Refused as refused:
            return self._refuse(batch, refused.errors)
        except _Cancelled:
            return self._end(self._book.get(batch.id), JobStatus.CANCELLED)
        try:
            self._begin(batch, done)
        except RecordChanged:
            if self._book.get(batch.id).job_id != done.job.id:
                self._store.cancel(done.job.id)  # another server has submitted it too, and nobody would look at this
            raise
        api = self._api
        if hindered := announce(done, self._store, api.store_url, prefix=api.prefix, broker=api.broker):
            _log.warning("batch %s: %s", batch.id, hindered)

    def _submitted(self, batch: Batch) -> Job | None:
        """The job that another server has submitted for it; what one has left unfinished goes."""
        if batch.job_id is None:
            return None
        try:
            if self._store.job(batch.job_id).status is JobStatus.VALIDATING:
                self._store.abandon(batch.job_id)
            return self._store.job(batch.job_id)
        except JobNotFound:
            return None

    def _unless_cancelled(self, batch: Batch, go_on: GoOn) -> GoOn:
        looked = time.monotonic()

        def go_on_unless_cancelled() -> None:
            nonlocal looked
            go_on()
            if time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                if self._book.get(batch.id).data.cancelling_ms is not None:
                    raise _Cancelled

        return go_on_unless_cancelled

    def _begin(self, batch: Batch, done: Submitted) -> None:
        job = done.job
        self._book.change(batch, status=JobStatus.IN_PROGRESS, model=model_of(done), **of_job(job))
        if batch.data.cancelling_ms is not None:
            self._store.cancel(job.id)
        self._book.runs(batch.id, job)
        _log.info("batch %s is in progress: job %s, %d rows", batch.id, job.id, job.total)

    def _finalize(self, batch: Batch, go_on: GoOn) -> None:
        try:
            job = self._store.job(batch.job_id or "")
        except JobNotFound:
            gone = "its results were removed before its files were written: no server ran for too long"
            return self._refuse(batch, _because("results_lost", gone))
        if batch.data.cancelling_ms is not None and job.status is JobStatus.IN_PROGRESS:
            job = self._store.cancel(job.id)
        if not job.status.ended:
            return self._book.runs(batch.id, job)
        if batch.data.publishes:
            withdraw(self._contents, batch)
        batch = self._book.change(batch, publishes=batch.data.publishes + 1)
        try:
            output, error = publish(self._store, self._contents, batch, job, go_on)
            go_on()
            fields = of_job(job) | {"output_file_id": output, "error_file_id": error}
            batch = self._ended(batch, job.status, **fields)
        except (Lost, RecordChanged, RecordNotFound):
            withdraw(self._contents, batch)
            raise
        self._put_away(batch)

    def _refuse(self, batch: Batch, errors: Iterable[JobError]) -> None:
        self._end(batch, JobStatus.FAILED, errors=tuple(errors))

    def _end(self, batch: Batch, status: JobStatus, **fields: Any) -> None:
        self._put_away(self._ended(batch, status, **fields))

    def _ended(self, batch: Batch, status: JobStatus, **fields: Any) -> Batch:
        """The one step by which a batch ends."""
        ended = self._book.change(batch, status=status, ended_ms=now_ms(batch), **fields)
        _log.info("batch %s is %s", batch.id, status)
        return ended

    def _put_away(self, batch: Batch) -> None:
        self._on_end(batch)
        self._book.put_away(batch.id)


def _because(code: str, message: str) -> list[JobError]:
    return [JobError(code=code, message=message)]
