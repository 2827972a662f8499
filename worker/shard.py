"""A job's rows on their way through an engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from loramill.schemas.names import Names, Uses
from loramill.schemas.prompt import Prompter
from loramill.schemas.request import Row
from loramill.schemas.said import SaidChoice
from loramill.store.records import DoneRow
from loramill.worker.deltas import Telling
from loramill.worker.forecast import Forecast
from loramill.worker.request import Mix, Request, Result
from loramill.worker.twins import Identity, Kept


class RowEngine(Protocol):
    """The part of worker.engine.Engine that is used."""

    max_num_seqs: int

    @property
    def num_waiting(self) -> int: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def step(self, on_start: Callable[[Sequence[int]], None] | None = None) -> list[Result]: ...
    def cancel_waiting(self) -> list[int]: ...
    def cancel(self, keys: Collection[int]) -> None: ...
    def watch(self, forecast: Forecast) -> None: ...
    def unwatch(self, forecast: Forecast) -> None: ...


@dataclass(slots=True, frozen=True)
class Job:
    """What all rows of a job share."""

    id: str
    """Result ids are made of it and the row's number: a rerun makes the same ones."""
    names: Names
    """What the rows can name; their adapters are registered with the engine by content hash."""
    defaults: Mapping[str, float]
    """Sampling values of rows that leave them out."""
    max_model_len: int
    seed: int = 0
    dedupe: bool = True
    """Whether rows of a shard that must come to the same answer are computed once."""
    urgent: bool = False
    """Its rows come before all that wait, and leave as they finish."""
    stream: bool = False
    """The answers of its one row are told while they are made."""


def _never(mix: Mix) -> bool:
    return False


@dataclass(slots=True, eq=False)
class Shard:
    """Rows to run. `rows` yields (row number, line) in the order in which they should start, and is read lazily;
    `emit` takes finished rows in batches, in any order; `merged` says which mixes are served statically."""

    job: Job
    rows: Iterator[tuple[int, bytes]]
    emit: Callable[[list[DoneRow]], None]
    merged: Callable[[Mix], bool] = _never
    forecast: Forecast | None = None
    """Which adapters the rows ask for, in their order."""
    alone: Collection[int] = ()
    """Numbers of rows that run last, one by one, each with nothing else in the engine."""
    on_start: Callable[[list[int], bool], None] | None = None
    """Told the numbers of rows right before the pass in which they first run, and whether nothing else does."""
    tell: Callable[[list[SaidChoice]], None] | None = None
    """Told more of the answers of a job that streams."""
    telling: Telling | None = None
    """While the row of such a job is in flight."""
    told_at: float = -inf
    apart: deque[tuple[int, bytes]] = field(default_factory=deque)
    """Of the rows that were read, those that are to run alone."""
    finished: list[DoneRow] = field(default_factory=list)
    """Waiting to be emitted."""
    in_flight: int = 0
    leaders: dict[Identity, InFlight] = field(default_factory=dict)
    """Rows in flight whose answers others may share."""
    kept: Kept = field(default_factory=Kept)


@dataclass(slots=True)
class InFlight:
    """A row that the engine has been given, or that follows one."""

    shard: Shard
    number: int
    row: Row
    uses: Uses
    prompter: Prompter
    request: Request
    identity: Identity | None
    followers: list[InFlight] = field(default_factory=list)
    """Rows that get the same answer; what they ask for is not kept."""
    started: bool = False
