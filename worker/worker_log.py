"""What a worker says: one line an event on standard error, with ids and never what is in a row."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []


def line_of(event: str) -> str:
    """One line, with the time, not ended."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(event.split())}"


def log(event: str) -> None:
    """Says it, with the time; or tells whoever listens."""
    if _listeners:
        return _listeners[-1](" ".join(event.split()))
    # One write, so that lines of several threads do not mix; __stderr__, since Celery may have replaced stderr.
    out = sys.__stderr__
    if out is not None:
        out.write(line_of(event) + "\n")
        out.flush()


@contextmanager
def heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Within this block events go there, and not to standard error."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


_SELDOM_S = 10.0
_said: dict[str, float] = {}


def log_seldom(event: str) -> None:
    """Says it unless it was just said: several threads meet the same trouble, again and again."""
    now = time.monotonic()
    if now - _said.get(event, -_SELDOM_S) >= _SELDOM_S:
        if len(_said) > 100:
            _said.clear()
        _said[event] = now
        log(event)
