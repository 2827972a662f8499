"""A model of workers that claim shards of one job and run them by continuous batching. Coarse, and no model is run."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loramill.producer.costs import Costs
from loramill.producer.traffic import NEVER, Tier

Ints = NDArray[np.int64]
BASE = -1


@dataclass(slots=True, frozen=True)
class Rows:
    """(rows,) columns: adapter (-1 the base), prompt tokens, and the answer's true length."""

    adapter: Ints
    prompt: Ints
    answer: Ints


@dataclass(slots=True, frozen=True)
class Setting:
    """The machines. A worker sees `look_ahead` rows of its shards, and claims its next shard when fewer are left."""

    workers: int
    slots: int
    max_num_seqs: int
    look_ahead: int
    host: int
    """Adapters that a worker's host memory holds, by least recent use."""
    costs: Costs


@dataclass(slots=True, frozen=True)
class Strategy:
    """How shards are claimed, rows started and slots given up."""

    claim: Literal["in order", "resident first"]
    blocked: Literal["wait", "pass over"]
    """A row whose adapter can have no slot now holds up those behind it, or does not."""
    evict: Literal["lru", "unneeded"]
    """Of adapters without running rows: the least recently used, or only ones that no row in sight wants."""


@dataclass(slots=True)
class Outcome:
    makespan_s: float = 0.0
    loads: int = 0
    evictions: int = 0
    reads: int = 0
    busy_s: float = 0.0
    """Seconds that places of batches were held by rows, over all places."""
    passes: int = 0
    rows: int = 0
    """Answered."""


@dataclass(slots=True)
class _Run:
    """Consecutive rows of one adapter that wait."""

    number: int
    adapter: int
    rows: deque[int]


