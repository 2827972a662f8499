"""A worker without Celery: threads that ask the store again and again, for a store that is a file."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from loramill.schemas.failures import ExitCode
from loramill.worker.housekeeping import Housekeeping
from loramill.worker.lifeline import follow_lifeline
from loramill.worker.node import Node, open_node
from loramill.worker.worker_log import log
from loramill.worker.worker_settings import WorkerOptions

POLL_S = 0.5
LOOK_S = 0.1
CLOSE_S = 2.0
"""For threads to hear that their engines are gone."""


class Crew:
    """A node at work: its housekeeping, and as many threads as its engines take shards."""

    def __init__(self, node: Node) -> None:
        self._node, self._housekeeping = node, Housekeeping(node)
        count = node.options.concurrency * len(node.engines)
        self._threads = [threading.Thread(target=self._poll, daemon=True) for _ in range(count)]

    def start(self) -> None:
        """Begins loading, and taking shards."""
        self._node.start()
        self._housekeeping.start()
        for thread in self._threads:
            thread.start()

    @property
    def code(self) -> int | None:
        """The worker's exit code once it is to end by itself."""
        return self._housekeeping.code

    def drain(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """Takes nothing more, and waits for what runs as long as the drain lets it, or until `hurried`."""
        self._node.drain.ask()
        while self._works and not self._node.drain.over and not hurried():
            time.sleep(LOOK_S)

    def close(self) -> None:
        """Ends it all. What is not committed by now is given back."""
        self._node.drain.ask()
        self._housekeeping.stop()
        for engine in self._node.engines:
            engine.close()
        until_s = time.monotonic() + CLOSE_S
        while self._works and time.monotonic() < until_s:
            time.sleep(LOOK_S)
        self._node.close()

    @property
    def _works(self) -> bool:
        return any(thread.is_alive() for thread in self._threads) or not self._node.idle

    def _poll(self) -> None:
        while not self._node.drain.asked:
            if not self._node.work():
                self._node.drain.wait(POLL_S)


class _Asked:
    """Signals that came. The handlers set a plain number: they must not wait for a lock that this thread holds."""

    times = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.times += 1


def serve(options: WorkerOptions) -> int:
    """Runs the worker until it is told to end, and returns its exit code. A second signal ends it at once. For the main
    thread. Raises Failure like `open_node`."""
    asked = _Asked()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, asked)
    follow_lifeline()
    node = open_node(options)
    crew = Crew(node)
    crew.start()
    while crew.code is None and not asked.times:
        time.sleep(LOOK_S)
    if asked.times:
        log(f"worker {node.name}: finishing the rows that run; once more to stop at once")
    crew.drain(hurried=lambda: asked.times > 1)
    crew.close()
    return int(ExitCode.INTERRUPTED) if asked.times > 1 else crew.code or 0
