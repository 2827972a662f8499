"""How many requests a key may make: a bucket of tokens for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

MINUTE_S = 60.0


@dataclass(slots=True, frozen=True)
class Rate:
    """What came of one request."""

    limit: int
    """Requests a minute, and at once."""
    remaining: int
    reset_s: float
    """Until the bucket is full again."""
    retry_s: float = 0.0
    """0 if the request may pass, else when one may."""

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's names for it; with `retry-after` where the request may not pass."""
        said = {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-reset-requests": f"{math.ceil(1000 * self.reset_s)}ms",
        }
        return said | {"retry-after": str(math.ceil(self.retry_s))} if self.retry_s else said


class Rates:
    """Buckets by name, filled evenly over a minute. For one thread."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str, per_minute: int) -> Rate:
        """One request of `name`, which starts with a full bucket of `per_minute`."""
        now_s = self._clock()
        left, then_s = self._buckets.get(name, (float(per_minute), now_s))
        a_second = per_minute / MINUTE_S
        left = min(per_minute, left + (now_s - then_s) * a_second)
        retry_s = 0.0 if left >= 1 else (1 - left) / a_second
        left -= 1 if left >= 1 else 0
        self._buckets[name] = left, now_s
        return Rate(per_minute, int(left), (per_minute - left) / a_second, retry_s)
