"""`loramill worker`: with SQLite in this process; with Redis Celery as a process of its own, started again when its
watchdog has ended it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType

from loramill.schemas.failures import ExitCode
from loramill.worker.lifeline import tied
from loramill.worker.worker_settings import AGAIN, WorkerOptions

LOOK_S = 0.1


def run_worker(options: WorkerOptions, given: Mapping[str, str]) -> ExitCode:
    """Runs a worker to its end, and returns its exit code; `given` are the variables that say what the flags said.

    Raises Failure for settings that cannot be used.
    """
    if options.store.startswith("sqlite:"):
        from loramill.worker.serve import serve

        return ExitCode(serve(options))
    return _Celery(options, given).run()


class _Celery:
    """The process, and the signals that this one passes on to it."""

    def __init__(self, options: WorkerOptions, given: Mapping[str, str]) -> None:
        from loramill.worker.devices import count_devices
        from loramill.worker.tickets import broker_of

        broker_of(options.store, options.broker)  # a Failure is better raised here
        threads = str(options.concurrency * count_devices(options.device))
        self._command = [sys.executable, "-m", "celery", "-A", "loramill.worker.app", "worker", "-P", "threads"]
        self._command += ["-c", threads, "--without-gossip", "--without-mingle", "-n", f"{options.name}@%h"]
        self._environment = {**os.environ, **given}
        self._signals = 0
        self._told = 0

    def run(self) -> ExitCode:
        """Until it ends by itself, or because it was told to."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._count)
        while True:
            code = self._run_once()
            if self._signals > 1:
                return ExitCode.INTERRUPTED
            if self._signals and code in (AGAIN, -signal.SIGTERM):  # it was ending anyway, or had hardly begun
                return ExitCode.OK
            if code != AGAIN:
                return ExitCode(code) if code in set(ExitCode) else ExitCode.MACHINE

    def _run_once(self) -> int:
        # What Celery prints is no data: standard error.
        with tied(self._command, self._environment, stdout=sys.stderr.fileno()) as process:
            while (code := process.poll()) is None:
                self._pass_on(process)
                time.sleep(LOOK_S)
        return code

    def _pass_on(self, process: subprocess.Popen[bytes]) -> None:
        if self._signals > self._told:
            self._told = self._signals
            process.send_signal(signal.SIGTERM if self._told == 1 else signal.SIGKILL)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
