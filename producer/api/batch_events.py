"""A batch as server-sent events: how far it is, and what happens to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from loramill.producer.api.batch_book import Batch, Book
from loramill.producer.api.batch_calls import job_of
from loramill.producer.api.batch_view import shown
from loramill.producer.api.context import Api
from loramill.schemas.batch_objects import BatchEvent, BatchObject
from loramill.store.errors import JobNotFound
from loramill.store.records import Event

LOOK_S = 0.5
PING_S = 15.0
END = "end"
"""The id of the last event: whoever has seen it has seen all."""


async def stream(api: Api, batch_id: str, seen: int) -> AsyncIterator[bytes]:
    """`batch` events, whenever the batch is another than it was, and `happened` ones of what its job records, numbered,
    those after number `seen`; to the batch's end. The id of every event says how to resume after it."""
    before: BatchObject | None = None
    said_s = time.monotonic()
    while True:
        batch, now, happened = await asyncio.to_thread(_look, api, batch_id, seen)
        for event in happened:
            seen = event.number
            data = BatchEvent(number=event.number, at=event.at_ms / 1000, what=event.what)
            yield format_sse_event(event="happened", data_str=data.model_dump_json(), id=str(seen))
        if now != before or batch.ended:
            last = END if batch.ended else str(seen)
            yield format_sse_event(event="batch", data_str=now.model_dump_json(), id=last)
        if batch.ended:
            return
        if happened or now != before:
            before, said_s = now, time.monotonic()
        elif time.monotonic() - said_s > PING_S:
            said_s = time.monotonic()
            yield KEEPALIVE_COMMENT
        await asyncio.sleep(LOOK_S)


def _look(api: Api, batch_id: str, seen: int) -> tuple[Batch, BatchObject, list[Event]]:
    # Its end is looked for first, so that nothing which happened before it is missed.
    batch = Book(api.shelf).get(batch_id)
    now = shown(batch, job_of(api, batch))
    try:
        return batch, now, api.store.events(batch.job_id, seen) if batch.job_id else []
    except JobNotFound:
        return batch, now, []
