"""Which adapter sits in which device slot. Pure: no torch, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf

NextUse = Callable[[str], float]
"""How far off the next row is that asks for an adapter and has not come yet; infinity if none will."""


class Eviction(StrEnum):
    """Which adapter goes when another needs its place."""

    PLAN = "plan"
    """The one that is needed last, by what is known of the rows to come (Belady); of those, the least recently used."""
    LRU = "lru"
    """The least recently used."""
    FIFO = "fifo"
    """The one that came first."""


@dataclass(slots=True, frozen=True)
class Load:
    """Put `adapter` into `slot`; `evicted` sat there before."""

    adapter: str
    slot: int
    evicted: str | None


class Slots:
    """A hard limit of `capacity` adapters resident at once.

    An adapter with running rows is never evicted, nor one that is pinned, whose slot is kept for it from the start. By
    plan, one that rows wait for stays too: a job sorted by adapter comes to it next.
    """

    def __init__(
        self,
        capacity: int,
        eviction: Eviction = Eviction.PLAN,
        pinned: Iterable[str] = (),
        next_use: NextUse = lambda adapter: inf,
    ) -> None:
        """Raises ValueError for no slots, or more pinned adapters than slots."""
        if capacity < 1:
            raise ValueError(f"max_loras_per_batch must be at least 1, not {capacity}")
        self.capacity = capacity
        self.pinned = frozenset(pinned)
        if len(self.pinned) > capacity:
            raise ValueError(f"{len(self.pinned)} adapters are pinned, and there are {capacity} slots")
        self._eviction = eviction
        self._next_use = next_use
        self._slot_of: dict[str, int] = {}  # least recently used first
        self._came: dict[str, None] = {}  # first come first
        self._running: dict[str, int] = {}
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def resident(self) -> frozenset[str]:
        """The adapters that hold a slot."""
        return frozenset(self._slot_of)

    def slot(self, adapter: str) -> int | None:
        """The adapter's slot, or None when it is not resident."""
        return self._slot_of.get(adapter)

    def fits(self, adapters: Collection[str]) -> bool:
        """Whether these adapters can ever be resident together."""
        return len(self.pinned.union(adapters)) <= self.capacity

    def could_place(self, adapters: Sequence[str], wanted: Container[str] = ()) -> bool:
        """Whether `place` would make these adapters resident."""
        return self._leaving(adapters, wanted, self._short(adapters)) is not None

    def place(self, adapters: Sequence[str], wanted: Container[str] = ()) -> list[Load] | None:
        """Make these adapters resident together: what to load, or None when too many slots are in use.

        `wanted`: adapters that rows wait for.
        """
        missing = [a for a in adapters if a not in self._slot_of]
        leaving = self._leaving(adapters, wanted, self._short(adapters))
        if leaving is None:
            return None
        loads = []
        for adapter in missing:
            evicted = leaving.pop(0) if leaving else None
            slot = self._free.pop() if evicted is None else self._slot_of.pop(evicted)
            if evicted is not None:
                del self._came[evicted]
            self._slot_of[adapter] = slot
            self._came[adapter] = None
            loads.append(Load(adapter, slot, evicted))
        return loads

    def acquire(self, adapter: str) -> int:
        """One more running row of a resident adapter: its slot."""
        self._running[adapter] = self._running.get(adapter, 0) + 1
        slot = self._slot_of.pop(adapter)
        self._slot_of[adapter] = slot  # most recently used last
        return slot

    def release(self, adapter: str) -> None:
        """One running row of the adapter fewer."""
        left = self._running[adapter] - 1
        if left:
            self._running[adapter] = left
        else:
            del self._running[adapter]

    def drop(self, adapter: str) -> None:
        """An adapter without running rows gives its slot back; one that is not resident stays so."""
        if adapter in self._slot_of:
            self._free.append(self._slot_of.pop(adapter))
            del self._came[adapter]

    def _short(self, adapters: Sequence[str]) -> int:
        """How many slots these adapters take beyond those that are free."""
        missing = sum(adapter not in self._slot_of for adapter in adapters)
        return missing + len(self.pinned.difference(self._slot_of, adapters)) - len(self._free)

    def _leaving(self, needed: Container[str], wanted: Container[str], count: int) -> list[str] | None:
        """The `count` that make room, or None when fewer may be evicted."""
        if count <= 0:
            return []
        order = self._came if self._eviction is Eviction.FIFO else self._slot_of
        by_plan = self._eviction is Eviction.PLAN
        idle = [
            a
            for a in order
            if a not in self._running and a not in needed and a not in self.pinned and not (by_plan and a in wanted)
        ]
        if len(idle) < count:
            return None
        if by_plan:
            idle.sort(key=lambda a: -self._next_use(a))
        return idle[:count]
