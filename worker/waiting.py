"""The sequences that wait to start. Pure: no torch, no I/O."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from loramill.worker.request import Mix
from loramill.worker.sequence import Sequence


class Kind(NamedTuple):
    """What decides whether a sequence can start now: all of a kind can, or none."""

    urgent: bool
    mix: Mix
    merged: bool

    @property
    def weights(self) -> Mix:
        """The mix that must be merged into the base's weights."""
        return self.mix if self.merged else ()

    @property
    def adapters(self) -> list[str]:
        """Those that need slots."""
        return [] if self.merged else [adapter for adapter, _ in self.mix]


def kind_of(sequence: Sequence) -> Kind:
    """The kind of a sequence."""
    request = sequence.request
    return Kind(request.urgent, request.mix, request.merged)


class Waiting:
    """Sequences in order, urgent ones first, grouped by kind: however many there are, a pass looks at one of each."""

    def __init__(self) -> None:
        self.favoured: Sequence | None = None
        """Comes before all others once it is the first of its kind."""
        self.adapters: Counter[str] = Counter()
        """What they need in slots: how many kinds ask for each."""
        self._groups: dict[Kind, OrderedDict[Sequence, int]] = {}
        self._of_row: dict[int, list[Sequence]] = {}
        self._count = 0
        self._behind, self._before = count(), count(-1, -1)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in order."""
        every = [(self._rank(one, number), one) for group in self._groups.values() for one, number in group.items()]
        return iter([one for _, one in sorted(every, key=lambda ranked: ranked[0])])

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Behind the others, or before those that are as urgent."""
        kind = kind_of(sequence)
        group = self._groups.get(kind)
        if group is None:
            group = self._groups[kind] = OrderedDict()
            self.adapters.update(kind.adapters)
        group[sequence] = next(self._before if first else self._behind)
        if first:
            group.move_to_end(sequence, last=False)
        self._of_row.setdefault(sequence.request.key, []).append(sequence)
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        """It waits no longer."""
        kind = kind_of(sequence)
        group = self._groups[kind]
        del group[sequence]
        of_row = self._of_row[sequence.request.key]
        of_row.remove(sequence)
        if not of_row:
            del self._of_row[sequence.request.key]
        self._count -= 1
        if not group:
            del self._groups[kind]
            self.adapters.subtract(kind.adapters)
            for adapter in kind.adapters:
                if not self.adapters[adapter]:
                    del self.adapters[adapter]

    def of_row(self, key: int) -> list[Sequence]:
        """The sequences of one row."""
        return list(self._of_row.get(key, ()))

    def head(self, kind: Kind) -> tuple[tuple[int, int], Sequence] | None:
        """The first of a kind, with its place in the order."""
        group = self._groups.get(kind)
        if group is None:
            return None
        first = next(iter(group))
        return self._rank(first, group[first]), first

    def heads(self) -> list[tuple[tuple[int, int], Sequence]]:
        """The first of every kind, with their places in the order."""
        found = map(self.head, self._groups)
        return [head for head in found if head is not None]

    @property
    def first(self) -> Sequence | None:
        """The first of all."""
        return min(self.heads(), default=(None, None), key=lambda head: head[0])[1]

    @property
    def first_common(self) -> Sequence | None:
        """The first of those that are not urgent."""
        heads = [head for head in self.heads() if not head[1].request.urgent]
        return min(heads, default=(None, None), key=lambda head: head[0])[1]

    @property
    def urgent(self) -> list[Sequence]:
        """Those that are urgent, in order, unless one that is not comes before them."""
        if self.favoured is not None and self.first is self.favoured:
            return []
        every = [item for kind, group in self._groups.items() if kind.urgent for item in group.items()]
        return [sequence for sequence, _ in sorted(every, key=lambda item: item[1])]

    def any_with(self, weights: Mix) -> bool:
        """Whether one needs this merged into the base's weights."""
        return any(kind.weights == weights for kind in self._groups)

    @property
    def wanted(self) -> dict[str, None]:
        """The adapters that they need in slots, in the order of the sequences that are the first to."""
        heads = sorted(self.heads(), key=lambda head: head[0])
        return {adapter: None for _, one in heads for adapter in kind_of(one).adapters}

    def _rank(self, sequence: Sequence, number: int) -> tuple[int, int]:
        return (0 if sequence is self.favoured else 1 if sequence.request.urgent else 2), number
