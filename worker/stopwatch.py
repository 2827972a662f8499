"""How long something has been so, for a process that may be stopped itself."""

from __future__ import annotations

MAX_LOOK_S = 5.0


class Stopwatch:
    """Looks come about every second. What passed between two of them counts up to MAX_LOOK_S, so that the time in which
    this process was stopped is not taken for the other's silence."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last_s: float | None = None

    def look(self, now_s: float, so: bool) -> float:
        """For how many seconds it has been so at every look."""
        if not so:
            self.seconds, self._last_s = 0.0, None
        else:
            if self._last_s is not None:
                self.seconds += min(now_s - self._last_s, MAX_LOOK_S)
            self._last_s = now_s
        return self.seconds
