"""Which adapter sits in which device slot. Pure: no torch, no I/O."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Load:
    """Put `adapter` into `slot`; `evicted` sat there before."""

    adapter: str
    slot: int
    evicted: str | None


class Slots:
    """A hard limit of `capacity` adapters resident at once.

    An adapter with running rows is never evicted. Among the others the first to go are those that nobody waits for,
    least recently used first; one that rows still wait for stays, since a job sorted by adapter comes to it next.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"max_loras_per_batch must be at least 1, not {capacity}")
        self.capacity = capacity
        self._slot_of: dict[str, int] = {}  # least recently placed first
        self._running: dict[str, int] = {}
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def resident(self) -> frozenset[str]:
        """The adapters that hold a slot."""
        return frozenset(self._slot_of)

    def slot(self, adapter: str) -> int | None:
        """The adapter's slot, or None when it is not resident."""
        return self._slot_of.get(adapter)

    def place(self, adapter: str, wanted: Container[str]) -> Load | None:
        """Give a non-resident adapter a slot, or None when every slot is in use.

        `wanted`: adapters that rows wait for.
        """
        evicted = None
        if self._free:
            slot = self._free.pop()
        else:
            evicted = next((a for a in self._slot_of if not self._running.get(a) and a not in wanted), None)
            if evicted is None:
                return None
            slot = self._slot_of.pop(evicted)
        self._slot_of[adapter] = slot
        return Load(adapter, slot, evicted)

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
