"""The engine child as its worker sees it: started, fed with shards, watched, and started again when it dies."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import IO, Any

from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import JobSpec
from loramill.schemas.manifest import Manifest
from loramill.schemas.said import SaidChoice
from loramill.store.packing import Chunk
from loramill.store.records import Claim
from loramill.worker.devices import Device
from loramill.worker.frames import Frame, Kind, read_frame, write_frame
from loramill.worker.handle import Delta, Died, Ended, Handle
from loramill.worker.offered import Answer, Offered
from loramill.worker.settings import ModelOptions
from loramill.worker.stopwatch import Stopwatch
from loramill.worker.worker_log import log
from loramill.worker.worker_stats import EngineCounts

CHILD = "LORAMILL_CHILD"
"""A command line in place of `python -m loramill.worker.child`."""
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
GOOD_S = 60.0
"""An engine that was ready for so long starts with the first backoff again."""
MAX_EARLY_DEATHS = 3
"""Deaths in a row before it was ready."""
LOOK_S = 1.0
STALLED_S = 10.0
"""An engine that was silent for so long gets no more shards until it steps."""


class EngineProcess:
    """One engine child on one device, for as long as the worker lives. A thread of its own starts it and reads what it
    says: the child dies with the thread that started it, and no other of this process lives long enough."""

    def __init__(self, options: ModelOptions, device: Device, hang_timeout_s: float) -> None:
        self.device = device
        self.name = device.name
        """Of `auto`, what the child says that it is once it is ready."""
        self.resident: tuple[str, ...] = ()
        """Keys of the adapters in its slots."""
        self.counts = EngineCounts()
        self.restarts = 0
        self.progress = 0
        """Grows while the engine steps, or has nothing to do."""
        self.failure: Failure | None = None
        """Why there will be no engine any more."""
        self._options, self._hang_timeout_s = options, hang_timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._ready_at_s: float | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._handles: dict[int, Handle] = {}
        self._jobs: Counter[str] = Counter()
        self._running: dict[int, set[int]] = {}
        self._alone = self._died_alone = False
        self.offered = Offered(self._lock, self.send, lambda: (handle.adapters for handle in self._handles.values()))
        self._last_key = 0
        self._steps = -1
        self._stalled = Stopwatch()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._supervise, self._watch)]

    def start(self) -> None:
        """Begins loading. Looks at `ready` and `failure` say what became of it."""
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> bool:
        """Whether it takes shards now: it is up, and it steps. One that hangs would take a shard for a lease's time,
        and then the next."""
        return self._ready_at_s is not None and not self.stalled

    @property
    def manifest(self) -> Manifest | None:
        """Under which shards are claimed for it, once that is `offered.settled`."""
        return self.offered.manifest

    @property
    def stalled(self) -> bool:
        """Whether it should step and has not for STALLED_S."""
        return self._stalled.seconds >= STALLED_S

    def run(self, spec: JobSpec, claim: Claim, blob: bytes) -> Handle:
        """Gives it a shard, `blob` as pack_shard made it. If it is down, the handle says so at once; if it has let go
        of an adapter since the claim, that no row will come."""
        job = spec.id
        with self._lock:
            self._last_key += 1
            handle = Handle(self.send, self._last_key, job, claim.adapters)
            if not self.ready or not self.offered.admits(claim.adapters):
                handle.put(Ended() if self.ready else Died())
                return handle
            self._handles[handle.key] = handle
            self._running[handle.key] = set()
            self._jobs[job] += 1
            if self._jobs[job] == 1:
                # Within the lock: no other thread's shard of that job may come before it.
                self.send(Kind.JOB, spec=spec.model_dump(mode="json"))
        alone = sorted(claim.suspects)
        self.send(Kind.SHARD, blob, key=handle.key, job=job, skip=claim.done.hex(), alone=alone)
        return handle

    def running(self, handle: Handle) -> tuple[int, ...]:
        """Positions of the shard's rows that run, as far as their results have not come."""
        with self._lock:
            return tuple(sorted(self._running.get(handle.key, ())))

    def tries_alone(self, handle: Handle) -> bool:
        """Whether one of the shard's rows is all that runs, for it is under suspicion."""
        return self._alone and bool(self.running(handle))

    def send(self, kind: Kind, blob: bytes = b"", **said: Any) -> None:
        """Writes a frame. If the child is gone its reader says so to whoever waits for it."""
        child = self._child
        if child is None or child.stdin is None:
            return
        try:
            with self._writing:
                write_frame(child.stdin, kind, blob, **said)
        except (OSError, ValueError):  # a closed pipe, or a closed file
            return

    def kill(self) -> None:
        """Ends the child at once; what follows is the same as when it dies by itself."""
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """Ends the child for good."""
        self._closing.set()
        self.kill()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(LOOK_S)

    # The thread that starts the child, reads it, and starts it again.

    def _supervise(self) -> None:
        backoff_s, early = FIRST_BACKOFF_S, 0
        while not self._closing.is_set() and self.failure is None:
            ready_s = self._live()
            if self._closing.is_set() or self.failure is not None:
                break
            self.restarts += 1
            early = 0 if ready_s is not None else early + 1
            if early == MAX_EARLY_DEATHS:
                why = f"the engine on {self.name} died {early} times in a row before it was ready: see above"
                self.failure = Failure(ExitCode.MACHINE, why)
                break
            # A death with one row alone in the engine is that row's: three of them, and more rows like it, may follow.
            if ready_s is not None and (ready_s >= GOOD_S or self._died_alone):
                backoff_s = FIRST_BACKOFF_S
            log(f"the engine on {self.name} starts again in {backoff_s:g} s")
            self._closing.wait(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _live(self) -> float | None:
        """One life of the child. Returns for how many seconds it was ready, None if it never was."""
        command = shlex.split(os.environ.get(CHILD, "")) or [sys.executable, "-m", "loramill.worker.child"]
        try:
            # In a group of its own: a terminal's Ctrl-C would end it before it has come to ignore it.
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0,
                env={**os.environ, **self.device.environment},
            )  # fmt: skip
        except OSError as error:
            self.failure = Failure(ExitCode.MACHINE, f"the engine cannot be started: {command[0]}: {error.strerror}")
            return None
        assert child.stdout is not None
        self._child = child
        if self._closing.is_set():
            child.kill()
        options = {field.name: getattr(self._options, field.name) for field in fields(ModelOptions)}
        self.send(Kind.SETTINGS, **options | {"device": self.device.option})
        try:
            self._read(child.stdout)
        except ValueError as error:
            log(f"the engine on {self.name} says what is {error}")
            child.kill()
        status = child.wait()
        child.stdout.close()
        ready_s = None if self._ready_at_s is None else time.monotonic() - self._ready_at_s
        if not self._closing.is_set() and self.failure is None:
            log(f"the engine on {self.name} died ({_ended(status)})" + _lost(self._running))
        self._bury()
        return ready_s

    def _read(self, inbound: IO[bytes]) -> None:
        blobs: dict[str, bytes] = {}
        while (frame := read_frame(inbound)) is not None:
            if frame.kind is Kind.BLOB:
                blobs[frame.fields["sha"]] = frame.blob
            elif frame.kind is Kind.MANIFEST:
                self.offered.announce(Manifest.model_validate(frame.fields["manifest"]), dict(blobs))
            elif frame.kind is Kind.FATAL:
                self.failure = Failure(ExitCode(frame.fields["code"]), *frame.fields["lines"])
            else:
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        said = frame.fields
        with self._lock:
            if frame.kind is Kind.READY:
                self.name = said["device"] if self.device.option == "auto" else self.name
                self.resident = tuple(said["resident"])
                self._steps, self._ready_at_s = -1, time.monotonic()
                self.progress += 1
            elif frame.kind is Kind.BEAT:
                if said["steps"] != self._steps or not said["busy"]:
                    self.progress += 1
                self._steps, self.resident, self.counts.stats = said["steps"], tuple(said["resident"]), said["stats"]
            elif frame.kind is Kind.ANSWER:
                self.offered.answer(said["name"], Answer(said["stamp"], said["refused"]))
            elif frame.kind is Kind.RUNNING:
                for key, position in said["started"]:
                    self._running.setdefault(key, set()).add(position)
                self._alone = said["alone"]
            elif frame.kind is Kind.ROWS and (handle := self._handles.get(said["key"])):
                chunk = Chunk.from_bytes(frame.blob)
                self.counts.count(said["tallies"])
                self._running[handle.key].difference_update(chunk.index["position"].tolist())
                handle.put(chunk)
            elif frame.kind is Kind.DELTA and (handle := self._handles.get(said["key"])):
                handle.put(Delta([SaidChoice.model_validate(choice) for choice in said["choices"]]))
            elif frame.kind is Kind.END and (handle := self._handles.pop(said["key"], None)):
                del self._running[handle.key]
                self._jobs[handle.job] -= 1
                if not self._jobs[handle.job]:
                    self.send(Kind.FORGET, job=handle.job)
                self.offered.drop()
                handle.put(Ended())

    def _bury(self) -> None:
        """Tells everybody what died with the child."""
        with self._lock:
            child, self._child, self._ready_at_s = self._child, None, None
            handles, self._handles = self._handles, {}
            # One that was ended on purpose has nobody to blame.
            running = {key: set[int]() for key in handles} if self._closing.is_set() else self._running
            self._running = {}
            self._jobs.clear()
            self.offered.died()
            self.counts.died()
            lone = self._died_alone = self._alone and sum(len(positions) for positions in running.values()) == 1
        for key, handle in handles.items():
            suspects = tuple(sorted(running[key]))
            handle.put(Died(suspects, suspects[0] if lone and suspects else None))
        if child is not None and child.stdin is not None:
            with suppress(OSError):  # what was not sent is nobody's any more
                child.stdin.close()

    # The thread that looks whether it still steps.

    def _watch(self) -> None:
        seen = 0
        while not self._closing.wait(LOOK_S):
            so = self._ready_at_s is not None and self.progress == seen
            seen = self.progress
            if self._stalled.look(time.monotonic(), so) >= self._hang_timeout_s:
                log(f"the engine on {self.name} has not stepped for {self._stalled.seconds:.0f} s and is killed")
                self._stalled.look(0, False)
                self.kill()


def _ended(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def _lost(running: Mapping[int, set[int]]) -> str:
    count = sum(len(positions) for positions in running.values())
    return f" with {count} row{'s' if count != 1 else ''} running" if count else ""
