"""Where each sequence's keys and values lie. Pure: no torch, no I/O.

The cache is a row of equal slabs. A slab in use belongs to one capacity class and holds as many rows of that capacity
as fit, kept dense: rows 0..n-1 are taken, so that attention reads one strided view per slab and copies nothing. A
paged cache would gather every row's pages at every step, which on a CPU costs more than the attention itself.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple


class Room(NamedTuple):
    """A row's stretch of the cache: `capacity` tokens from token offset `offset`."""

    offset: int
    capacity: int


class Move(NamedTuple):
    """Move the first `length` tokens of a row to another, leaving zeros; no source is zeros."""

    source: Room | None
    target: Room
    length: int


@dataclass(slots=True, eq=False)
class Place:
    """A sequence's room in the cache: row `row` of slab `slab`; `length` of its `capacity` tokens are filled."""

    slab: int
    row: int
    capacity: int
    length: int = 0


@dataclass(slots=True)
class _Slab:
    capacity: int = 0
    rows: list[Place] = field(default_factory=list)


class Slabs:
    """`count` slabs of `tokens` tokens each.

    `moves` collects the copies that keep slabs dense and rows growing; carry them out in order before the next write.
    """

    def __init__(self, count: int, tokens: int) -> None:
        self.tokens = tokens
        self.reserved = 0
        """Tokens of the places that are taken."""
        self.moves: list[Move] = []
        self._slabs = [_Slab() for _ in range(count)]
        self._free = list(range(count - 1, -1, -1))
        self._open: dict[int, list[int]] = {}  # capacity -> slabs of that class with room
        self._classes = size_classes(tokens)

    def __len__(self) -> int:
        return len(self._slabs)

    def allocate(self, tokens: int) -> Place | None:
        """Room for at least `tokens` tokens, or None when the cache is full."""
        capacity = self.capacity_for(tokens)
        with_room = self._open.setdefault(capacity, [])
        if not with_room:
            if not self._free:
                return None
            with_room.append(self._free.pop())
            self._slabs[with_room[-1]].capacity = capacity
        index = with_room[-1]
        slab = self._slabs[index]
        place = Place(index, len(slab.rows), capacity)
        slab.rows.append(place)
        self.reserved += capacity
        if len(slab.rows) == self.tokens // capacity:
            with_room.pop()
        return place

    def free(self, place: Place, *, wipe: bool = False) -> None:
        """Give the room back; the slab's last row moves into the hole.

        `wipe` what may be NaN: whoever has the room next would meet it under its mask.
        """
        slab = self._slabs[place.slab]
        self.reserved -= slab.capacity
        if wipe:
            self.moves.append(Move(None, self.room(place), place.length))
        was_full = len(slab.rows) == self.tokens // slab.capacity
        last = slab.rows.pop()
        if last is not place:
            self.moves.append(Move(self.room(last), self.room(place), last.length))
            slab.rows[place.row] = last
            last.row = place.row
        if was_full:
            self._open[slab.capacity].append(place.slab)
        if not slab.rows:
            self._open[slab.capacity].remove(place.slab)
            self._free.append(place.slab)

    def grow(self, place: Place, tokens: int) -> bool:
        """Move the row to a class of at least `tokens` tokens, in place; False when there is no room."""
        bigger = self.allocate(tokens)
        if bigger is None:
            return False
        self.moves.append(Move(self.room(place), self.room(bigger), place.length))
        old = Place(place.slab, place.row, place.capacity, place.length)
        self._slabs[old.slab].rows[old.row] = old
        self._slabs[bigger.slab].rows[bigger.row] = place
        place.slab, place.row, place.capacity = bigger.slab, bigger.row, bigger.capacity
        self.free(old)
        return True

    def rows(self, slab: int) -> list[Place]:
        """The rows of a slab in order."""
        return self._slabs[slab].rows

    def room(self, place: Place) -> Room:
        """Where in the whole cache the row lies."""
        return Room(place.slab * self.tokens + place.row * place.capacity, place.capacity)

    def capacity_for(self, tokens: int) -> int:
        """The smallest capacity class that holds `tokens` tokens.

        Raises:
            ValueError: more than a slab holds.
        """
        if tokens > self.tokens:
            raise ValueError(f"a row of {tokens} tokens does not fit a slab of {self.tokens}")
        return self._classes[bisect_left(self._classes, tokens)]


def size_classes(largest: int) -> list[int]:
    """The capacities that rows come in: 32, 40, 48, 56, 64, 80, ...: at most a fifth of a row's room is waste."""
    sizes = []
    size = 32
    while size < largest:
        sizes += [size * quarters // 4 for quarters in range(4, 8)]
        size *= 2
    return [s for s in sizes if s < largest] + [largest]
