"""One leased shard on its way through an engine into the store, whatever happens meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from loramill.schemas.errors import LineError
from loramill.schemas.request import parse_line
from loramill.schemas.response import error_line
from loramill.schemas.said import Said
from loramill.store.contract import JobStore
from loramill.store.errors import Fenced, JobNotFound, StoreError, StoreFull, StoreRefused, StoreUnreachable
from loramill.store.packing import Chunk, unpack_shard
from loramill.store.records import Claim, Committed, DoneRow, Lease, Verdict
from loramill.worker.drain import Drain
from loramill.worker.engine_process import EngineProcess
from loramill.worker.handle import Delta, Died, Ended, Handle
from loramill.worker.leases import Held, Leases
from loramill.worker.worker_log import log, log_seldom

LOOK_S = 0.2
"""How soon a cancel, a lost lease or a drain is heeded."""
MAX_LONE_DEATHS = 3
ENGINE_CRASH = "engine_crash"
DISK_FULL_S = 60.0
"""After that a shard goes to a worker whose disk may have room."""
TRANSIENT = (StoreUnreachable, StoreFull, StoreRefused)
"""What may pass. A store that answered once and now refuses is failing over, or is being repaired."""

_Value = TypeVar("_Value")


class Lost(Exception):
    """Another worker has the shard, or nobody needs it any more: what was done for it is dropped."""


class GivenUp(Exception):
    """The shard is given back with what is committed."""

    def __init__(self, why: str, suspects: Collection[int] = ()) -> None:
        super().__init__(why)
        self.suspects = suspects


class ShardRun:
    """Runs one claim: `run`, once."""

    def __init__(
        self, store: JobStore, worker: str, engine: EngineProcess, claim: Claim, asked_s: float, drain: Drain
    ) -> None:
        """`asked_s`: the monotonic clock before the claim was asked for."""
        self.rows_done = 0
        self._store, self._worker, self._engine, self._claim, self._drain = store, worker, engine, claim, drain
        self._handle: Handle | None = None
        self._stopping: bool | None = None
        self._name = f"{claim.lease.job}/{claim.lease.shard}"
        self._held = Held(claim, asked_s, self._progress)

    def run(self, leases: Leases) -> None:
        """To its end: done, given back, or lost. Raises StoreLost, or StoreError if its rows cannot be read."""
        with leases.holding(self._held):
            try:
                blob = self._insist(lambda lease: self._store.read_shard_blob(lease.job, lease.shard))
                spec = self._insist(lambda lease: self._store.job(lease.job)).spec
                handle = self._handle = self._engine.run(spec, self._claim, blob)
                try:
                    self._follow(handle, blob)
                finally:
                    handle.stop(now=True)
            except (Lost, JobNotFound):
                log(f"shard {self._name}: lost to another worker, or needed no more; its other rows are dropped")
            except GivenUp as why:
                log(f"shard {self._name}: given back: {why}")
                self._release(why.suspects)
            except StoreError as error:
                log(f"shard {self._name}: given back: {error}")
                self._release()
                raise

    def _follow(self, handle: Handle, blob: bytes) -> None:
        """Takes what the engine says of the shard, and heeds what the store and the operator say."""
        while True:
            match handle.take(LOOK_S):
                case Chunk() as chunk:
                    if self._commit(chunk).shard_done:
                        return
                case Delta() as delta:
                    self._say(delta)
                case Ended():
                    return self._release()
                case Died() as died:
                    return self._blame(died, blob)
            self._heed(handle)

    def _say(self, delta: Delta) -> None:
        """Lets whoever listens know. What is not said now is in the result."""
        said = Said(token=self._held.lease.token, choices=list(delta.choices))
        try:
            self._store.shelf.say(self._claim.lease.job, said.model_dump_json().encode())
        except StoreError as error:
            log_seldom(f"waiting for the store: {error}")

    def _heed(self, handle: Handle) -> None:
        if self._held.verdict is Verdict.FENCED:
            self._insist(lambda lease: None)
        if self._drain.over:
            raise GivenUp("the worker ends")
        # Nothing renews the lease of an engine that hangs. What ran in it must be known before the lease is another's,
        # or a row that makes engines hang would go from worker to worker, unsuspected, for ever.
        if self._engine.stalled and not self._engine.tries_alone(handle) and self._held.runs_out(time.monotonic()):
            raise GivenUp("the engine does not step", self._engine.running(handle))
        if self._held.verdict is Verdict.OVER or self._drain.late:
            self._stop(handle, now=True)
        elif self._drain.asked:
            self._stop(handle, now=False)

    def _stop(self, handle: Handle, *, now: bool) -> None:
        if self._stopping is None or now > self._stopping:
            self._stopping = now
            handle.stop(now=now)

    def _blame(self, died: Died, blob: bytes) -> None:
        """A row that was alone when the engine died is charged; the others that ran are suspects."""
        suspects = set(died.suspects)
        if (alone := died.alone) is not None:
            deaths = self._insist(lambda lease: self._store.strike(lease, alone))
            log(f"shard {self._name}: the engine died {deaths} times while the row at {alone} was alone in it")
            if deaths >= MAX_LONE_DEATHS:
                suspects.discard(alone)
                if self._commit(_crashed(self._claim.lease.job, blob, alone, deaths)).shard_done:
                    return
        self._release(suspects)

    def _commit(self, chunk: Chunk) -> Committed:
        committed = self._insist(lambda lease: self._store.commit(lease, chunk))
        self.rows_done += committed.new
        return committed

    def _release(self, suspects: Collection[int] = ()) -> None:
        """Gives the shard back. If that cannot be said in time, the lease runs out by itself."""
        for wait_s in _backoff():
            try:
                return self._store.release(self._held.lease, suspects=suspects)
            except TRANSIENT as error:
                if self._drain.over or time.monotonic() + wait_s >= self._held.until_s:
                    return log(f"shard {self._name}: not given back, its lease runs out: {error}")
            self._drain.wait(wait_s)

    def _insist(self, operation: Callable[[Lease], _Value]) -> _Value:
        """Does it under a lease that holds, and again while the store cannot. Raises Lost, GivenUp, StoreError."""
        began_s = time.monotonic()
        fenced = False
        for wait_s in _backoff():
            try:
                if fenced or self._held.verdict is Verdict.FENCED or time.monotonic() >= self._held.until_s:
                    self._reattach()
                    fenced = False
                return operation(self._held.lease)
            except Fenced:
                fenced = True
                continue  # at once: the shard may be had again
            except TRANSIENT as error:
                log_seldom(f"waiting for the store: {error}")
                no_disk = isinstance(error, StoreFull) and self._store.files is not None
                if no_disk and time.monotonic() >= began_s + DISK_FULL_S:
                    raise  # the thread pauses, or it would have the shard again before anybody else
            if self._drain.over:
                raise GivenUp("the worker ends")
            self._drain.wait(wait_s)
        raise AssertionError("the waits never end")

    def _reattach(self) -> None:
        """The lease ran out by our clock, or the store restarted: unless it holds after all, the shard is leased anew,
        if nobody else has it by now."""
        held, asked_s = self._held, time.monotonic()
        [verdict] = self._store.pulse([held.lease], renew=True)
        if verdict is not Verdict.FENCED:
            return held.heard(held.lease, verdict, asked_s, renewed=True)
        asked_s = time.monotonic()
        claim = self._store.reclaim(self._worker, held.lease)
        if claim is None:
            raise Lost
        log(f"shard {self._name}: its lease had run out, and nobody else had it: going on")
        held.take(claim.lease, asked_s)

    def _progress(self) -> int | None:
        handle, engine = self._handle, self._engine
        # A row that is tried alone is waited for until the engine is given up: only who holds the lease can charge it.
        renews_anyway = handle is not None and (handle.ended or engine.tries_alone(handle))
        return None if renews_anyway else engine.progress


def _backoff() -> Iterator[float]:
    wait_s = 0.1
    while True:
        yield wait_s
        wait_s = min(2 * wait_s, 5.0)


def _crashed(job: str, blob: bytes, position: int, deaths: int) -> Chunk:
    """The result of a row that the engine does not survive."""
    number, line = unpack_shard(blob)[position]
    try:
        custom_id: str | None = parse_line(line).custom_id
    except LineError as error:
        custom_id = error.custom_id
    why = f"the engine died {deaths} times while it ran this row and nothing else"
    failed = error_line(job, number, custom_id, why, code=ENGINE_CRASH, status=500)
    return Chunk.of([DoneRow(number, True, failed)], [position])
