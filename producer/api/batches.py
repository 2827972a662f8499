"""The routes under /v1/batches."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from loramill.producer.api import batch_calls
from loramill.producer.api.batch_book import Batch, Book
from loramill.producer.api.batch_events import END, stream
from loramill.producer.api.context import Api, ApiOf, CallerOf
from loramill.producer.api.errors import ApiError
from loramill.producer.api.event_streams import EVENT_STREAM
from loramill.producer.api.feed import Feeds, Page
from loramill.schemas.batch_objects import BatchCreate, BatchList, BatchObject, BatchRetry, ResultFeed
from loramill.store.errors import JobNotFound
from loramill.store.records import Job

router = APIRouter(prefix="/v1/batches", tags=["batches"])

_LOOK_S = 0.25
_LINES = "application/jsonl"

IdOf = Annotated[str, Path(alias="batch_id")]
KeyOf = Annotated[str | None, Header(alias="idempotency-key")]


def _found(api: ApiOf, caller: CallerOf, batch_id: IdOf) -> Batch:
    return batch_calls.find(api, caller, batch_id)


FoundOf = Annotated[Batch, Depends(_found)]


@router.post("")
def create_batch(asked: BatchCreate, api: ApiOf, caller: CallerOf, idempotency_key: KeyOf = None) -> BatchObject:
    """Begins a batch over the lines of an uploaded file. They are checked after the answer: a batch whose lines are
    invalid becomes `failed`."""
    return batch_calls.create(api, caller, asked, key=idempotency_key)


@router.get("")
def list_batches(
    api: ApiOf,
    caller: CallerOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    """The newest first."""
    return batch_calls.list_(api, caller, after=after, limit=limit)


@router.get("/{batch_id}")
def retrieve_batch(api: ApiOf, caller: CallerOf, batch_id: IdOf) -> BatchObject:
    """As it is now."""
    return batch_calls.retrieve(api, caller, batch_id)


@router.post("/{batch_id}/cancel")
def cancel_batch(api: ApiOf, caller: CallerOf, batch_id: IdOf) -> BatchObject:
    """Starts nothing more of it; what is finished is kept, and will be in its files."""
    return batch_calls.cancel(api, caller, batch_id)


@router.post("/{batch_id}/retry")
def retry_batch(
    api: ApiOf,
    caller: CallerOf,
    batch_id: IdOf,
    asked: Annotated[BatchRetry | None, Body()] = None,
    idempotency_key: KeyOf = None,
) -> BatchObject:
    """A new batch of the rows of an ended one that failed or never ran."""
    failed_only = asked is not None and asked.failed_only
    return batch_calls.retry(api, caller, batch_id, failed_only=failed_only, key=idempotency_key)


_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": EVENT_STREAM},
    204: {"description": "All events were seen."},
}


@router.get("/{batch_id}/events", response_class=StreamingResponse, responses=_EVENTS)
async def watch_batch(
    api: ApiOf, batch: FoundOf, last_event_id: Annotated[str | None, Header(alias="last-event-id")] = None
) -> Response:
    """Server-sent events: `batch` with the batch whenever it changed, `happened` with what happened to it, until it has
    ended. `Last-Event-ID` goes on after that event."""
    if last_event_id == END:
        return Response(status_code=204)  # what ends an EventSource's asking again
    seen = int(last_event_id) if last_event_id and last_event_id.isascii() and last_event_id.isdigit() else 0
    return StreamingResponse(stream(api, batch.id, seen), media_type="text/event-stream")


_RESULTS: dict[int | str, dict[str, Any]] = {
    200: {"model": ResultFeed, "content": {_LINES: {"schema": {"type": "string"}}}}
}


@router.get("/{batch_id}/results", responses=_RESULTS)
async def read_results(
    request: Request,
    api: ApiOf,
    batch: FoundOf,
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    wait: Annotated[float, Query(ge=0, le=60)] = 0,
) -> Response:
    """Rows as they finish, from row number `after` on, without waiting for the files: the first results in the order in
    which they came. Where there is nothing new it waits for up to `wait` seconds. With `Accept: application/jsonl` the
    lines themselves, and the cursor in `x-loramill-next`."""
    until = time.monotonic() + wait
    while True:
        page, more = await asyncio.to_thread(_page, api, batch.id, after, limit)
        if page.lines or not more or time.monotonic() >= until or await request.is_disconnected():
            break
        await asyncio.sleep(min(_LOOK_S, max(until - time.monotonic(), 0)))
    if _LINES in request.headers.get("accept", ""):
        said = {"x-loramill-next": str(page.next), "x-loramill-has-more": str(more).lower()}
        return Response(b"".join(line + b"\n" for line in page.lines), media_type=_LINES, headers=said)
    head = b'{"object":"list","data":['
    rows = ",".join(map(str, page.rows))
    tail = f'],"rows":[{rows}],"next":{page.next},"has_more":{str(more).lower()}}}'.encode()
    return Response(head + b",".join(page.lines) + tail, media_type="application/json")


def _page(api: Api, batch_id: str, after: int, limit: int) -> tuple[Page, bool]:
    """Some rows, and whether there are more or will be."""
    batch = Book(api.shelf).get(batch_id)
    job = _job(api, batch)
    if job is None:
        return Page([], [], after), not batch.ended
    feeds: Feeds = api.shared.setdefault("feeds", Feeds(api.store))
    page = feeds.read(job, after, limit)
    return page, not job.status.ended or page.next < job.completed + job.failed


def _job(api: Api, batch: Batch) -> Job | None:
    """Whatever became of it. Raises ApiError if it was removed."""
    if batch.data.in_progress_ms is None or batch.job_id is None:
        return None
    try:
        return api.store.job(batch.job_id)
    except JobNotFound:
        message = f"the rows of the batch {batch.id} are not kept any more: read its files"
        raise ApiError(404, message, code="results_not_found") from None
