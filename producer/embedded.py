"""The worker of `loramill serve --embedded`: a child process, started again when it dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import IO

from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.lifeline import tied

COMMAND = (sys.executable, "-c", "from loramill.producer.cli import main; main()", "worker")
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
GOOD_S = 60.0
"""A worker that lived for so long starts with the first backoff again."""
DRAIN_S = 15.0
"""For a worker that was told to end; its own drain takes at most ten seconds."""
PREFIX = b"worker: "
_ERROR = re.compile(rb"(?:[\d-]{10} [\d:]{8} )?Error: (.*)")
_NO_USE = (ExitCode.USAGE, ExitCode.INPUT)
"""How a worker ends that would end so again."""


class EmbeddedWorker:
    """One `loramill worker`, which lives no longer than this process."""

    def __init__(self, settings: Mapping[str, str], failed: Callable[[Failure], None]) -> None:
        """`settings`: as variables. `failed` is called if there will be no worker any more, from another thread."""
        self._environment = {**os.environ, **settings}
        self._failed = failed
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._supervise, daemon=True)

    def start(self) -> None:
        """Begins loading."""
        self._thread.start()

    def close(self) -> None:
        """Has it finish what it does, for some seconds."""
        self._closing.set()
        with self._lock:
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM)
        self._thread.join(DRAIN_S)
        with self._lock:
            if self._process is not None:
                self._process.kill()
        self._thread.join()

    def _supervise(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._closing.is_set():
            began_s = time.monotonic()
            code, errors = self._run_once()
            if self._closing.is_set():
                return
            if code in _NO_USE:
                return self._failed(Failure(ExitCode(code), *errors))
            if time.monotonic() - began_s >= GOOD_S:
                backoff_s = FIRST_BACKOFF_S
            _say(b"ended with code %d; it is started again in %d s\n" % (code, backoff_s))
            self._closing.wait(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _run_once(self) -> tuple[int, list[str]]:
        """Its exit code, and the last errors that it said."""
        errors: deque[str] = deque(maxlen=20)
        with tied(COMMAND, self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            # A thread of its own: whoever has the worker's output for his own may hold it open for longer.
            reader = threading.Thread(target=_pass_on, args=(process.stdout, errors), daemon=True)
            reader.start()
            with self._lock:
                self._process = process
                if self._closing.is_set():
                    process.terminate()
            code = process.wait()
            with self._lock:
                self._process = None
            reader.join(1)
        return code, list(errors)


def _pass_on(said: IO[bytes], errors: deque[str]) -> None:
    with said:
        for line in said:
            if found := _ERROR.match(line):
                errors.append(found[1].decode(errors="replace"))
            _say(line)


def _say(line: bytes) -> None:
    """One write, so that lines of several threads do not mix."""
    os.write(2, PREFIX + line)
