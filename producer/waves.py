"""Rows into waves: which mixes are on the device side by side, and in what order their rows start. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from loramill.producer.units import Unit, units

Ints = NDArray[np.int64]


class Mode(StrEnum):
    """How a mix is served: beside others by the multi-LoRA kernels, or alone, merged into the base's weights."""

    DYNAMIC = "dynamic"
    STATIC = "static"


@dataclass(slots=True, frozen=True)
class MixFacts:
    """One distinct mix of the job: the adapters that rows ask for together (usually one), whatever their strengths."""

    adapters: tuple[int, ...]
    """Numbers of distinct contents, each once."""
    rank: int
    """The largest."""
    static_only: bool = False
    """It can be served merged alone (DoRA and the like)."""


@dataclass(slots=True, frozen=True)
class Limits:
    """What one engine can hold. Raises ValueError where the pinned adapters alone are more than the slots."""

    slots: int
    """Adapters on the device at once, `max_loras_per_batch`: no wave needs more."""
    max_num_seqs: int
    max_num_batched_tokens: int
    pinned: frozenset[int] = frozenset()
    """Adapters that keep a slot throughout."""
    max_loaded_loras: int | None = None
    """Adapters that host memory holds; None is all of them."""

    def __post_init__(self) -> None:
        if self.slots < 1 or self.max_num_seqs < 1 or self.max_num_batched_tokens < 1:
            raise ValueError("slots, max_num_seqs and max_num_batched_tokens must be at least 1")
        if len(self.pinned) > self.slots:
            raise ValueError(f"{len(self.pinned)} adapters are pinned and there are {self.slots} slots")

    @property
    def free(self) -> int:
        """Slots that no pinned adapter holds."""
        return self.slots - len(self.pinned)

    def needed(self, facts: MixFacts) -> frozenset[int]:
        """The adapters of a mix that need one of the free slots."""
        return frozenset(facts.adapters) - self.pinned


@dataclass(slots=True, frozen=True)
class Wave:
    """Rows that are served side by side, or, where static, with one mix merged into the base's weights.

    Dynamic waves that follow each other run on into one another. A static wave starts and ends with an empty engine.
    """

    mode: Mode
    mixes: tuple[int, ...]
    """Numbers, ascending; -1 is the base."""
    rows: Ints
    """Positions, in the order to start."""


def arrange(
    rows: Ints,
    mix: NDArray[np.int32],
    cost: Ints,
    turn: Ints,
    facts: Sequence[MixFacts],
    limits: Limits,
    *,
    to_cut: bool = False,
) -> Iterator[Wave]:
    """The dynamic waves of `rows` (positions) in the order that keeps the batch full and loads each adapter once.

    mix: (all rows,) mix of each, -1 for the base.  cost: (all rows,) tokens, prompt and answer.
    turn: (all rows,) their order where nothing else decides (`prefixes.turns`).

    The rows of one adapter keep together, the longest in front, so that its short rows fill the gaps at its end. Where
    all adapters have slots there is one wave, and unless it is `to_cut` the shortest rows of all end it.

    Otherwise an adapter is needed in consecutive waves only. Adapters of one wave are of one rank class, since a tile
    pays for the largest rank beside it. Adapters with few rows cannot fill a batch by themselves, so they come first,
    as many at a time as have slots, and rows of the base, or else of the heaviest adapters, fill up the batch beside
    them: of their own rank class while there are any, since an empty place costs more than a padded one.
    """
    members = [(limits.needed(one), one.rank) for one in facts]
    needs, spare, chains = units(rows, mix, cost, turn, members, limits.free)

    def in_order(together: Ints) -> Ints:
        return together if to_cut else _shortest_last(together, cost, turn, limits.max_num_seqs)

    for parts in _parts(needs, spare, chains, limits, in_order):
        joined = np.concatenate(parts)
        yield Wave(Mode.DYNAMIC, tuple(np.unique(mix[joined]).tolist()), joined)


def arrange_in_turn(rows: Ints, mix: NDArray[np.int32], facts: Sequence[MixFacts], limits: Limits) -> Iterator[Wave]:
    """The dynamic waves of `rows` in input order: exactly, where all their adapters have a slot at once.

    Otherwise the mixes of a wave are the next ones to appear that fit; within a wave rows keep the input's order.
    """
    mixes, first, inverse = np.unique(mix[rows], return_index=True, return_inverse=True)
    wave_of = np.empty(len(mixes), np.int64)
    held: set[int] = set()
    wave = 0
    for place in np.argsort(first):
        needed = limits.needed(facts[mixes[place]]) if mixes[place] >= 0 else frozenset()
        if len(held | needed) > limits.free:
            wave += 1
            held = set()
        held |= needed
        wave_of[place] = wave
    of_row = wave_of[inverse]
    order = np.argsort(of_row, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(of_row[order])) + 1) if len(rows) else []:
        yield Wave(Mode.DYNAMIC, tuple(np.unique(mix[rows[part]]).tolist()), rows[part])


