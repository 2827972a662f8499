"""Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held() -> Iterator[None]:
    """Signals that come within this block are raised at its end: imports of large libraries swallow one amid them."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


class Interrupts:
    """While this context manager is active, a signal raises KeyboardInterrupt; within `draining` the first one only
    sets `requested`. For the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._drains = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def draining(self) -> Iterator[None]:
        """Rows are in flight that are worth finishing, and somebody looks at `requested`."""
        self._drains = True
        try:
            yield
        finally:
            self._drains = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come: a library that was being imported may have swallowed it."""
        if self.requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._drains or self.requested:
            self.requested = True
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nfinishing the rows in flight; once more to stop at once\n")
