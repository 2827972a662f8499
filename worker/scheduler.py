"""What the next forward pass computes. Pure: no torch, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from heapq import heapify, heappop, heappush

from loramill.worker.request import Mix
from loramill.worker.room import Room
from loramill.worker.sequence import Chunk, Sequence, Step
from loramill.worker.slots import Load, Slots
from loramill.worker.waiting import Kind, Waiting, kind_of

PATIENCE = 4096
"""Passes that the first waiting row may be passed over for want of slots, before no other row is admitted until it has
had its turn. Much: its slots come free with the longest answer, and stopping sooner only empties the batch."""
WEIGHTS_PATIENCE = 64
"""The same for want of other weights, which never come by themselves while rows are admitted that use the present ones.
A planned job has those that share weights together, and never waits for this; rows that come as they may do. And
the same for the first row that is not urgent, while urgent ones are before it."""


class Scheduler:
    """Continuous batching under a token budget, a sequence limit, a slot limit and the cache's room.

    Rows are admitted in the order in which they were added, except that a row whose adapters can have no slots now, or
    that needs other weights merged than are, is passed over. The weights change when no row runs. A running row always
    goes on; when the cache is full the youngest one starts over later, of those that are not urgent if there are any.

    Urgent rows wait before the others, and may have up to half of the places that are taken. One without slots gets
    those that come free the soonest, which no other row that needs their adapters prolongs; for one that needs other
    weights no row starts. The first row that is not urgent has its turn after WEIGHTS_PATIENCE passes all the same.
    """

    def __init__(self, slots: Slots, room: Room, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}): "
                "every running row decodes one token a step"
            )
        self.slots = slots
        self.room = room
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.weights: Mix = ()
        """What is merged into the base's weights."""
        self._passed_over = 0  # passes since the first waiting row last changed
        self._first: Sequence | None = None
        self._admissible = False  # something changed since admission last came to a stop

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.add(sequence)
        self._admissible = True

    def schedule(self) -> Step:
        """Decide the next pass: every decode, then prompts under way, then new rows."""
        self._make_room()
        if self._admissible:
            self._choose_first()
            self._make_way()
        budget = self.max_num_batched_tokens
        chunks: list[Chunk] = []
        for decoding in (True, False):
            for sequence in self.running:
                if (sequence.pending == 1) is decoding and budget and not sequence.ends:
                    budget -= self._compute(sequence, budget, chunks)
        loads = self._admit(budget, chunks) if budget and self._admissible else []
        chunks.sort(key=lambda chunk: chunk.sequence.slots)
        return Step(self.weights, loads, chunks)

    def finish(self, sequence: Sequence) -> None:
        """A running sequence is done: its cache room and its hold on the adapter go."""
        self.running.remove(sequence)
        self._release(sequence)

    def cancel_waiting(self) -> list[Sequence]:
        """Drop and return what waits of rows none of whose sequences has started."""
        begun = {s.request.key for s in self.running} | {s.request.key for s in self.waiting if s.started}
        dropped = [s for s in self.waiting if s.request.key not in begun]
        for sequence in dropped:
            self.waiting.remove(sequence)
        return dropped

    def cancel(self, keys: Collection[int], *, failed: bool = False) -> None:
        """Drop all sequences of these rows, those that run included."""
        for key in keys:
            for sequence in self.waiting.of_row(key):
                self.waiting.remove(sequence)
        for sequence in [s for s in self.running if s.request.key in keys]:
            self.running.remove(sequence)
            self._release(sequence, forget=failed)
        self._admissible = True

    def start_over(self, loads: Iterable[Load]) -> None:
        """A pass broke off: every running sequence starts again later, and the slots that were loaded for it hold
        nothing."""
        while self.running:
            self._preempt(self.running.pop(), forget=True)
        for load in loads:
            self.slots.drop(load.adapter)

    def _admit(self, budget: int, chunks: list[Chunk]) -> list[Load]:
        """Start waiting rows: what to load for them; they are added to `chunks`."""
        loads: list[Load] = []
        self._choose_weights()
        impatient = self._impatient
        budget = self._start(budget, chunks, loads, () if impatient else self.waiting.adapters, only_first=impatient)
        if not self.running:
            # Mixes can hold each other up, each with a part of what the others need.
            budget = self._start(budget, chunks, loads, (), only_first=False)
        self._admissible = bool(self.waiting) and not budget
        return loads

    def _start(
        self, budget: int, chunks: list[Chunk], loads: list[Load], kept_adapters: Container[str], *, only_first: bool
    ) -> int:
        """Start every row that can be, or none if the first cannot: what is left of the budget."""
        leaving: set[str] = set()
        kept_pages = sum(map(self.room.growth, self.running))
        heads = self.waiting.heads()
        heapify(heads)
        while heads and budget and len(self.running) < self.max_num_seqs:
            _, sequence = heappop(heads)
            kind = kind_of(sequence)
            kept = () if kind.urgent else kept_adapters
            if kind.weights == self.weights and leaving.isdisjoint(kind.adapters):
                if self.slots.could_place(kind.adapters, kept):
                    # Cache room first: a load whose row then cannot start would evict for nothing.
                    growth = self.room.growth(sequence)
                    if not self.room.start(sequence, kept_pages + growth if self.running else 0):
                        break
                    kept_pages += growth
                    self.waiting.remove(sequence)
                    loads += self._begin(sequence, kind, kept)
                    budget -= self._compute(sequence, budget, chunks)
                    if (head := self.waiting.head(kind)) is not None:
                        heappush(heads, head)
                    continue
                if kind.urgent and not leaving:
                    leaving = self._leaving(kind)
            # Passed over, and with it all of its kind.
            if only_first:
                break
        return budget

    def _compute(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add a running sequence's next chunk to `chunks`: its tokens."""
        chunk = sequence.chunk(budget)
        self.room.offer(chunk)
        chunks.append(chunk)
        return chunk.size

    def _choose_first(self) -> None:
        """The first of the rows that are not urgent comes before those that are, once they have passed it over long."""
        if not self.waiting:
            return
        common = self.waiting.first_common
        first = common or self.waiting.first
        if first is not self._first:
            self._first, self._passed_over = first, 0
        self._passed_over += 1
        if self._passed_over > WEIGHTS_PATIENCE:
            self.waiting.favoured = common

    def _choose_weights(self) -> None:
        """What is merged changes when nothing runs and no row that waits can use it, or the first has waited long."""
        if self.running or not self.waiting:
            return
        first = self.waiting.first
        if first is not None and (self._impatient or not self.waiting.any_with(self.weights)):
            self.weights = first.weights

    @property
    def _impatient(self) -> bool:
        """Whether the first waiting row has been passed over for long enough."""
        first = self.waiting.first
        if first is None:
            return False
        if first.request.urgent:
            return first.weights != self.weights
        return self._passed_over > (PATIENCE if first.weights == self.weights else WEIGHTS_PATIENCE)

    def _leaving(self, kind: Kind) -> set[str]:
        """The adapters that leave the soonest if no further row of theirs starts: as many as a kind lacks."""
        mix = kind.adapters
        left: dict[str, int] = {}
        for one in self.running:
            for adapter, _ in one.request.mix if one.slots else ():
                left[adapter] = max(left.get(adapter, 0), one.longest - len(one.tokens))
        able = [adapter for adapter in left if adapter not in mix and adapter not in self.slots.pinned]
        lacking = sum(self.slots.slot(adapter) is None for adapter in mix)
        return set(sorted(able, key=left.__getitem__)[:lacking])

    def _begin(self, sequence: Sequence, kind: Kind, kept: Container[str]) -> list[Load]:
        """A row starts: it has the slots of its mix, after these loads."""
        if sequence is self._first:
            self._first = None
        sequence.started = True
        self.running.append(sequence)
        if kind.merged:
            return []
        loads = self.slots.place(kind.adapters, kept)
        assert loads is not None, "could_place said that there are slots"
        sequence.slots = tuple((self.slots.acquire(adapter), weight) for adapter, weight in kind.mix)
        return loads

    def _make_room(self) -> None:
        """A page for every row whose next token would not fit; the youngest rows give way."""
        for sequence in list(self.running):
            while sequence.pages and not sequence.ends and not self.room.grow(sequence):
                self._preempt(self.running.pop(self._youngest))

    def _make_way(self) -> None:
        """Where every place is taken, the youngest rows give theirs to urgent ones that could start, up to half of all:
        a place comes free by itself within a row's time, which may be a minute, and a row starts over within a pass."""
        free = self.max_num_seqs - len(self.running)
        urgent = sum(sequence.request.urgent for sequence in self.running)
        for sequence in self.waiting.urgent:
            if free <= 0:
                can_start = sequence.weights == self.weights and self.slots.could_place(kind_of(sequence).adapters)
                if not can_start or 2 * urgent >= self.max_num_seqs:
                    return
                able = [at for at, one in enumerate(self.running) if not (one.request.urgent or one.amid_prompt)]
                if not able:  # one that never got through its prompt would never get anywhere
                    return
                self._preempt(self.running.pop(able[-1]))
            free, urgent = free - 1, urgent + 1

    def _preempt(self, sequence: Sequence, *, forget: bool = False) -> None:
        self._release(sequence, forget=forget)
        self.waiting.add(sequence, first=True)
        self.preemptions += 1

    @property
    def _youngest(self) -> int:
        """Which of the running ones gives way: its position."""
        urgent = [sequence.request.urgent for sequence in self.running]
        return len(urgent) - 1 - (urgent[::-1].index(False) if not all(urgent) else 0)

    def _release(self, sequence: Sequence, *, forget: bool = False) -> None:
        self.room.leave(sequence, forget=forget)
        if not sequence.request.merged:
            for adapter, _ in sequence.request.mix:
                self.slots.release(adapter)
        sequence.slots = ()
        sequence.forget_ahead()
        self._admissible = True
