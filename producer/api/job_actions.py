"""What the page does to jobs that are no batches: cancel, retry, and their rows as files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from typing import BinaryIO, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from loramill.producer.api.context import Api, ApiOf, Caller, CallerOf
from loramill.producer.api.errors import ApiError, invalid, not_found
from loramill.producer.api.page import reading_of
from loramill.producer.api.page_data import may_read
from loramill.producer.collect import Seen, pick, put, put_never_run
from loramill.producer.retry import retry
from loramill.producer.spool import Spool, joined
from loramill.producer.waiting import chunks
from loramill.schemas.failures import ExitCode, Failure
from loramill.store.contract import JobStore
from loramill.store.records import Job

router = APIRouter(include_in_schema=False)


@router.post("/jobs/{id}/cancel")
def cancel_job(id: str, request: Request, api: ApiOf, caller: CallerOf) -> Response:
    """Starts no more of it. An operator may do that to anybody's."""
    _, job = reading_of(api).find(caller, id)
    if job is None:
        raise not_found("job", id)
    api.store.cancel(job.id)
    return _done(request, id)


@router.post("/jobs/{id}/retry")
def retry_job(id: str, request: Request, api: ApiOf, caller: CallerOf) -> Response:
    """Its rows without an answer, as a new job, which is the answer's."""
    job = _readable(api, caller, id)
    try:
        new = retry(api.store, job)
    except Failure as error:
        if error.code is ExitCode.INPUT:
            raise invalid(str(error), code="not_retried") from error
        raise ApiError(503, str(error), code="not_retried") from error
    if new is None:
        raise invalid(f"job {id} has no row without an answer", code="nothing_to_retry")
    return _done(request, new.id)


@router.get("/jobs/{id}/results")
def results_of_job(id: str, api: ApiOf, caller: CallerOf) -> Response:
    """The answered rows that there are, in input order."""
    return _lines(api, _readable(api, caller, id), failed=False)


@router.get("/jobs/{id}/errors")
def errors_of_job(id: str, api: ApiOf, caller: CallerOf) -> Response:
    """The error lines that there are, in input order."""
    return _lines(api, _readable(api, caller, id), failed=True)


def _readable(api: Api, caller: Caller, id: str) -> Job:
    """A command's job whose rows the caller may read: a batch's files are where OpenAI has them. Raises ApiError."""
    batch, job = reading_of(api).find(caller, id)
    if batch is not None or job is None or not may_read(caller, job.spec.owner):
        raise not_found("job", id)
    return job


def _lines(api: Api, job: Job, *, failed: bool) -> Response:
    lines = lines_of(api.store, job, failed=failed)
    # Everything is on disk before the first byte goes out: what the store cannot do is then an error, not a short file.
    next(lines)
    name = f"{job.id}{'.errors' if failed else ''}.jsonl"
    headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
    return StreamingResponse(lines, headers=headers, media_type="application/jsonl")


def lines_of(store: JobStore, job: Job, *, failed: bool) -> Iterator[bytes]:
    """A job's answered rows, or its error lines, in input order: nothing first, once all is on disk, and then the
    lines, some at a time."""
    with closing(tempfile.TemporaryFile()) as file:
        spool, seen = Spool(job.total, cast(BinaryIO, file)), Seen(job.total)
        for chunk in chunks(store, job):
            put(spool, pick(chunk, seen.first(chunk)))
        if failed:
            put_never_run(store, job, spool)
        yield b""
        yield from joined(spool.lines(np.flatnonzero(spool.failed if failed else spool.answered)))


def _done(request: Request, id: str) -> Response:
    """To the job's page, for a browser without our script."""
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse(f"/jobs/{id}", 303)
    return JSONResponse({"id": id})