def _parts(
    needs: list[Unit], spare: Unit, chains: list[list[Unit]], limits: Limits, in_order: Callable[[Ints], Ints]
) -> Iterator[list[Ints]]:
    """The rows of each wave in turn, in parts; `in_order` is for a wave of all adapters that are not in chains."""
    for unit in (unit for chain in chains for unit in chain):
        yield [unit.rows, spare.take(limits.max_num_seqs - len(unit.rows))]
    if sum(len(unit.members) for unit in needs) <= limits.free:
        units = [unit for own in reversed(_by_class(needs)) for unit in reversed(own)]
        every = np.concatenate([*(unit.rows for unit in units), spare.take(len(spare.rows))])
        yield from [[in_order(every)]] if len(every) else []
    elif sum(len(unit.rows) for unit in (*needs, spare)) <= 2 * limits.max_num_seqs:
        yield from _heaviest_first(needs, spare, limits.free)
    else:
        yield from _Interleaved(needs, spare, limits).waves()
    if len(spare.rows):
        yield [spare.rows]


def _shortest_last(rows: Ints, cost: Ints, turn: Ints, max_num_seqs: int) -> Ints:
    """The same rows with the last ones in turn, which are the shortest, at the end.

    Those fill up the batch while the last long rows run: there are so many of them as can, if all of its places are
    taken for as long as the longest row runs.
    """
    in_turn = rows[np.argsort(turn[rows])]
    left = np.cumsum(cost[in_turn][::-1])[::-1]
    last = in_turn[left <= max_num_seqs * int(cost[rows].max())]
    return np.concatenate([rows[turn[rows] < turn[last[0]]], last])


def _heaviest_first(needs: list[Unit], spare: Unit, slots: int) -> Iterator[list[Ints]]:
    """Few rows: there is nothing to fill up, and the heaviest run the longest."""
    parts: list[Ints] = []
    used, rank_class = 0, 0
    for own in reversed(_by_class(needs)):
        for unit in reversed(own):
            if parts and (unit.rank_class != rank_class or used + len(unit.members) > slots):
                yield parts
                parts, used = [], 0
            parts.append(unit.rows)
            used, rank_class = used + len(unit.members), unit.rank_class
    if parts:
        yield [*parts, spare.take(len(spare.rows))]


class _Interleaved:
    """Units taken from the light end a few at a time, and from the heavy end to fill up the batch beside them."""

    def __init__(self, needs: list[Unit], spare: Unit, limits: Limits) -> None:
        self._classes = _by_class(needs)
        self._spare = spare
        self._slots = limits.free
        self._max_num_seqs = limits.max_num_seqs
        self._filler: Unit | None = None
        """Begun and not finished: it keeps its slots from wave to wave."""

    def waves(self) -> Iterator[list[Ints]]:
        for own in self._classes:
            while own:
                yield self._wave(own)
        if self._filler:
            yield [self._filler.rows]

    def _wave(self, own: deque[Unit]) -> list[Ints]:
        begun = self._filler
        used = len(begun.members) if begun else 0
        kept = 0 if begun or self._slots == 1 else 1  # for a filler
        light: list[Unit] = []
        while own and used + len(own[0].members) <= self._slots - (kept if light else 0):
            used += len(own[0].members)
            light.append(own.popleft())
        if begun and not light:  # no room beside it for so wide a unit
            self._filler = None
            return [begun.rows]
        parts = [unit.rows for unit in light]
        missing = self._max_num_seqs - sum(map(len, parts))
        if missing <= 0 and begun:
            # Not needed for a while: finished here, as its slots would be for nothing.
            self._filler = None
            return [*parts, begun.rows]
        taken = self._spare.take(missing)
        parts.append(taken)
        missing -= len(taken)
        while missing > 0:
            if self._filler is None:
                self._filler = self._next_filler(own, self._slots - used)
                if self._filler is None:
                    break
                used += len(self._filler.members)
            taken = self._filler.take(missing)
            missing -= len(taken)
            # A filler that begins goes first, or the light ones of the next wave would take the slot that it waits for.
            parts = [*parts, taken] if self._filler is begun else [taken, *parts]
            if not len(self._filler.rows):
                self._filler = None
        return parts

    def _next_filler(self, own: deque[Unit], slots: int) -> Unit | None:
        """The heaviest unit of this rank class, or else of the heaviest class, if it fits."""
        source = own or next((other for other in reversed(self._classes) if other), own)
        return source.pop() if source and len(source[-1].members) <= slots else None


def _by_class(needs: list[Unit]) -> list[deque[Unit]]:
    """The units of each rank class by ascending work; the class with the least work first."""
    classes: dict[int, list[Unit]] = {}
    for unit in needs:
        classes.setdefault(unit.rank_class, []).append(unit)
    ordered = sorted(classes.items(), key=lambda item: (sum(unit.work for unit in item[1]), item[0]))
    return [deque(sorted(own, key=lambda unit: (unit.work, unit.number))) for _, own in ordered]
