"""What the page needs of the store, read for one caller."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import merge

from loramill.producer.api.batch_book import Batch, Book
from loramill.producer.api.chart import Chart, chart
from loramill.producer.api.contents import Contents
from loramill.producer.api.context import Api, Caller
from loramill.producer.api.errors import not_found
from loramill.producer.api.failures import Failed, Failures
from loramill.producer.api.page_data import JobView, batch_view, job_view, may_read, may_see
from loramill.producer.api.page_fleet import AdapterView, WorkerView, adapter_views, worker_views
from loramill.producer.api.throughput import Throughput
from loramill.producer.status import Pace, Status, done, status_of
from loramill.schemas.job import Lane
from loramill.store.errors import JobNotFound
from loramill.store.records import Job
from loramill.store.shelf import RecordNotFound

PAGE = 25
EVENTS = 30
_BATCH_JOB = re.compile(r"(batch_[0-9a-f]{24})(-[0-9]+)?")


@dataclass(slots=True, frozen=True)
class After:
    """Where a page of jobs begins: behind these, which are the last that the page before has seen."""

    job: str | None = None
    batch: str | None = None


@dataclass(slots=True, frozen=True)
class Jobs:
    """A page of them, the newest first."""

    views: list[JobView]
    is_first: bool
    older: After | None
    """None on the last page."""
    read: dict[str, Job]
    """Those that there are of them in the store, by id."""


@dataclass(slots=True, frozen=True)
class Overview:
    """The whole page."""

    jobs: Jobs
    chart: Chart
    running: int
    waiting_rows: int
    workers: list[WorkerView]
    workers_ready: int
    adapters: list[AdapterView]
    now_ms: float


@dataclass(slots=True, frozen=True)
class Detail:
    """One job's page."""

    view: JobView
    status: Status | None
    """None where there is no job (yet, or any more)."""
    failed: Failed
    now_ms: float

    @property
    def goes_on(self) -> bool:
        """Whether there will be more to see: the job's, or of why its rows failed."""
        return self.view.is_open or (self.status is not None and self.failed.counted < self.view.failed)


class Reading:
    """Reads one store for the pages of a server."""

    def __init__(self, api: Api, throughput: Throughput) -> None:
        self._store, self._throughput = api.store, throughput
        self._book, self._contents = Book(api.shelf), Contents(api.shelf)
        self._failures = Failures(api.store)

    def overview(self, caller: Caller, after: After) -> Overview:
        """Raises StoreError; ApiError for a cursor that leads nowhere."""
        now_s = time.time()
        owner = _owner(caller)
        workers, manifests = self._store.workers(), self._store.manifests()
        jobs = self._jobs(caller, after)
        # What was looked at some seconds ago, and now: all numbers on the page are to agree.
        known = {job.id: job for job in self._throughput.open_jobs(owner)} | jobs.read
        open_jobs = [job for job in known.values() if not job.status.ended]
        return Overview(
            jobs=jobs,
            chart=chart(self._throughput.samples(owner), now_s),
            running=len(open_jobs),
            waiting_rows=sum(job.total - done(job) for job in open_jobs),
            workers=worker_views(workers, manifests, now_s * 1000, caller),
            workers_ready=sum(worker.state == "ready" for worker in workers),
            adapters=adapter_views(workers, manifests, open_jobs, caller),
            now_ms=now_s * 1000,
        )

    def detail(self, caller: Caller, id: str) -> Detail:
        """Raises ApiError (404) for a job that is not there, or not for this caller's eyes; StoreError."""
        batch, job = self.find(caller, id)
        view = self._view(caller, batch, job)
        status = None
        if job is not None:
            status = status_of(self._store, job, self._store.shards(job.id), self._throughput.pace(job), EVENTS)
        failed = self._failures.of(job) if job is not None else Failed()
        if not may_read(caller, view.owner):
            # What is said of lines and rows may quote them.
            failed, view = failed.without_words(), replace(view, problems=())
        return Detail(view, status, failed, time.time() * 1000)

    def find(self, caller: Caller, id: str) -> tuple[Batch | None, Job | None]:
        """A batch with its job, or a command's job. Raises ApiError (404)."""
        batch = self._batch(id)
        if batch is not None:
            if not may_see(caller, batch.owner):
                raise not_found("job", id)
            return batch, self._job_of(batch)
        try:
            job = self._store.job(id)
        except JobNotFound:
            raise not_found("job", id) from None
        if job.spec.lane is not Lane.BULK or not may_see(caller, job.spec.owner):
            raise not_found("job", id)
        return None, job

    def _jobs(self, caller: Caller, after: After) -> Jobs:
        last, views, read = after, list[JobView](), dict[str, Job]()
        try:
            # Jobs and batches, each the newest first: one list, from which a batch's own job is left out.
            for _, found in merge(
                self._of_commands(caller, after.job), self._of_batches(caller, after.batch), key=_newest
            ):
                if len(views) == PAGE:
                    return Jobs(views, after == After(), last, read)
                batch, job = (None, found) if isinstance(found, Job) else (found, self._job_of(found))
                last = After(last.job, batch.id) if batch else After(found.id, last.batch)
                if batch is None and self._is_batch_s(found.id):
                    continue
                views.append(self._view(caller, batch, job))
                if job is not None:
                    read[job.id] = job
        except (JobNotFound, RecordNotFound):
            # The last one of the page before was removed since.
            if after == After():
                raise
            return self._jobs(caller, After())
        return Jobs(views, after == After(), None, read)

    def _of_commands(self, caller: Caller, after: str | None) -> Iterator[tuple[int, Job | Batch]]:
        """Jobs; whoever has a key and is no operator has batches alone."""
        while caller.operator and (page := self._store.jobs(after=after, limit=PAGE)):
            for job in page:
                yield job.created_ms, job
            after = page[-1].id

    def _of_batches(self, caller: Caller, after: str | None) -> Iterator[tuple[int, Job | Batch]]:
        more = True
        while more:
            page, more = self._book.list(_owner(caller), after, PAGE)
            for batch in page:
                yield batch.record.created_ms, batch
                after = batch.id

    def _view(self, caller: Caller, batch: Batch | None, job: Job | None) -> JobView:
        pace = self._throughput.pace(job) if job else Pace(None, None, None)
        if batch is not None:
            # A retry's own input has no name that says anything.
            name = job.spec.input_name if job and not batch.data.retry_of else self._input_of(batch)
            return batch_view(batch, job, pace, name, caller)
        assert job is not None
        return job_view(job, pace, caller)

    def _is_batch_s(self, job_id: str) -> bool:
        found = _BATCH_JOB.fullmatch(job_id)
        return found is not None and self._batch(found[1]) is not None

    def _batch(self, id: str) -> Batch | None:
        if not _BATCH_JOB.fullmatch(id):
            return None
        try:
            return self._book.get(id)
        except RecordNotFound:
            return None

    def _input_of(self, batch: Batch) -> str:
        """What its file is called, as long as it is there."""
        try:
            return self._contents.find(batch.owner, batch.data.input_file_id).filename
        except RecordNotFound:
            return batch.data.input_file_id

    def _job_of(self, batch: Batch) -> Job | None:
        """Its accepted job, as long as that is kept."""
        if batch.data.in_progress_ms is None or batch.job_id is None:
            return None
        try:
            return self._store.job(batch.job_id)
        except JobNotFound:
            return None


def _owner(caller: Caller) -> str | None:
    """Whose jobs a caller sees: None for everybody's."""
    return None if caller.operator else caller.name


def _newest(found: tuple[int, Job | Batch]) -> int:
    return -found[0]
