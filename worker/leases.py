"""The leases that a worker holds: renewed while the engine makes progress, by a thread that waits for no commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from loramill.store.contract import JobStore
from loramill.store.errors import StoreError
from loramill.store.records import Claim, Lease, Verdict

PULSE_S = 1.0
IDLE_S = 0.2
"""Between looks whether there is a lease at all: a short one must not run out before the first pulse."""
RENEWALS = 3
"""In a lease's time, so that it outlasts some that fail."""


class Held:
    """A lease as its worker knows it. Nothing may be committed after `until_s`, whatever the store would say: by then
    another worker may have begun."""

    def __init__(self, claim: Claim, asked_s: float, progress: Callable[[], int | None]) -> None:
        """`asked_s`: this machine's monotonic clock before the request that got the lease. `progress` grows while the
        engine steps; while it is None, the lease is renewed whatever the engine does."""
        self.progress = progress
        self.verdict = Verdict.HELD
        self._renewed_at = progress()
        self.take(claim.lease, asked_s)

    def take(self, lease: Lease, asked_s: float) -> None:
        """A lease on the shard, the first or another."""
        self.lease, self.asked_s, self.verdict = lease, asked_s, Verdict.HELD

    @property
    def until_s(self) -> float:
        """When it has surely not run out yet, by the monotonic clock."""
        return self.asked_s + self.lease.seconds

    def due(self, now_s: float) -> bool:
        """Whether it is to be renewed: its time has come, and the engine has stepped since the last time."""
        if now_s < self.asked_s + self.lease.seconds / RENEWALS:
            return False
        return (progress := self.progress()) is None or progress != self._renewed_at

    def runs_out(self, now_s: float) -> bool:
        """Whether it is in the last part of its time, where it should have been renewed at least once."""
        return now_s >= self.until_s - self.lease.seconds / RENEWALS

    def heard(self, lease: Lease, verdict: Verdict, asked_s: float, renewed: bool) -> None:
        """What the store said of `lease`, which may have been replaced since."""
        if lease is not self.lease:
            return
        self.verdict = verdict
        if renewed and verdict is not Verdict.FENCED:
            self.asked_s, self._renewed_at = asked_s, self.progress()


class Leases:
    """All of a worker's."""

    def __init__(self, store: JobStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._held: set[Held] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    @contextmanager
    def holding(self, held: Held) -> Iterator[Held]:
        """Looks after it within this block."""
        with self._lock:
            self._held.add(held)
        try:
            yield held
        finally:
            with self._lock:
                self._held.discard(held)

    def pulse(self) -> None:
        """Asks what became of each, and renews those that are due. Raises StoreError."""
        now_s = self._clock()
        with self._lock:
            held = list(self._held)
        due = [one for one in held if one.due(now_s)]
        self._ask(due, renew=True)
        self._ask([one for one in held if one not in due], renew=False)

    def keep(self, ended: threading.Event) -> None:
        """Pulses until `ended`; a store that cannot be reached is asked again."""
        while not ended.wait(self._period_s()):
            try:
                self.pulse()
            except StoreError:
                continue  # who commits says so; what runs out meanwhile is seen by the clock

    def _ask(self, held: Sequence[Held], *, renew: bool) -> None:
        if not held:
            return
        asked_s = self._clock()
        leases = [one.lease for one in held]
        for one, lease, verdict in zip(held, leases, self._store.pulse(leases, renew=renew), strict=True):
            one.heard(lease, verdict, asked_s, renew)

    def _period_s(self) -> float:
        with self._lock:
            return min([IDLE_S if not self._held else PULSE_S, *(one.lease.seconds / 6 for one in self._held)])
