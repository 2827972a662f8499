"""Why rows of a job failed: how many by each code, with one message of it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import orjson

from loramill.producer.collect import Seen, pick
from loramill.producer.waiting import PAGE
from loramill.store.contract import JobStore
from loramill.store.records import DoneRow, Job

LOOK_S = 0.3
"""One look takes about so long: a page that is asked for again has the rest."""
JOBS = 16
"""Whose failures are kept: a running job's take a byte a row."""
_MESSAGE = 300


@dataclass(slots=True, frozen=True)
class Reason:
    """One code."""

    code: str
    rows: int
    message: str
    """Of the first such row that was found."""
    custom_id: str | None


@dataclass(slots=True, frozen=True)
class Failed:
    """What is known of a job's failures."""

    reasons: tuple[Reason, ...] = ()
    """The most frequent first."""
    counted: int = 0
    """Rows among them."""

    def without_words(self) -> Failed:
        """For somebody who may not read the rows."""
        return Failed(tuple(Reason(one.code, one.rows, "", None) for one in self.reasons), self.counted)


@dataclass(slots=True)
class _Tally:
    """How far a job's results were read."""

    seen: Seen
    chunks: int = 0
    reasons: dict[str, Reason] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def said(self) -> Failed:
        reasons = sorted(self.reasons.values(), key=lambda one: (-one.rows, one.code))
        return Failed(tuple(reasons), sum(one.rows for one in reasons))


class Failures:
    """Reads results once, a look at a time. Any thread may ask."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._tallies: OrderedDict[str, _Tally] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, job: Job) -> Failed:
        """What can be said of a job that was just read. Raises StoreError."""
        if not job.failed:
            return Failed()
        tally = self._tally(job)
        # Two pages that show one job need not read it twice: the second takes what there is.
        if tally.lock.acquire(blocking=False):
            try:
                self._read_on(tally, job)
            finally:
                tally.lock.release()
        return tally.said()

    def _tally(self, job: Job) -> _Tally:
        with self._lock:
            tally = self._tallies.pop(job.id, None) or _Tally(Seen(job.total))
            self._tallies[job.id] = tally
            if len(self._tallies) > JOBS:
                self._tallies.popitem(last=False)
            return tally

    def _read_on(self, tally: _Tally, job: Job) -> None:
        until_s = time.monotonic() + LOOK_S
        left = job.failed - tally.said().counted
        while left > 0 and tally.chunks < job.chunks and time.monotonic() < until_s:
            page = self._store.results(job.id, tally.chunks, min(PAGE, job.chunks - tally.chunks))
            if not page:
                return
            for chunk in page:
                failed = tally.seen.first(chunk) & (chunk.index["failed"] != 0)
                for row in pick(chunk, failed).rows():
                    _count(tally, row)
                left -= int(failed.sum())
                tally.chunks += 1


def _count(tally: _Tally, row: DoneRow) -> None:
    line: dict[str, Any] = orjson.loads(row.line)
    said = line["error"] or line["response"]["body"]["error"]
    code = str(said["code"])
    before = tally.reasons.get(code)
    if before is None:
        tally.reasons[code] = Reason(code, 1, str(said["message"])[:_MESSAGE], line["custom_id"])
    else:
        tally.reasons[code] = Reason(code, before.rows + 1, before.message, before.custom_id)
