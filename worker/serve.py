"""A worker without Celery: threads that ask the store again and again, for a store that is a file."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

from loramill.schemas.failures import ExitCode
from loramill.worker.housekeeping import Housekeeping
from loramill.worker.node import Node, open_node
from loramill.worker.worker_log import log
from loramill.worker.worker_settings import WorkerOptions

POLL_S = 0.5
LOOK_S = 0.1


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
    node = open_node(options)
    housekeeping = Housekeeping(node)
    count = options.concurrency * len(node.engines)
    threads = [threading.Thread(target=_poll, args=(node,), daemon=True) for _ in range(count)]
    node.start()
    housekeeping.start()
    for thread in threads:
        thread.start()
    while housekeeping.code is None and not asked.times:
        time.sleep(LOOK_S)
    if asked.times:
        log(f"worker {node.name}: finishing the rows that run; once more to stop at once")
    node.drain.ask()
    while any(thread.is_alive() for thread in threads) and not node.drain.over and asked.times < 2:
        time.sleep(LOOK_S)
    housekeeping.stop()
    node.close()
    return int(ExitCode.INTERRUPTED) if asked.times > 1 else housekeeping.code or 0


def _poll(node: Node) -> None:
    while not node.drain.asked:
        if not node.work():
            node.drain.wait(POLL_S)
