"""Which adapters a tier holds while a plan is carried out, and the loads that this causes. Pure."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Policy = Literal["plan", "lru", "fifo"]
"""Whom a full tier gives up: plan, the one that is needed last of all (Belady 1966); lru, the one that was needed
longest ago; fifo, the one that came first."""

NEVER = 1 << 62


@dataclass(slots=True, frozen=True)
class Traffic:
    """Adapters moved."""

    loads: int
    """Into slots."""
    evictions: int
    """Out of slots, for others."""
    reads: int
    """From disk into host memory: loads of adapters that were not there."""


class Tier:
    """Room for `capacity` adapters; when it is full, `policy` says who goes. Pinned ones never do."""

    def __init__(self, capacity: int, policy: Policy, pinned: Collection[int] = ()) -> None:
        self.capacity = capacity
        self.policy = policy
        self.loads = self.evictions = 0
        self._pinned = frozenset(pinned)
        self._held: OrderedDict[int, int] = OrderedDict()
        """Adapter -> when it is needed next; under lru the one needed longest ago is first, else the oldest."""
        self._last: list[tuple[int, int]] = []
        """(minus the next need, adapter) as a heap; entries that `_held` no longer bears out are stale."""

    def __contains__(self, adapter: int) -> bool:
        return adapter in self._held

    def need(self, adapter: int, next_need: int, beside: Collection[int] = ()) -> bool:
        """Make `adapter` resident, evicting none of `beside`; whether it had to be loaded."""
        loaded = adapter not in self._held
        if loaded:
            if len(self._held) == self.capacity:
                self._evict(beside)
            self.loads += 1
        self._held[adapter] = next_need
        if self.policy == "lru":
            self._held.move_to_end(adapter)
        elif self.policy == "plan":
            heapq.heappush(self._last, (-next_need, adapter))
        return loaded

    def _evict(self, beside: Collection[int]) -> None:
        self.evictions += 1
        if self.policy != "plan":
            kept = (adapter for adapter in self._held if adapter not in beside and adapter not in self._pinned)
            del self._held[next(kept)]
            return
        passed: list[tuple[int, int]] = []
        while True:
            entry = heapq.heappop(self._last)
            need, adapter = -entry[0], entry[1]
            if self._held.get(adapter) != need:
                continue
            if adapter not in beside and adapter not in self._pinned:
                break
            passed.append(entry)
        del self._held[adapter]
        for entry in passed:
            heapq.heappush(self._last, entry)


def traffic(
    needs: Sequence[Collection[int]],
    *,
    slots: int,
    policy: Policy = "plan",
    host: int | None = None,
    pinned: Collection[int] = (),
) -> Traffic:
    """What moves when the sets of adapters in `needs` are needed one after another.

    slots: adapters on the device.  host: adapters that host memory holds, by the same policy; None is all of them.
    pinned: adapters that are loaded first and stay.

    Raises:
        ValueError: a set does not fit the slots beside the pinned ones.
    """
    asked = [[*pinned], *([*dict.fromkeys(need)] for need in needs)]
    for need in asked:
        if len({*need, *pinned}) > slots:
            raise ValueError(f"{len({*need, *pinned})} adapters at once do not fit {slots} slots")
    device = Tier(slots, policy, pinned)
    memory = Tier(NEVER if host is None else host, policy)
    for need, following in zip(asked, _next_needs(asked), strict=True):
        beside = frozenset(need)
        for adapter, next_need in zip(need, following, strict=True):
            if device.need(adapter, next_need, beside) or adapter in memory:
                memory.need(adapter, next_need)
    return Traffic(device.loads, device.evictions, memory.loads)


def _next_needs(asked: Sequence[Sequence[int]]) -> list[list[int]]:
    """For every adapter of every set the next set that needs it."""
    upcoming: dict[int, int] = {}
    found: list[list[int]] = []
    for place in range(len(asked) - 1, -1, -1):
        found.append([upcoming.get(adapter, NEVER) for adapter in asked[place]])
        upcoming |= dict.fromkeys(asked[place], place)
    return found[::-1]
