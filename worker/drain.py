"""An orderly end: what runs may finish for a while, and then it is let go of."""

from __future__ import annotations

import threading
import time

FINISH_S = 7.5
"""For the rows that run."""
COMMIT_S = 1.0
"""And for what is finished to reach the store."""


class Drain:
    """Whether the worker is to end, and what there is still time for."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._at_s = 0.0

    def ask(self, *, at_once: bool = False) -> None:
        """From now on nothing is claimed; with `at_once` no row is waited for either. Asking again changes nothing."""
        if not self._asked.is_set():
            self._at_s = time.monotonic() - (FINISH_S if at_once else 0.0)
            self._asked.set()

    @property
    def asked(self) -> bool:
        """No further row starts."""
        return self._asked.is_set()

    @property
    def late(self) -> bool:
        """Rows that still run are dropped."""
        return self.asked and time.monotonic() >= self._at_s + FINISH_S

    @property
    def over(self) -> bool:
        """What has not been committed is left to others."""
        return self.asked and time.monotonic() >= self._at_s + FINISH_S + COMMIT_S

    def wait(self, seconds: float) -> bool:
        """Waits, but little once the end is asked for. Returns whether it is."""
        if self.asked:
            time.sleep(min(seconds, 0.1))
            return True
        return self._asked.wait(seconds)
