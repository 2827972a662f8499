"""What takes batches from their creation to their end, in every server of a store: each batch by one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from loramill.producer.api import idempotency
from loramill.producer.api.batch_book import Batch, Book, Open
from loramill.producer.api.batch_steps import Lost, Steps
from loramill.producer.api.context import Api
from loramill.producer.api.errors import place_of
from loramill.producer.api.intake import NotYet
from loramill.store.errors import JobNotFound, StoreError
from loramill.store.shelf import RecordChanged, RecordNotFound

_SHARED = "minder"
_STRAY_S = 600.0
_log = logging.getLogger("loramill.api")


@dataclass(slots=True, frozen=True)
class Pace:
    """How often things are done, in seconds, and how many at a time."""

    look_s: float = 0.5
    lock_s: float = 60.0
    """After how long another server takes over what a dead one was at."""
    reap_s: float = 5.0
    again_s: float = 3.0
    """Until what could not be done is tried again."""
    workers: int = 4
    """Batches at a time; all but one of them may be validated, so that an ended one never waits for large inputs."""


@dataclass(slots=True)
class _Held:
    """The right to see to a batch; calling it raises Lost when that has gone."""

    validates: bool
    renewed: float = field(default_factory=time.monotonic)
    lost: bool = False

    def __call__(self) -> None:
        if self.lost:
            raise Lost


class Minder:
    """A server's. What a kill leaves undone is found by the next one, or by another server's."""

    def __init__(
        self, api: Api, on_end: Callable[[Batch], None] = lambda batch: None, pace: Pace | None = None
    ) -> None:
        """`on_end` hears of every batch that has ended, maybe twice, before it is forgotten: as Webhooks.owe."""
        self._api, self._pace = api, pace or Pace()
        self._book, self._steps = Book(api.shelf), Steps(api, on_end)
        self._busy: dict[str, _Held] = {}
        self._not_before: dict[str, float] = {}
        self._strays: dict[str, float] = {}
        """When each was first seen."""
        self._closing, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="minder", daemon=True)
        # One more, for tidying.
        self._pool = ThreadPoolExecutor(self._pace.workers + 1, thread_name_prefix="minder")
        self._tidying = threading.Lock()
        self._reap_at = 0.0

    def start(self) -> None:
        """Begins; `nudge` reaches it from now on."""
        self._api.shared[_SHARED] = self
        self._thread.start()

    def close(self) -> None:
        """Ends what it is at, so that another can go on with it."""
        self._closing.set()
        self.wake()
        self._thread.join()
        for held in list(self._busy.values()):
            held.lost = True
        self._pool.shutdown()

    def wake(self) -> None:
        """Has it look at once."""
        self._wake.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._renew()
                self._tidy_now_and_then()
                for one in list(self._book.open()):
                    self._look_at(one)
            except StoreError as error:
                _log.warning("batches wait: %s", error)
                self._closing.wait(self._pace.again_s)
            except Exception as error:
                _log.error("batches wait: %s", place_of(error))
                self._closing.wait(self._pace.again_s)
            self._wake.wait(self._pace.look_s)
            self._wake.clear()

    def _renew(self) -> None:
        """Keeps the locks of all that is being worked on, however long a step of it takes."""
        for id, held in list(self._busy.items()):
            now = time.monotonic()
            if now - held.renewed < self._pace.lock_s / 3:
                continue
            try:
                held.lost |= not self._lock(id)
                held.renewed = now
            except StoreError:
                held.lost |= now - held.renewed > self._pace.lock_s

    def _look_at(self, one: Open) -> None:
        now, busy = time.monotonic(), list(self._busy.values())
        if one.id in self._busy or len(busy) >= self._pace.workers or self._not_before.get(one.id, now) > now:
            return
        validates = one.job_id is None
        if validates and sum(held.validates for held in busy) >= self._pace.workers - 1:
            return
        if one.job_id is not None and not self._has_ended(one.job_id):
            return
        if not self._closing.is_set() and self._lock(one.id):
            self._not_before.pop(one.id, None)
            self._busy[one.id] = _Held(validates)
            self._pool.submit(self._see_to, one.id, self._busy[one.id])

    def _has_ended(self, job_id: str) -> bool:
        try:
            return self._api.store.job(job_id).status.ended
        except JobNotFound:
            return True

    def _see_to(self, id: str, held: _Held) -> None:
        """In a thread of its own, with the batch's lock."""
        try:
            if self._book.is_open(id):  # or another server has ended it since the look
                batch = self._book.get(id)
                self._strays.pop(id, None)
                self._steps.advance(batch, held)
                self.wake()
        except Lost:
            pass
        except RecordChanged:
            self.wake()  # it was cancelled just now, or another server has it
        except RecordNotFound:
            self._not_there(id)
        except NotYet as why:
            self._later(id)
            _log.info("batch %s waits: %s", id, why)
        except (StoreError, OSError) as error:
            self._later(id)
            _log.warning("batch %s waits: %s", id, error)
        except Exception as error:
            self._later(id)
            _log.error("batch %s waits: %s", id, place_of(error))
        finally:
            with suppress(StoreError):
                self._api.shelf.unlock(_lock_of(id), self._api.name)
            del self._busy[id]

    def _later(self, id: str) -> None:
        self._not_before[id] = time.monotonic() + self._pace.again_s

    def _not_there(self, id: str) -> None:
        """An open batch without a record: its creation is under way, or a server died over that."""
        now = time.monotonic()
        if now - self._strays.setdefault(id, now) > _STRAY_S:
            del self._strays[id]
            self._book.put_away(id)

    def _lock(self, id: str) -> bool:
        return self._api.shelf.lock(_lock_of(id), self._api.name, self._pace.lock_s)

    def _tidy_now_and_then(self) -> None:
        now = time.monotonic()
        if now >= self._reap_at and self._tidying.acquire(blocking=False):
            self._reap_at = now + self._pace.reap_s
            self._pool.submit(self._tidy)

    def _tidy(self) -> None:
        """What time does to jobs, which workers see to as well, where there are any; and to notes of creates."""
        try:
            self._api.store.reap()
            idempotency.tidy(self._api.shelf)
        except StoreError as error:
            _log.warning("tidying: %s", error)
        except Exception as error:
            _log.error("tidying: %s", place_of(error))
        finally:
            self._tidying.release()


def nudge(api: Api) -> None:
    """Has the server's minder look at once, if it has one."""
    minder = api.shared.get(_SHARED)
    if minder is not None:
        minder.wake()


def _lock_of(id: str) -> str:
    return f"batch:{id}"
