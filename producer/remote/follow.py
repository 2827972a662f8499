"""Batches on their way: what happens to them, and their rows as they finish."""

from __future__ import annotations

import time
from functools import partial
from itertools import chain, count
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from loramill.producer.collect import put_lines
from loramill.producer.generated import generated, result_of
from loramill.producer.remote.downloads import fetched, lines_of
from loramill.producer.remote.errors import Refused, Unreachable
from loramill.producer.remote.steps import Body, Call, Do, Item, Next, Pause, Steps, asked, pause_s
from loramill.producer.spool import InOrder, Spool
from loramill.producer.waiting import AWAY_S, LEAST_S, MOST_S
from loramill.schemas.batch_objects import BatchEvent, BatchObject, ResultFeed

HOLD_S = 20.0
"""How long the server is to hold a request for results while there are none."""
PAGE_ROWS = 500
EVENTS = "text/event-stream"
_UNTOLD = frozenset({404, 405, 406, 501})
"""Of a server, or of what is before it, that has no events."""


def looked(batch_id: str, patience_s: float) -> Steps[BatchObject]:
    """How it is now. Raises Refused, Unreachable."""
    reply = yield from asked(Call("GET", f"batches/{batch_id}"), patience_s)
    return BatchObject.model_validate_json(reply.content)


def watched(batch_id: str, patience_s: float) -> Steps[None]:
    """The batch now and after each change, and what happens to it meanwhile, as items, until it has ended; a server
    that was there may be away for AWAY_S. Raises Refused, Unreachable."""
    batch = yield from looked(batch_id, patience_s)
    yield Item(batch)
    last, broken, since_s = "", 0, time.monotonic()
    while not batch.status.ended:
        headers = {"accept": EVENTS, **({"last-event-id": last} if last else {})}
        call = Call("GET", f"batches/{batch_id}/events", headers=headers, body=Body.EVENTS)
        try:
            reply = yield from asked(call, AWAY_S)
            if not reply.headers.get("content-type", "").startswith(EVENTS):
                return (yield from _polled(batch))
            while (event := (yield Next())) is not None:
                last, broken, since_s = event.id or last, 0, time.monotonic()
                if event.event == "happened":
                    yield Item(BatchEvent.model_validate_json(event.data))
                elif event.event == "batch" and (now := BatchObject.model_validate_json(event.data)) != batch:
                    batch = now
                    yield Item(batch)
        except Refused as error:
            if error.status not in _UNTOLD:
                raise
            return (yield from _polled(batch))
        except Unreachable:
            pass
        if not batch.status.ended:
            # It broke off, or whatever is in between ended it.
            pause = pause_s(broken, AWAY_S - (time.monotonic() - since_s), None)
            if pause is None:
                raise Unreachable(f"the events of {batch_id} broke off again and again", sent=True)
            broken += 1
            yield Pause(pause)


def _polled(batch: BatchObject) -> Steps[None]:
    """The same where events do not come through."""
    pause = LEAST_S
    while not batch.status.ended:
        yield Pause(pause)
        now = yield from looked(batch.id, AWAY_S)
        pause = LEAST_S if now != batch else min(pause * 1.5, MOST_S)
        if now != batch:
            batch = now
            yield Item(batch)


def waited(batch_id: str, timeout_s: float | None, patience_s: float) -> Steps[BatchObject]:
    """The batch once it has ended; a server that was there may be away for AWAY_S. Raises TimeoutError, and it goes on;
    Refused, Unreachable."""
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    before: BatchObject | None = None
    pause = LEAST_S
    while True:
        batch = yield from looked(batch_id, patience_s if before is None else AWAY_S)
        if batch.status.ended:
            return batch
        pause = LEAST_S if batch != before else min(pause * 1.5, MOST_S)
        before = batch
        left_s = pause if until_s is None else until_s - time.monotonic()
        if left_s <= 0:
            counts = batch.request_counts
            how = f"{batch.status}, {counts.completed + counts.failed:,} of {counts.total:,} rows"
            raise TimeoutError(f"{batch_id} has not ended after {timeout_s:g} s: {how}; it goes on")
        yield Pause(min(pause, left_s))


def results(batch_id: str, follow: bool, after: int, patience_s: float) -> Steps[None]:
    """Results, as items, in the order in which they were committed; a server that was there may be away for AWAY_S.
    Raises Refused, Unreachable."""
    has_more = True
    while has_more:
        page, has_more = yield from _page(batch_id, follow, after, patience_s)
        after, patience_s = page.next, AWAY_S
        for row, line in zip(page.rows, page.data, strict=True):
            yield Item(result_of(row, line.model_dump()))


def ordered_results(batch_id: str, follow: bool, after: int, patience_s: float) -> Steps[None]:
    """The same in the order of the input: what is early waits on disk."""
    in_order: InOrder | None = None
    start, given, has_more = 0, count(), True
    with TemporaryFile() as file:
        while has_more:
            page, has_more = yield from _page(batch_id, follow, start, patience_s)
            start, patience_s = page.next, AWAY_S
            if in_order is None:
                if not page.data:
                    continue
                batch = yield from looked(batch_id, patience_s)
                in_order = InOrder(Spool(batch.request_counts.total, cast(BinaryIO, file)))
            lines = [line.model_dump_json().encode() for line in page.data]
            yield Do(partial(put_lines, in_order.spool, list(zip(page.rows, lines, strict=True)), failed=False))
            for row, line in chain(in_order.ready(), () if has_more else in_order.rest()):
                if next(given) >= after:
                    yield Item(generated(row, line))


def _page(batch_id: str, follow: bool, after: int, patience_s: float) -> Steps[tuple[ResultFeed, bool]]:
    """Some results, and whether to ask for more."""
    params = {"after": after, "limit": PAGE_ROWS, "wait": HOLD_S if follow else 0}
    reply = yield from asked(Call("GET", f"batches/{batch_id}/results", params), patience_s)
    page = ResultFeed.model_validate_json(reply.content)
    return page, page.has_more and (follow or bool(page.data))


def written(batch_id: str, errors: bool, patience_s: float) -> Steps[None]:
    """The results in a batch's output file or its error file, as items. Raises ValueError before it has ended."""
    batch = yield from looked(batch_id, patience_s)
    if not batch.status.ended:
        raise ValueError(f"{batch_id} is {batch.status}: it has no files yet; wait for it, or read its results")
    file_id = batch.error_file_id if errors else batch.output_file_id
    number = count()
    if file_id is not None:
        yield from fetched(file_id, lines_of(lambda line: generated(next(number), line)), patience_s)
