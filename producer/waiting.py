"""Waiting for jobs: polling with back-off, through times when the store is away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from loramill.producer.outcomes import in_words as said_of
from loramill.store.contract import JobStore
from loramill.store.errors import StoreLost, StoreUnreachable
from loramill.store.packing import Chunk
from loramill.store.records import Job
from loramill.worker.durations import in_words

LEAST_S = 0.2
MOST_S = 2.0
AWAY_S = 600.0
"""A store that does not answer for so long is given up, where no timeout says otherwise."""
PAGE = 8
"""Chunks read at once: what bounds the memory of a reader."""

_T = TypeVar("_T")


class Patience:
    """Reads a store again and again, and for how long that goes on."""

    def __init__(
        self,
        timeout_s: float | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`say` hears, once each time, that the store is away and that it is back."""
        self._timeout_s, self._say, self._clock, self._sleep = timeout_s, say, clock, sleep
        self._until_s = None if timeout_s is None else clock() + timeout_s
        self._pause_s = LEAST_S

    def read(self, look: Callable[[], _T]) -> _T:
        """What `look` returns, as soon as the store answers. Raises TimeoutError if it does not in time, without a
        timeout StoreUnreachable once it was away for AWAY_S, and whatever else `look` raises."""
        away_since_s: float | None = None
        while True:
            try:
                seen = look()
            except StoreUnreachable as error:
                now_s = self._clock()
                if away_since_s is None:
                    away_since_s = now_s
                    self._say(f"{error}; trying again")
                if self._until_s is None and now_s >= away_since_s + AWAY_S:
                    raise
                if self._until_s is not None and now_s >= self._until_s:
                    raise self.timed_out(str(error)) from error
                self._sleep(MOST_S if self._until_s is None else min(MOST_S, self._until_s - now_s))
                continue
            if away_since_s is not None:
                self._say(f"the store is back after {in_words(self._clock() - away_since_s)}")
            return seen

    def pause(self, *, changed: bool) -> bool:
        """Sleeps, longer each time that nothing had changed. False, at once, if the time is up."""
        self._pause_s = LEAST_S if changed else min(self._pause_s * 1.5, MOST_S)
        left_s = self._pause_s if self._until_s is None else self._until_s - self._clock()
        if left_s <= 0:
            return False
        self._sleep(min(self._pause_s, left_s))
        return True

    def timed_out(self, how_it_is: str) -> TimeoutError:
        """What to raise then."""
        return TimeoutError(f"waited {in_words(self._timeout_s or 0)}: {how_it_is}")


def looks(store: JobStore, job_id: str, patience: Patience) -> Iterator[Job]:
    """The job at once, and again with pauses between until it has ended, that included.

    Raises JobNotFound, TimeoutError, and StoreError when the store is away for AWAY_S, or gone.
    """
    before: Job | None = None
    while True:
        job = patience.read(lambda: store.job(job_id))
        yield job
        if job.status.ended:
            return
        if not patience.pause(changed=job != before):
            raise patience.timed_out(f"{said_of(job)}; it goes on")
        before = job


def wait_for(
    store: JobStore, job_id: str, timeout_s: float | None = None, *, say: Callable[[str], None] = lambda text: None
) -> Job:
    """The job once it has ended; `say` is Patience's. Raises like `looks`."""
    for job in looks(store, job_id, Patience(timeout_s, say=say)):
        last = job
    return last


def chunks(store: JobStore, job: Job, start: int = 0) -> Iterator[Chunk]:
    """The chunks of results that a job has, from number `start` on, few in memory at once."""
    return _chunks(store, job, start, lambda look: look())


def follow(
    store: JobStore, job_id: str, patience: Patience, on_look: Callable[[Job], None] = lambda job: None
) -> Iterator[Chunk]:
    """The chunks of results as they are committed, until the job has ended; `on_look` hears of the job before each
    batch of them. Raises like `looks`."""
    start = 0
    for job in looks(store, job_id, patience):
        on_look(job)
        yield from _chunks(store, job, start, patience.read)
        start = job.chunks


def _chunks(
    store: JobStore, job: Job, start: int, read: Callable[[Callable[[], list[Chunk]]], list[Chunk]]
) -> Iterator[Chunk]:
    while start < job.chunks:
        page = read(partial(store.results, job.id, start, min(PAGE, job.chunks - start)))
        if not page:
            raise StoreLost(f"job {job.id} had {job.chunks:,} chunks of results, and chunk {start:,} is not there")
        yield from page
        start += len(page)
