"""The worker: engines on its devices, a store, and threads that take shards from the one to the others."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import Lane
from loramill.schemas.manifest import Manifest
from loramill.store.contract import JobStore
from loramill.store.errors import StoreError, StoreLost
from loramill.store.opening import open_store
from loramill.store.records import Claim, WorkerRecord
from loramill.worker.adapters_wanted import AdaptersWanted
from loramill.worker.devices import take_devices
from loramill.worker.drain import Drain
from loramill.worker.engine_process import EngineProcess
from loramill.worker.express import Express
from loramill.worker.leases import Leases
from loramill.worker.shard_run import ShardRun
from loramill.worker.worker_log import log, log_seldom
from loramill.worker.worker_settings import WorkerOptions
from loramill.worker.worker_stats import record_of

READY_LOOK_S = 0.1
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
"""After a shard that could not be read, or a claim that the store could not answer: a thread's pause, doubled while it
goes on so."""


class Node:
    """One worker. `work` is for the threads that take shards; `worker/express.py` takes questions, and
    `worker/housekeeping.py` does everything else."""

    def __init__(self, options: WorkerOptions, store: JobStore, engines: Sequence[EngineProcess]) -> None:
        self.options, self.store, self.engines = options, store, engines
        self.name = options.name
        self.drain = Drain()
        self.leases = Leases(store)
        self.failure: Failure | None = None
        """Why the worker cannot go on."""
        self.wanted = AdaptersWanted(store.shelf, engines)
        self.rows: Counter[EngineProcess] = Counter()
        """Rows that each engine did, as far as their shards have left it."""
        self.shards_done = 0
        self.tickets = 0
        """How often `work` was called."""
        self._load: Counter[EngineProcess] = Counter()
        self._lock = threading.Lock()
        self._express = Express(self)
        self._started_ms = round(time.time() * 1000)
        self._closing = threading.Lock()
        self._closed = threading.Event()

    def start(self) -> None:
        """Begins loading, keeping leases, and looking for questions."""
        for engine in self.engines:
            engine.start()
        threading.Thread(target=self.leases.keep, args=(self._closed,), daemon=True).start()
        self._express.start()

    @property
    def rows_done(self) -> int:
        """By all engines."""
        return self.rows.total()

    @property
    def idle(self) -> bool:
        """No thread has an engine in use."""
        return not self._load.total() and not self._express.running

    @property
    def ready(self) -> bool:
        """Whether a claim would find an engine."""
        return any(self.can(engine) for engine in self.engines)

    def work(self) -> bool:
        """Runs shards, one after another, until nothing suits or the worker drains. Returns whether there was any."""
        self.tickets += 1
        ran, pause_s = False, MIN_PAUSE_S
        while not self.drain.asked and self.failure is None:
            try:
                if not self._run_one():
                    break
                ran, pause_s = True, MIN_PAUSE_S
            except StoreLost as error:
                self.fail(Failure(ExitCode.MACHINE, str(error)))
            except StoreError as error:
                log_seldom(f"waiting for the store: {error}")
                self.drain.wait(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        return ran

    def _run_one(self) -> bool:
        """Claims the shard that suits best, and runs it. Returns False if there is none."""
        with self._engine() as engine:
            if engine is None:
                return False
            asked_s = time.monotonic()
            claim = self.claim(engine)
            if claim is None:
                return False
            self.run(engine, claim, asked_s)
            return True

    def claim(self, engine: EngineProcess, lane: Lane = Lane.BULK) -> Claim | None:
        """The shard that suits an engine best, if it is still there and there is one. Raises StoreError."""
        manifest = engine.manifest
        return None if manifest is None else self.store.claim(self.name, manifest.id, engine.resident, lane=lane)

    def run(self, engine: EngineProcess, claim: Claim, asked_s: float) -> None:
        """Runs a claimed shard to its end; `asked_s` is from before the claim. Raises StoreError as ShardRun.run."""
        run = ShardRun(self.store, self.name, engine, claim, asked_s, self.drain)
        try:
            run.run(self.leases)
        finally:
            with self._lock:
                self.rows[engine] += run.rows_done
                self.shards_done += 1

    @contextmanager
    def _engine(self) -> Iterator[EngineProcess | None]:
        """The engine with the fewest shards, once one is ready; None if the worker is to end before. Of several
        none gets more than its part: what the others are to have is not for the one that was ready first."""
        while not (self.drain.asked or self.failure):
            with self._lock:
                most = self.options.concurrency if len(self.engines) > 1 else math.inf
                able = [engine for engine in self.engines if self.can(engine) and self._load[engine] < most]
                if able:
                    chosen = min(able, key=lambda engine: self._load[engine])
                    self._load[chosen] += 1
                    break
            self.drain.wait(READY_LOOK_S)
        else:
            yield None
            return
        try:
            yield chosen
        finally:
            with self._lock:
                self._load[chosen] -= 1

    def can(self, engine: EngineProcess) -> bool:
        """Whether it takes shards that are claimed for it."""
        return engine.ready and engine.offered.settled

    def fail(self, failure: Failure) -> None:
        """The worker cannot go on. Said once."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        for line in failure.lines:
            log(f"Error: {line}")
        self.drain.ask(at_once=True)

    def publish(self) -> None:
        """Lets the store know what the engines serve, once each, and has shards claimed under that from then on.
        Raises StoreError."""

        def publish(manifest: Manifest, blobs: Mapping[str, bytes]) -> None:
            for digest, data in blobs.items():
                if not self.store.has_blob(digest):
                    self.store.put_blob(data)
            # Also if it was published before: the latest says what names mean.
            self.store.publish(manifest)
            log(f"worker {self.name}: {manifest.base} with {len(manifest.adapters)} adapters on {engine.name}, ready")

        for engine in self.engines:
            if engine.ready:
                engine.offered.settle(publish)

    def record(self) -> WorkerRecord:
        """The worker as others see it."""
        manifest = next((engine.manifest for engine in self.engines if engine.manifest), None)
        resident = {key: None for engine in self.engines for key in engine.resident}
        return WorkerRecord(
            id=self.name,
            manifest=manifest.id if manifest else "",
            base_id=manifest.base_id if manifest else "",
            device=",".join(engine.name for engine in self.engines),
            state="draining" if self.drain.asked else "ready" if self.ready else "loading",
            started_ms=self._started_ms,
            pid=os.getpid(),
            host=socket.gethostname(),
            resident=tuple(resident),
            rows_done=self.rows_done,
            restarts=sum(engine.restarts for engine in self.engines),
            stats=record_of(engine.counts for engine in self.engines),
            refused=self.wanted.refused,
            answered=self.wanted.answered,
        )

    def close(self) -> None:
        """Ends the engines and says goodbye. What is still leased runs out by itself. A second call waits for the
        first."""
        with self._closing:
            if self._closed.is_set():
                return
            self.drain.ask()
            self._closed.set()
            for engine in self.engines:
                engine.close()
            try:
                self.store.goodbye(self.name)
            except StoreError as error:
                log_seldom(f"worker {self.name} ends without a goodbye: {error}")
            self.store.close()


def open_node(options: WorkerOptions) -> Node:
    """A worker with its store open and its devices taken, not started. Raises Failure: MACHINE for a store or a device
    that cannot be had, USAGE for a URL or a device that is none."""
    try:
        store = open_store(options.store, files=options.files, prefix=options.store_prefix, lease_s=options.lease_s)
    except StoreError as error:
        raise Failure(ExitCode.MACHINE, str(error)) from error
    except ValueError as error:
        raise Failure(ExitCode.USAGE, str(error)) from error
    try:
        devices = take_devices(options.device)
    except Failure:
        store.close()
        raise
    return Node(options, store, [EngineProcess(options, device, options.hang_timeout_s) for device in devices])
