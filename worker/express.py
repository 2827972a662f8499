"""Questions: shards of one row for which somebody waits. They are claimed apart from others, and run beside them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import Lane
from loramill.store.errors import StoreError, StoreLost
from loramill.store.records import Claim
from loramill.worker.engine_process import EngineProcess
from loramill.worker.worker_log import log_seldom

if TYPE_CHECKING:
    from loramill.worker.node import Node

POLL_S = 0.05
PAUSE_S = 1.0
"""After a claim that the store could not answer."""
MOST = 32
"""Of one worker, at a time: what a batch can take in without the others waiting for it."""


class Express:
    """A thread that looks for questions, and one for each question that runs."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._running = Counter(dict.fromkeys(node.engines, 0))
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    @property
    def running(self) -> int:
        """Questions that are being answered."""
        return self._running.total()

    def _poll(self) -> None:
        node, pause_s = self._node, POLL_S
        while node.failure is None and not node.drain.wait(pause_s):
            pause_s = POLL_S
            try:
                while self.running < MOST and not node.drain.asked and self._start_one():
                    continue
            except StoreLost as error:
                node.fail(Failure(ExitCode.MACHINE, str(error)))
            except StoreError as error:
                log_seldom(f"waiting for the store: {error}")
                pause_s = PAUSE_S

    def _start_one(self) -> bool:
        """Claims a question and has it run. Returns whether there was one. Raises StoreError."""
        able = [engine for engine in self._node.engines if self._node.can(engine)]
        if not able:
            return False
        engine, asked_s = min(able, key=self._running.__getitem__), time.monotonic()
        claim = self._node.claim(engine, Lane.ASK)
        if claim is None:
            return False
        self._count(engine, 1)
        threading.Thread(target=self._run, args=(engine, claim, asked_s), daemon=True).start()
        return True

    def _run(self, engine: EngineProcess, claim: Claim, asked_s: float) -> None:
        try:
            self._node.run(engine, claim, asked_s)
        except StoreLost as error:
            self._node.fail(Failure(ExitCode.MACHINE, str(error)))
        except StoreError as error:
            log_seldom(f"waiting for the store: {error}")
        finally:
            self._count(engine, -1)

    def _count(self, engine: EngineProcess, change: int) -> None:
        with self._lock:
            self._running[engine] += change
