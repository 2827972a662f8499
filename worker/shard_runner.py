"""Feeds the engine with a job's rows and hands their result lines on as they finish."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from loramill.schemas.errors import LineError
from loramill.schemas.names import Uses
from loramill.schemas.prompt import Prompter
from loramill.schemas.prompters import Prompters
from loramill.schemas.request import Row, parse_line
from loramill.schemas.sampling import resolve_params
from loramill.worker.deltas import Telling
from loramill.worker.request import AdapterUnavailable, Request, Result, Sampling
from loramill.worker.result_lines import ADAPTER_UNAVAILABLE, ENGINE_ERROR, answered, engine_failure, failed_row
from loramill.worker.shard import InFlight
from loramill.worker.shard import Job as Job
from loramill.worker.shard import RowEngine as RowEngine
from loramill.worker.shard import Shard as Shard
from loramill.worker.twins import identity_of

WAITING_PER_SEQ = 4  # rows queued in the engine for each that it can run: choice enough for its scheduler
FEED_ROWS = 256  # tokenized together: about 5x faster than one by one
FEED_BYTES = 2**20  # bounds what a batch of long lines holds
MAX_FOLLOWING = 16384
"""Rows that wait for the answer of another: at about a kilobyte each, more are not read."""
EMIT_ROWS = 512
TELL_EVERY_S = 0.05
EMIT_EVERY_S = 0.2  # what a kill can cost; a commit's fsync is then below 5 % of the time even on a slow disk


class ShardRunner:
    """Streams any number of shards through one engine."""

    def __init__(self, engine: RowEngine, prompter: Prompter, clock: Callable[[], float] = time.monotonic) -> None:
        """`prompter` is the base's."""
        self._engine = engine
        self._prompter = prompter
        self._clock = clock
        self._shards: list[Shard] = []
        self._unread: deque[Shard] = deque()
        self._in_flight: dict[int, InFlight] = {}
        self._next_key = 0
        self._lone: int | None = None
        """The key of the row that was last given the engine for itself."""
        self._parked: list[int] = []
        """The keys of rows that the engine has not while a question runs alone in it."""
        self._following = 0
        self._emitted_at = clock()

    @property
    def has_work(self) -> bool:
        """Whether a row is still to be run or to be emitted."""
        return bool(self._shards)

    def submit(self, shard: Shard) -> None:
        """Takes the rows of `shard` in turn with those of the other shards."""
        self._shards.append(shard)
        self._unread.append(shard)
        if shard.forecast is not None:
            self._engine.watch(shard.forecast)

    def holds(self, shard: Shard) -> bool:
        """Whether a row of `shard` is still to be run or to be emitted."""
        return shard in self._shards

    def step(self) -> None:
        """Feeds the engine, runs one forward pass, and emits what has finished."""
        self._feed()
        for result in self._engine.step(self._starting) if self._engine.has_work else ():
            self._finish(result)
        self._tell()
        self._emit_due()

    def cancel(self, shard: Shard, *, now: bool = False) -> None:
        """Starts no further row of `shard`. Those in flight still finish and are emitted; with `now` they are dropped,
        and only what has finished is emitted."""
        if shard in self._unread:
            self._read_no_more(shard)
        shard.apart.clear()
        self._unpark()
        for key in self._engine.cancel_waiting():
            waiting = self._in_flight[key]
            if waiting.shard is shard:
                self._forget(key)
            else:
                self._engine.add(waiting.request)
        if now:
            running = [key for key, one in self._in_flight.items() if one.shard is shard]
            self._engine.cancel(running)
            for key in running:
                self._forget(key)

    def emit_all(self) -> None:
        """Emits every finished row, and lets go of the shards that are done."""
        for shard in list(self._shards):
            self._emit(shard)
        self._emitted_at = self._clock()

    def _emit(self, shard: Shard) -> None:
        if shard.finished:
            finished, shard.finished = shard.finished, []
            shard.emit(finished)
        if not shard.in_flight and not shard.apart and shard not in self._unread:
            self._shards.remove(shard)

    def _feed(self) -> None:
        if self._feed_apart():
            return
        self._unpark()
        self._read_urgent()
        wanted = WAITING_PER_SEQ * self._engine.max_num_seqs
        # Below half, then up to the brim: rows are tokenized many at a time.
        if self._engine.num_waiting > wanted // 2 or self._following >= MAX_FOLLOWING:
            return
        # Rows that need no place in the engine (invalid ones, or those that share an answer) must not hold up a pass.
        room = max(wanted, FEED_ROWS)
        while self._unread and room > 0 and self._engine.num_waiting < wanted:
            shard = self._unread[0]
            self._unread.rotate(-1)
            room -= self._read(shard)

    def _read(self, shard: Shard) -> int:
        """Takes some rows of a shard: how many there were."""
        batch = list(_batch(shard.rows))
        if not batch:
            self._read_no_more(shard)
            return 0
        if shard.forecast is not None:
            shard.forecast.take(len(batch))
        common = [row for row in batch if row[0] not in shard.alone]
        shard.apart.extend(row for row in batch if row[0] in shard.alone)
        self._admit(shard, common)
        return len(batch)

    def _feed_apart(self) -> bool:
        """Sees to the rows that run alone: whether one does, or waits for the engine to empty, so that no other starts.

        All of a shard's go one after another: the engine empties once for them, and not for each. Questions come before
        the first of them, and have their turn between them."""
        if self._lone in self._in_flight:
            return True
        ready = [s for s in self._shards if s.apart and not s.in_flight and s not in self._unread]
        if not ready:
            return False
        shard = min(ready, key=lambda shard: not shard.job.urgent)
        if shard.job.urgent and not self._parked:
            self._parked = self._engine.cancel_waiting()  # somebody waits: what runs may finish, and no more
        empties = any(not one.shard.job.urgent for key, one in self._in_flight.items() if key not in self._parked)
        if (empties or self._lone is not None) and self._read_urgent():
            self._lone = None
        elif not self._engine.has_work:
            self._admit(shard, [shard.apart.popleft()])
            self._lone = self._next_key
        return True

    def _read_urgent(self) -> bool:
        """Takes the questions that there are: whether there was any."""
        urgent = [shard for shard in self._unread if shard.job.urgent]
        for shard in urgent:
            while shard in self._unread:
                self._read(shard)
        return bool(urgent)

    def _unpark(self) -> None:
        parked, self._parked = self._parked, []
        for key in parked:
            self._engine.add(self._in_flight[key].request)

    def _starting(self, keys: Sequence[int]) -> None:
        """The engine is about to run these rows; one that gave way to others comes again."""
        started: dict[Shard, list[int]] = {}
        for key in keys:
            one = self._in_flight[key]
            if not one.started:
                one.started = True
                started.setdefault(one.shard, []).append(one.number)
        for shard, numbers in started.items():
            if shard.on_start is not None:
                shard.on_start(numbers, self._lone in keys)

    def _forget(self, key: int) -> InFlight:
        """A row is in flight no longer, nor are those that follow it."""
        one = self._in_flight.pop(key)
        one.shard.in_flight -= 1 + len(one.followers)
        self._following -= len(one.followers)
        if one.identity is not None:
            del one.shard.leaders[one.identity]
        return one

    def _read_no_more(self, shard: Shard) -> None:
        self._unread.remove(shard)
        if shard.forecast is not None:
            self._engine.unwatch(shard.forecast)

    def _admit(self, shard: Shard, batch: list[tuple[int, bytes]]) -> None:
        job, names = shard.job, shard.job.names
        prompters = Prompters(self._prompter, names)
        parsed: list[tuple[int, Row, Uses]] = []
        for number, line in batch:
            try:
                row = parse_line(line, names.route_fields)
                parsed.append((number, row, names.resolve(row)))
            except LineError as error:
                shard.finished.append(failed_row(job.id, number, error))
        prompts = prompters.encode_rows([row for _, row, _ in parsed], [uses for _, _, uses in parsed])
        for (number, row, uses), prompt in zip(parsed, prompts, strict=True):
            try:
                if isinstance(prompt, LineError):
                    raise prompt
                prompter = prompters.of(uses)
                self._add(shard, number, row, uses, self._request(shard, row, uses, prompt, prompter), prompter)
            except LineError as error:
                error.custom_id = row.custom_id
                shard.finished.append(failed_row(job.id, number, error))
            except ValueError as error:  # the engine's own refusal; only this row is in doubt
                code = ADAPTER_UNAVAILABLE if isinstance(error, AdapterUnavailable) else ENGINE_ERROR
                shard.finished.append(engine_failure(job.id, number, row, uses, str(error), code=code))

    def _add(self, shard: Shard, number: int, row: Row, uses: Uses, request: Request, prompter: Prompter) -> None:
        """Gives the engine a row, unless it gets another's answer. Raises ValueError as the engine."""
        seeded = row.params.seed is not None
        identity = identity_of(request, prompter, seeded=seeded) if shard.job.dedupe else None
        one = InFlight(shard, number, row, uses, prompter, request, identity)
        if identity is not None and (known := shard.kept.get(identity)) is not None:
            shard.finished.append(answered(one, known))
            return
        if identity is not None and (leader := shard.leaders.get(identity)) is not None:
            one.row, one.request = replace(row, prompt=""), leader.request
            leader.followers.append(one)
            self._following += 1
        else:
            self._engine.add(request)
            self._in_flight[request.key] = one
            if identity is not None:
                shard.leaders[identity] = one
        shard.in_flight += 1

    def _request(self, shard: Shard, row: Row, uses: Uses, prompt: list[int], prompter: Prompter) -> Request:
        job = shard.job
        params = resolve_params(
            row.params,
            row.custom_id,
            defaults=job.defaults,
            prompt_tokens=len(prompt),
            max_model_len=job.max_model_len,
            seed=job.seed,
        )
        if prompter is not self._prompter and prompter.eos is not None and not params["ignore_eos"]:
            params["stop_token_ids"] += (prompter.eos,)  # the engine knows the base's
        self._next_key += 1
        mix = job.names.by_hash(uses)
        merged = bool(mix) and shard.merged(mix)
        shard.telling = Telling(row, prompter) if job.stream else None
        return Request(
            self._next_key, prompt, Sampling(**params), mix, merged, prompter.decode,
            urgent=job.urgent, follow=shard.telling.take if shard.telling else None,
        )  # fmt: skip

    def _finish(self, result: Result) -> None:
        leader = self._forget(result.key)
        shard = leader.shard
        if result.error is None and leader.identity is not None:
            shard.kept.put(leader.identity, result)
        shard.finished.extend(answered(one, result) for one in (leader, *leader.followers))

    def _tell(self) -> None:
        for shard in self._shards:
            if shard.telling is None or shard.tell is None or self._clock() < shard.told_at + TELL_EVERY_S:
                continue
            if news := shard.telling.news():
                shard.tell(news)
                shard.told_at = self._clock()

    def _emit_due(self) -> None:
        for shard in [shard for shard in self._shards if shard.job.urgent]:
            self._emit(shard)
        if (
            self._clock() - self._emitted_at >= EMIT_EVERY_S
            or sum(len(shard.finished) for shard in self._shards) >= EMIT_ROWS
            or not (self._in_flight or self._unread)
        ):
            self.emit_all()


def _batch(rows: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    size = 0
    for number, line in islice(rows, FEED_ROWS):
        yield number, line
        size += len(line)
        if size >= FEED_BYTES:
            return
