"""Rows that belong together, since they ask for the same adapters or for overlapping sets of them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_BLOCK = 4096
"""Sets of adapters that are put in order against each other: every choice looks at all that are left."""


@dataclass(slots=True)
class Unit:
    """The rows of one set of adapters, or of several sets that share members and fit the slots together."""

    number: int
    """Breaks ties."""
    members: frozenset[int]
    """Adapters that need a slot."""
    rank_class: int
    """Bits of the largest rank less one: ranks of a class are within twice of each other."""
    work: int
    """Tokens."""
    rows: Ints
    """Positions; those of one set together, in turn."""

    def take(self, count: int) -> Ints:
        """Take away the first rows, at most `count`."""
        taken, self.rows = self.rows[: max(0, count)], self.rows[max(0, count) :]
        return taken


def units(
    rows: Ints,
    mix: NDArray[np.int32],
    cost: Ints,
    turn: Ints,
    facts: Sequence[tuple[frozenset[int], int]],
    slots: int,
) -> tuple[list[Unit], Unit, list[list[Unit]]]:
    """(units that need slots, the rows that need none as one unit, chains of units).

    turn: (all rows,) the order of rows of one set.  facts: of each mix the adapters that need a slot, and its rank.
    No adapter is in two units, except in those of a chain: sets that overlap and do not fit the slots together, cut so
    that neighbours share as much as they can.

    Raises:
        ValueError: a mix of `rows` needs more than `slots` adapters at once.
    """
    sets, rank_of, set_of_mix = _sets(np.unique(mix[rows]), facts, slots)
    by_set = _group(rows, set_of_mix[mix[rows]], turn[rows], len(sets))
    spare = Unit(-1, frozenset(), 0, 0, by_set[0])

    def unit(numbers: list[int]) -> Unit:
        joined = by_set[numbers[0]] if len(numbers) == 1 else np.concatenate([by_set[number] for number in numbers])
        members = frozenset[int]().union(*(sets[number] for number in numbers))
        rank_class = (max(rank_of[number] for number in numbers) - 1).bit_length()
        return Unit(min(numbers), members, rank_class, int(cost[joined].sum()), joined)

    needs: list[Unit] = []
    chains: list[list[Unit]] = []
    for cluster in _clusters(sets):
        members = len(sets[cluster[0]]) if len(cluster) == 1 else len(set[int]().union(*(sets[n] for n in cluster)))
        if members <= slots:
            needs.append(unit(cluster))
        else:
            blocks = [cluster[start : start + _BLOCK] for start in range(0, len(cluster), _BLOCK)]
            chains.append([unit(part) for block in blocks for part in _chain(block, sets, slots)])
    return needs, spare, chains


def _sets(
    mixes: NDArray[np.int32], facts: Sequence[tuple[frozenset[int], int]], slots: int
) -> tuple[list[frozenset[int]], list[int], Ints]:
    """The distinct sets of adapters, number 0 being the empty one; their largest ranks; (mixes + 1,) a mix's set."""
    number_of: dict[frozenset[int], int] = {frozenset(): 0}
    rank_of = [1]
    set_of_mix = np.zeros(len(facts) + 1, np.int64)  # the base, -1, is the last
    for mix in mixes[mixes >= 0].tolist():
        members, rank = facts[mix]
        if len(members) > slots:
            raise ValueError(f"mix {mix} needs {len(members)} adapters at once and {slots} slots are free")
        number = number_of.setdefault(members, len(number_of))
        if number == len(rank_of):
            rank_of.append(max(1, rank))
        rank_of[number] = max(rank_of[number], rank)
        set_of_mix[mix] = number
    return list(number_of), rank_of, set_of_mix


def _group(rows: Ints, number: Ints, turn: Ints, count: int) -> list[Ints]:
    """The positions of each set, in turn."""
    order = np.lexsort((turn, number))
    return np.split(rows[order], np.cumsum(np.bincount(number, minlength=count))[:-1])


def _clusters(sets: list[frozenset[int]]) -> list[list[int]]:
    """The numbers of the non-empty sets; those that share adapters, directly or through others, together."""
    parent = list(range(len(sets)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    owner: dict[int, int] = {}
    for number, members in enumerate(sets):
        for adapter in members:
            first, other = sorted((root(number), root(owner.setdefault(adapter, number))))
            parent[other] = first
    clusters: dict[int, list[int]] = {}
    for number in range(1, len(sets)):
        clusters.setdefault(root(number), []).append(number)
    return list(clusters.values())


def _chain(cluster: list[int], sets: list[frozenset[int]], slots: int) -> Iterator[list[int]]:
    """A cluster cut in parts that fit the slots.

    Next is always the set that needs the fewest adapters more; of equals the one that brings a held adapter nearest to
    its end, which then makes room for another.
    """
    having: dict[int, list[int]] = {}
    for place, number in enumerate(cluster):
        for adapter in sets[number]:
            having.setdefault(adapter, []).append(place)
    places = {adapter: np.array(found) for adapter, found in having.items()}
    left = {adapter: len(found) for adapter, found in having.items()}
    score = np.array([float(len(sets[number])) for number in cluster])
    part: list[int] = []
    members: frozenset[int] = frozenset()
    for _ in cluster:
        place = int(np.argmin(score))
        score[place] = np.inf
        chosen = sets[cluster[place]]
        if len(members | chosen) > slots:
            yield part
            part = []
            for adapter in members:
                score[places[adapter]] += 1 + 1 / (1 + left[adapter])
            members = frozenset()
        for adapter in chosen:
            held = 1 + 1 / (1 + left[adapter]) if adapter in members else 0.0
            left[adapter] -= 1
            score[places[adapter]] += held - 1 - 1 / (1 + left[adapter])
        part.append(cluster[place])
        members |= chosen
    yield part
