"""Tokens a second over the last hour, and how fast each job is: from jobs' own counters, looked at now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loramill.producer.api.context import Api
from loramill.producer.status import Pace, pace
from loramill.store.contract import JobStore
from loramill.store.errors import JobNotFound, StoreError
from loramill.store.records import Job

EVERY_S = 5.0
KEPT_S = 3600.0
PACE_S = 60.0
"""A running job's rate is taken over so long."""
_PAGE = 100

_log = logging.getLogger("loramill.api")


@dataclass(slots=True, frozen=True)
class Tokens:
    """What was read and written."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)


@dataclass(slots=True, frozen=True)
class Sample:
    """What came between two looks."""

    at_s: float
    """Of the later one, in seconds since 1970."""
    spent_s: float
    tokens: Tokens


class Throughput:
    """Follows the jobs of a store that have not ended, from when it is started. Any thread may read it."""

    def __init__(self, store: JobStore, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._samples = deque[tuple[float, float, Mapping[str, Tokens]]](maxlen=round(KEPT_S / EVERY_S))
        """(when, how long since the look before, tokens by owner)."""
        self._followed: dict[str, deque[tuple[float, Job]]] = {}
        """The open jobs: (when, as it was then) of the last PACE_S."""
        self._newest = _Newest()
        self._looked_s: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="throughput", daemon=True)

    def start(self) -> None:
        """Looks every EVERY_S from now on."""
        self._thread.start()

    def close(self) -> None:
        """Looks no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def samples(self, owner: str | None = None) -> list[Sample]:
        """The last hour's, the oldest first: of one owner's jobs, or of all."""
        with self._lock:
            kept = list(self._samples)
        return [
            Sample(at_s, spent_s, sum(by.values(), Tokens()) if owner is None else by.get(owner, Tokens()))
            for at_s, spent_s, by in kept
        ]

    def open_jobs(self, owner: str | None = None) -> list[Job]:
        """Those that had not ended at the last look: of one owner, or all."""
        with self._lock:
            jobs = [looks[-1][1] for looks in self._followed.values()]
        return [job for job in jobs if owner is None or job.spec.owner == owner]

    def pace(self, job: Job) -> Pace:
        """Of a job that was just read."""
        with self._lock:
            looks = self._followed.get(job.id)
            at_s, first = looks[0] if looks else (self._clock(), job)
        return pace(first, job, self._clock() - at_s)

    def look(self) -> None:
        """One look. Raises StoreError, and then what came since the last one counts for the next."""
        now_s = self._clock()
        before = {id: looks[-1][1] for id, looks in self._followed.items()}
        new, newest = self._new()
        after = [*self._again(before), *new]
        added: dict[str, Tokens] = {}
        for job in after:
            owner = job.spec.owner
            added[owner] = added.get(owner, Tokens()) + _since(before.get(job.id), job)
        with self._lock:
            if self._looked_s is not None and now_s > self._looked_s:
                self._samples.append((now_s, now_s - self._looked_s, added))
            self._looked_s, self._newest = now_s, newest
            self._followed = {job.id: self._looks(now_s, job) for job in after if not job.status.ended}

    def _run(self) -> None:
        away = False
        while not self._stop.is_set():
            try:
                self.look()
                away = False
            except StoreError as error:
                if not away:
                    _log.warning("the page's throughput is not counted: %s", error)
                away = True
            self._stop.wait(EVERY_S)

    def _new(self) -> tuple[list[Job], _Newest]:
        """Jobs that came since the last look, and which are the newest now; at first all that have not ended."""
        found, newest, after = list[Job](), self._newest, None
        while page := self._store.jobs(after=after, limit=_PAGE):
            if after is None:
                newest = _Newest.of(page)
            for job in page:
                if job.created_ms < self._newest.at_ms:
                    return found, newest
                missed = self._looked_s is None and job.status.ended
                if not missed and job.id not in self._followed and job.id not in self._newest.ids:
                    found.append(job)
            after = page[-1].id
        return found, newest

    def _again(self, before: Mapping[str, Job]) -> Iterator[Job]:
        for id in before:
            try:
                yield self._store.job(id)
            except JobNotFound:
                continue

    def _looks(self, now_s: float, job: Job) -> deque[tuple[float, Job]]:
        looks = self._followed.get(job.id) or deque()
        # One spec for all of them: that of a job with thousands of adapters is large.
        looks.append((now_s, replace(job, spec=looks[0][1].spec) if looks else job))
        while now_s - looks[0][0] > PACE_S:
            looks.popleft()
        return looks


def throughput_of(api: Api) -> Throughput:
    """The server's."""
    throughput: Throughput = api.shared.setdefault("throughput", Throughput(api.store))
    return throughput


@dataclass(slots=True, frozen=True)
class _Newest:
    """The jobs that came last: several may have come in the same millisecond."""

    at_ms: int = -1
    ids: frozenset[str] = frozenset()

    @classmethod
    def of(cls, page: Sequence[Job]) -> _Newest:
        at_ms = page[0].created_ms
        return cls(at_ms, frozenset(job.id for job in page if job.created_ms == at_ms))


def _since(before: Job | None, job: Job) -> Tokens:
    if before is None:
        return Tokens(job.prompt_tokens, job.completion_tokens)
    return Tokens(job.prompt_tokens - before.prompt_tokens, job.completion_tokens - before.completion_tokens)
