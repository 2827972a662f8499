"""Feeds the engine with a job's rows and hands their result lines on as they finish."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from loramill.schemas.errors import LineError
from loramill.schemas.names import Names, Uses
from loramill.schemas.prompt import Prompter
from loramill.schemas.prompters import Prompters
from loramill.schemas.request import Row, parse_line
from loramill.schemas.response import Answer, Served, ok_line
from loramill.schemas.sampling import resolve_params
from loramill.store.journal import DoneRow
from loramill.worker.forecast import Forecast
from loramill.worker.request import AdapterUnavailable, Mix, Request, Result, Sampling
from loramill.worker.result_lines import ADAPTER_UNAVAILABLE, ENGINE_ERROR, choice, engine_failure, failed_row

WAITING_PER_SEQ = 4  # rows queued in the engine for each that it can run: choice enough for its scheduler
FEED_ROWS = 256  # tokenized together: about 5x faster than one by one
FEED_BYTES = 2**20  # bounds what a batch of long lines holds
EMIT_ROWS = 512
EMIT_EVERY_S = 0.2  # what a kill can cost; a commit's fsync is then below 5 % of the time even on a slow disk


class RowEngine(Protocol):
    """The part of worker.engine.Engine that is used."""

    max_num_seqs: int

    @property
    def num_waiting(self) -> int: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def step(self) -> list[Result]: ...
    def cancel_waiting(self) -> list[int]: ...
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
    finished: list[DoneRow] = field(default_factory=list)
    """Waiting to be emitted."""
    in_flight: int = 0


@dataclass(slots=True)
class _InFlight:
    shard: Shard
    number: int
    row: Row
    uses: Uses
    prompter: Prompter
    request: Request


class ShardRunner:
    """Streams any number of shards through one engine."""

    def __init__(self, engine: RowEngine, prompter: Prompter, clock: Callable[[], float] = time.monotonic) -> None:
        """`prompter` is the base's."""
        self._engine = engine
        self._prompter = prompter
        self._clock = clock
        self._shards: list[Shard] = []
        self._unread: deque[Shard] = deque()
        self._in_flight: dict[int, _InFlight] = {}
        self._next_key = 0
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

    def step(self) -> None:
        """Feeds the engine, runs one forward pass, and emits what has finished."""
        self._feed()
        for result in self._engine.step() if self._engine.has_work else ():
            self._finish(result)
        self._emit_due()

    def cancel(self, shard: Shard) -> None:
        """Starts no further row of `shard`; those in flight still finish and are emitted."""
        if shard in self._unread:
            self._read_no_more(shard)
        for key in self._engine.cancel_waiting():
            waiting = self._in_flight[key]
            if waiting.shard is shard:
                del self._in_flight[key]
                shard.in_flight -= 1
            else:
                self._engine.add(waiting.request)

    def emit_all(self) -> None:
        """Emits every finished row, and lets go of the shards that are done."""
        for shard in list(self._shards):
            if shard.finished:
                finished, shard.finished = shard.finished, []
                shard.emit(finished)
            if not shard.in_flight and shard not in self._unread:
                self._shards.remove(shard)
        self._emitted_at = self._clock()

    def _feed(self) -> None:
        wanted = WAITING_PER_SEQ * self._engine.max_num_seqs
        # Below half, then up to the brim: rows are tokenized many at a time.
        if self._engine.num_waiting > wanted // 2:
            return
        while self._unread and self._engine.num_waiting < wanted:
            shard = self._unread[0]
            self._unread.rotate(-1)
            batch = list(_batch(shard.rows))
            if not batch:
                self._read_no_more(shard)
                continue
            if shard.forecast is not None:
                shard.forecast.take(len(batch))
            self._admit(shard, batch)

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
                request = self._request(shard, row, uses, prompt, prompter)
                self._engine.add(request)
            except LineError as error:
                error.custom_id = row.custom_id
                shard.finished.append(failed_row(job.id, number, error))
            except ValueError as error:  # the engine's own refusal; only this row is in doubt
                code = ADAPTER_UNAVAILABLE if isinstance(error, AdapterUnavailable) else ENGINE_ERROR
                shard.finished.append(engine_failure(job.id, number, row, str(error), code=code))
            else:
                self._in_flight[request.key] = _InFlight(shard, number, row, uses, prompter, request)
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
        return Request(self._next_key, prompt, Sampling(**params), mix, merged, prompter.decode)

    def _finish(self, result: Result) -> None:
        done = self._in_flight.pop(result.key)
        shard, job = done.shard, done.shard.job
        shard.in_flight -= 1
        if result.error is not None:
            failed = engine_failure(job.id, done.number, done.row, result.error, result.prompt_tokens, result.code)
            shard.finished.append(failed)
            return
        answer = Answer(
            choices=[choice(completion, done.prompter) for completion in result.completions],
            prompt_tokens=result.prompt_tokens,
            model=done.row.model or job.names.base,
            adapters=[Served(name, job.names.adapters[name].sha256, strength) for name, strength in done.uses],
            mode="base" if not done.request.mix else "static" if done.request.merged else "dynamic",
        )
        line = ok_line(job.id, done.number, done.row, answer, int(time.time()))
        shard.finished.append(DoneRow(done.number, False, line, result.prompt_tokens, answer.completion_tokens))

    def _emit_due(self) -> None:
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
