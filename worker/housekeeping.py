"""What a worker does beside running shards: says that it is there, tidies up, sees to tickets, knows when to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import JobStatus
from loramill.store.errors import StoreError, StoreLost
from loramill.worker.node import Node
from loramill.worker.stopwatch import Stopwatch
from loramill.worker.worker_log import log, log_seldom
from loramill.worker.worker_settings import AGAIN

ROUND_S = 1.0
LOADING_ROUND_S = 0.2
"""Until an engine is ready: it should not wait for its first shard."""
HELLO_S = 5.0
REAP_S = 5.0
SUMMARY_S = 5.0


class Housekeeping:
    """A thread that goes round about once a second. `code` is the worker's exit code once it is to end."""

    def __init__(self, node: Node, top_up: Callable[[str, int], object] | None = None) -> None:
        """`top_up(base name, ready shards)` makes sure that there are tickets; None where there are none."""
        self.code: int | None = None
        self._node, self._top_up = node, top_up
        self._done_at_s: dict[str, float] = {}
        self._said: object = None
        """Of the last hello, what others should not have to wait for."""
        self._summed_up = 0
        self._starving = Stopwatch()
        self._tickets = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the round under way; it is not waited for if the store does not answer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(ROUND_S)

    def _keep(self) -> None:
        while not self._ended.is_set():
            try:
                self._round()
            except StoreLost as error:
                self._node.fail(Failure(ExitCode.MACHINE, str(error)))
            except StoreError as error:
                log_seldom(f"waiting for the store: {error}")
            if self._node.failure is not None:
                self.code = int(self._node.failure.code)
            self._ended.wait(ROUND_S if self._node.ready else LOADING_ROUND_S)

    def _round(self) -> None:
        node = self._node
        for engine in node.engines:
            if engine.failure is not None:
                return node.fail(engine.failure)
        node.publish()
        node.wanted.look()
        record = node.record()
        said = (record.state, record.manifest, record.answered, record.refused)
        if self._is_due("hello", HELLO_S) or said != self._said:
            node.store.hello(record)
            self._said = said
        if self._is_due("reap", REAP_S) and (reaped := node.store.reap()).leases:
            log(f"worker {node.name}: took back {reaped.leases} leases that had run out")
        if node.shards_done != self._summed_up and self._is_due("summary", SUMMARY_S):
            self._summed_up = node.shards_done
            done = f"{node.rows_done} rows done in {node.shards_done} shards"
            log(f"worker {node.name}: {done}, {len(node.leases)} shards running")
        if node.ready and not node.drain.asked:
            self._see_what_waits()

    def _see_what_waits(self) -> None:
        node = self._node
        served = {engine.manifest.base_id: engine.manifest.base for engine in node.engines if engine.manifest}
        ready = node.store.ready()
        waiting = {base_id: ready[base_id] for base_id in served if ready.get(base_id)}
        if self._top_up is not None:
            for base_id, count in waiting.items():
                self._top_up(served[base_id], count)
            starving = bool(waiting) and node.idle and node.tickets == self._tickets
            self._tickets = node.tickets
            if self._starving.look(time.monotonic(), starving) >= node.options.watchdog_s:
                log(f"worker {node.name}: shards wait and no ticket comes: ends, to be started again")
                self.code = AGAIN
        if node.options.until_empty and not waiting and node.idle and self._is_empty(set(served)):
            log(f"worker {node.name}: nothing is left to do")
            self.code = int(ExitCode.OK)

    def _is_empty(self, served: set[str]) -> bool:
        """Whether no job of these bases has rows left, be they another worker's."""
        under_way = {JobStatus.IN_PROGRESS, JobStatus.CANCELLING, JobStatus.FINALIZING}
        after = None
        while page := self._node.store.jobs(after=after):
            if any(job.status in under_way and job.spec.base_id in served for job in page):
                return False
            after = page[-1].id
        return True

    def _is_due(self, what: str, every_s: float) -> bool:
        now_s = time.monotonic()
        if now_s < self._done_at_s.get(what, -every_s) + every_s:
            return False
        self._done_at_s[what] = now_s
        return True