@dataclass(slots=True)
class _Worker:
    rows: Rows
    setting: Setting
    strategy: Strategy
    outcome: Outcome
    now_s: float = 0.0
    clock: int = 0
    """Passes so far."""
    backlog: deque[int] = field(default_factory=deque)
    queue: deque[_Run] = field(default_factory=deque)
    queue_of: dict[int, deque[_Run]] = field(default_factory=dict)
    in_sight: int = 0
    numbered: int = 0
    running: list[tuple[int, int]] = field(default_factory=list)
    """(pass in which it ends, adapter) as a heap."""
    count_of: dict[int, int] = field(default_factory=dict)
    """Running rows of each adapter that has any."""
    resident: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Least recently used first."""
    memory: Tier = field(init=False)

    def __post_init__(self) -> None:
        self.memory = Tier(self.setting.host, "lru")

    def run(self, *, drain: bool) -> None:
        """Until fewer rows wait than it can look ahead; with `drain`, to the last row."""
        while True:
            self._see()
            self._start()
            if not drain and not self.backlog and self.in_sight < self.setting.look_ahead:
                return
            if not self.running:
                return
            self._pass_until_one_ends()

    def _see(self) -> None:
        while self.backlog and self.in_sight < self.setting.look_ahead:
            row = self.backlog.popleft()
            adapter = int(self.rows.adapter[row])
            if not self.queue or not self.queue[-1].rows or self.queue[-1].adapter != adapter:
                run = _Run(self.numbered, adapter, deque())
                self.numbered += 1
                self.queue.append(run)
                self.queue_of.setdefault(adapter, deque()).append(run)
            self.queue[-1].rows.append(row)
            self.in_sight += 1

    def _start(self) -> None:
        while len(self.running) < self.setting.max_num_seqs and (run := self._next_run()) is not None:
            adapter, row = run.adapter, run.rows.popleft()
            if not run.rows:
                self.queue_of[adapter].popleft()
                if not self.queue_of[adapter]:
                    del self.queue_of[adapter]
            self.in_sight -= 1
            costs = self.setting.costs
            if adapter != BASE:
                if adapter not in self.resident:
                    self._load(adapter)
                self.resident.move_to_end(adapter)
                self.count_of[adapter] = self.count_of.get(adapter, 0) + 1
            per_token = costs.prefill_s_per_token + costs.lora_s_per_token * (adapter != BASE)
            self._spend(per_token * float(self.rows.prompt[row]))
            heapq.heappush(self.running, (self.clock + int(self.rows.answer[row]), adapter))

    def _next_run(self) -> _Run | None:
        """The first run in sight whose adapter has a slot or can get one."""
        while self.queue and not self.queue[0].rows:
            self.queue.popleft()
        if not self.queue:
            return None
        can_load = len(self.resident) < self.setting.slots or self._victim() is not None
        first = self.queue[0]
        if first.adapter == BASE or first.adapter in self.resident or can_load:
            return first
        if self.strategy.blocked == "wait":
            return None
        ready = [runs[0] for adapter in (BASE, *self.resident) if (runs := self.queue_of.get(adapter))]
        return min(ready, key=lambda run: run.number, default=None)

    def _victim(self) -> int | None:
        for adapter in self.resident:
            if adapter not in self.count_of and (self.strategy.evict == "lru" or adapter not in self.queue_of):
                return adapter
        return None

    def _load(self, adapter: int) -> None:
        if len(self.resident) == self.setting.slots:
            victim = self._victim()
            assert victim is not None
            del self.resident[victim]
            self.outcome.evictions += 1
        read = self.memory.need(adapter, NEVER)
        self.outcome.reads += read
        self.outcome.loads += 1
        self.resident[adapter] = None
        self._spend(self.setting.costs.load_s + read * self.setting.costs.read_s)

    def _pass_until_one_ends(self) -> None:
        costs, rows = self.setting.costs, len(self.running)
        end, _ = self.running[0]
        pass_s = costs.decode_s_per_pass + costs.decode_s_per_row * rows
        if self.count_of:
            lora_rows = sum(self.count_of.values())
            pass_s += costs.lora_s_per_pass + costs.lora_s_per_row * lora_rows
            pass_s += costs.lora_s_per_adapter * len(self.count_of)
        self._spend(pass_s * (end - self.clock))
        self.outcome.passes += end - self.clock
        self.clock = end
        while self.running and self.running[0][0] == end:
            _, adapter = heapq.heappop(self.running)
            self.outcome.rows += 1
            if adapter != BASE:
                self.count_of[adapter] -= 1
                if not self.count_of[adapter]:
                    del self.count_of[adapter]

    def _spend(self, seconds: float) -> None:
        self.now_s += seconds
        self.outcome.busy_s += seconds * len(self.running) / self.setting.max_num_seqs


def simulate(rows: Rows, shards: Sequence[Ints], setting: Setting, strategy: Strategy) -> Outcome:
    """All workers until the last row of `shards` (rows in the order to start) is answered."""
    outcome = Outcome()
    workers = [_Worker(rows, setting, strategy, outcome) for _ in range(setting.workers)]
    having: dict[int, set[int]] = {}
    for number, shard in enumerate(shards):
        for adapter in np.unique(rows.adapter[shard]).tolist():
            having.setdefault(adapter, set()).add(number)
    left = dict.fromkeys(range(len(shards)))
    free = [(0.0, number) for number in range(len(workers))]
    while left:
        _, number = heapq.heappop(free)
        worker = workers[number]
        claimed = _claim(left, having, worker.resident if strategy.claim == "resident first" else ())
        del left[claimed]
        for adapter in np.unique(rows.adapter[shards[claimed]]).tolist():
            having[adapter].discard(claimed)
        worker.backlog.extend(shards[claimed].tolist())
        worker.run(drain=False)
        heapq.heappush(free, (worker.now_s, number))
    for worker in workers:
        worker.run(drain=True)
    outcome.makespan_s = max(worker.now_s for worker in workers)
    return outcome


def _claim(left: dict[int, None], having: dict[int, set[int]], resident: Sequence[int] | OrderedDict[int, None]) -> int:
    """The shard with the most of the resident adapters; of equals the one that waits longest."""
    found: dict[int, int] = {}
    for adapter in resident:
        for shard in having.get(adapter, ()):
            found[shard] = found.get(shard, 0) + 1
    return min(found, key=lambda shard: (-found[shard], shard)) if found else next(iter(left))
