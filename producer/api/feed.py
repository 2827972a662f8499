"""The rows of a batch in the order in which they were committed, each once, from any point on."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from loramill.producer.collect import Seen, pick
from loramill.producer.waiting import PAGE
from loramill.store.contract import JobStore
from loramill.store.errors import StoreLost
from loramill.store.packing import Chunk
from loramill.store.records import DoneRow, Job

MAX_BYTES = 8 * 2**20
"""Of lines in one answer, unless a single one is longer."""
_KEPT = 32
"""Batches whose chunks are known: a byte a row each."""


@dataclass(slots=True, frozen=True)
class Page:
    """Some rows' lines, without their newlines."""

    rows: list[int]
    """Where each is in the input."""
    lines: list[bytes]
    next: int
    """How many rows come before those that follow."""


class Feeds:
    """The feeds of a server. Any thread may read."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._known: OrderedDict[str, _Feed] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, job: Job, after: int, limit: int) -> Page:
        """Rows number `after` and up, at most `limit`; no rows if there are no such yet. Raises StoreError."""
        with self._lock:
            feed = self._known.setdefault(job.id, _Feed(job))
            self._known.move_to_end(job.id)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        rows, lines, size = list[int](), list[bytes](), 0
        for done in feed.rows(self._store, job, after):
            if len(lines) == limit or (lines and size + len(done.line) > MAX_BYTES):
                break
            rows.append(done.row)
            lines.append(done.line)
            size += len(done.line)
        return Page(rows, lines, after + len(lines))


class _Feed:
    """How many rows each chunk of a job has that no earlier one had, and which, where those are not all."""

    def __init__(self, job: Job) -> None:
        self._seen = Seen(job.total)
        self._starts = [0]
        """Of each chunk that is known, and of the next one: how many rows come before its own."""
        self._parts: dict[int, NDArray[np.bool_]] = {}
        self._lock = threading.Lock()

    def rows(self, store: JobStore, job: Job, after: int) -> Iterator[DoneRow]:
        """From row number `after` on."""
        known = len(self._starts) - 1
        number = known if after >= self._starts[known] else bisect_right(self._starts, after) - 1
        while number < job.chunks:
            page = store.results(job.id, number, min(PAGE, job.chunks - number))
            if not page:
                raise StoreLost(f"job {job.id} had {job.chunks:,} chunks of results, and {number:,} is not there")
            for chunk in page:
                first = self._first(number, chunk)
                skipped = max(after - self._starts[number], 0)
                if skipped < len(first):
                    yield from islice(first.rows(), skipped, None)
                number += 1

    def _first(self, number: int, chunk: Chunk) -> Chunk:
        """The chunk with its rows that no earlier one had."""
        with self._lock:
            if number == len(self._starts) - 1:
                first = self._seen.first(chunk)
                if not first.all():
                    self._parts[number] = first
                self._starts.append(self._starts[number] + int(first.sum()))
            part = self._parts.get(number)
        return chunk if part is None else pick(chunk, part)
