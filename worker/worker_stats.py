"""What a worker counts, over all lives of its engines: rows by adapter, and what the engines counted themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from loramill.schemas.names import Uses
from loramill.store.records import DoneRow
from loramill.worker.request import STEP_BOUNDS_S, EngineStats

BASE, MIX, INVALID = "(base)", "(mix)", "(invalid)"
"""In place of an adapter's name, which has no brackets: rows of the base, of several adapters, and those that come to
neither. Mixes are not counted apart from each other: whoever writes rows could make any number of them."""
FIELDS = ("completed", "failed", "prompt_tokens", "completion_tokens")
NOW = frozenset({"running", "places", "resident", "kv_used", "kv_tokens", "most_bytes"})
"""Of EngineStats: what an engine that died takes along, for it is no count."""

Tallies = Mapping[str, list[int]]
"""Adapter -> FIELDS, of rows that an engine is done with. A row that is computed twice counts twice."""


def counted_as(uses: Uses) -> str:
    """What a row that came to these is counted as."""
    return uses[0][0] if len(uses) == 1 else MIX if uses else BASE


def tally(rows: Iterable[DoneRow]) -> Tallies:
    """By what the rows came to."""
    found: dict[str, list[int]] = {}
    for row in rows:
        counted = found.setdefault(row.adapter or INVALID, [0, 0, 0, 0])
        counted[row.failed] += 1
        counted[2] += row.prompt_tokens
        counted[3] += row.completion_tokens
    return found


def together(stats: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """EngineStats of several engines, or of several lives of one, as plain values, summed up."""
    total = asdict(EngineStats())
    for each in stats:
        total = _sum(total, each)
    return total


def _sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _add(value, other[name]) if name in other else value for name, value in one.items()}


def _add(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping):
        return _sum(one, other)
    if isinstance(one, list):
        return [mine + its for mine, its in zip(one, other, strict=True)]
    return one + other


def _counts(stats: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in stats.items() if name not in NOW}
    return {name: _counts(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


class EngineCounts:
    """Of one engine process. Nothing of it ever falls, but for what is so NOW."""

    def __init__(self) -> None:
        self.stats: Mapping[str, Any] = {}
        """Of this life, as the child said last; {} before its first beat."""
        self._before: Mapping[str, Any] = {}
        self._tallies: dict[str, list[int]] = {}

    def count(self, tallies: Tallies) -> None:
        """Rows came from the engine."""
        for name, counted in tallies.items():
            had = self._tallies.get(name, [0, 0, 0, 0])
            # Another list, not the same one longer: another thread may be reading.
            self._tallies[name] = [mine + its for mine, its in zip(had, counted, strict=True)]

    def died(self) -> None:
        """What the child did not come to say is lost: a second's worth."""
        self._before, self.stats = together([self._before, _counts(self.stats)]), {}

    @property
    def total(self) -> dict[str, Any]:
        """EngineStats over all lives."""
        return together([self._before, self.stats])

    @property
    def tallies(self) -> Tallies:
        """Over all lives."""
        return self._tallies.copy()


def record_of(engines: Iterable[EngineCounts]) -> dict[str, Any]:
    """WorkerRecord.stats: `engine`, EngineStats of all engines with the `bounds_s` of its step times, and `adapters`,
    the FIELDS of each by name."""
    engines = list(engines)
    all_ = EngineCounts()
    for each in engines:
        all_.count(each.tallies)
    engine = together(each.total for each in engines)
    engine["step_times"]["bounds_s"] = list(STEP_BOUNDS_S)
    adapters = {name: dict(zip(FIELDS, counted, strict=True)) for name, counted in all_.tallies.items()}
    return {"engine": engine, "adapters": adapters}
