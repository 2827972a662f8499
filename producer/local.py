"""The engine in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from loramill.producer.costs import Costs, Timing, fit
from loramill.producer.index import Index
from loramill.producer.job_plan import AdapterFacts, Draft, JobPlan
from loramill.producer.reader import Input
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.names import Names
from loramill.store.journal import DoneRow
from loramill.worker.adapters import Adapter
from loramill.worker.forecast import Forecast
from loramill.worker.loading import load_engine, pinned_by
from loramill.worker.measure import measure, tokens_to_measure
from loramill.worker.models import Models
from loramill.worker.request import EngineStats
from loramill.worker.settings import ModelOptions
from loramill.worker.shard_runner import Job, ShardRunner
from loramill.worker.shard_runner import Shard as Shard  # the Python API's name for it

MEASURED_SHARE = 1 / 40
"""Of a job's tokens: `auto` measures what passes cost if that takes no more; below, there is too little to save."""


class LocalEngine:
    """The loaded base with its adapters, and the runner that feeds it."""

    def __init__(
        self,
        models: Models,
        options: ModelOptions,
        *,
        longest_row: int | None = None,
        adapters: Iterable[str] | None = None,
    ) -> None:
        """Loads the weights. `longest_row` in tokens, if it is known, saves cache memory; `adapters` are the names that
        rows can come to, all of them by default. Raises Failure (USAGE for --pin, otherwise INPUT)."""
        self._base = models.base
        self._options = options
        self._pinned = pinned_by(models, options)
        self._facts = {a.sha256: AdapterFacts(a.rank, bool(a.static_only)) for a in models.adapters.values()}
        self._engine = load_engine(models, options, longest_row=longest_row, adapters=adapters)
        self.runner = ShardRunner(self._engine, models.prompter)
        self._costs: Costs | None = None

    def close(self) -> None:
        """Ends the thread that reads adapters."""
        self._engine.close()

    def plan(
        self,
        index: Index,
        left: NDArray[np.int64],
        names: Names,
        decided: Mapping[str, str] | None = None,
        *,
        timed: bool = False,
    ) -> JobPlan:
        """How to run the rows at positions `left` of the index; `names` is what they were checked with, `decided` what
        an earlier run of the same job decided. For `auto` a few passes may be timed, if no rows are running; with
        `timed` they always are, for the predicted seconds.

        Raises Failure (USAGE) for a mix that the slots cannot hold.
        """
        draft, decided = Draft(index, left, names, self._facts), decided or {}
        plan = self._planned(draft, self._measured(draft) if self._worth_measuring(draft, decided) else None, decided)
        if timed and plan.plan.predicted.seconds is None:
            plan = plan.predicted_as(self._planned(draft, self._measured(draft), plan.decisions))
        return plan

    def run(self, shard: Shard, *, stopping: Callable[[], bool], on_step: Callable[[], None]) -> None:
        """Answers the rows of `shard`; once `stopping`, only those that are in flight."""
        self.runner.submit(shard)
        try:
            while self.runner.has_work:
                if stopping():
                    self.runner.cancel(shard)
                self.runner.step()
                on_step()
        except (MemoryError, RuntimeError):  # the engine's end: what it has finished is still worth keeping
            self.runner.emit_all()
            raise

    @property
    def stats(self) -> EngineStats:
        """Counters since the weights were loaded."""
        return self._engine.stats

    def register(self, adapter: Adapter) -> None:
        """From now on rows can ask for this content. Raises ValueError if it is too large for host memory."""
        self._engine.register(adapter)
        self._facts[adapter.sha256] = AdapterFacts(adapter.rank, bool(adapter.static_only))

    def forget(self, sha256: str) -> None:
        """No row asks for this content any more. Raises ValueError while one in the engine does."""
        self._engine.forget(sha256)

    def shard(
        self,
        source: Input,
        index: Index,
        left: NDArray[np.int64],
        plan: JobPlan,
        *,
        names: Names,
        job_id: str,
        emit: Callable[[list[DoneRow]], None],
    ) -> Shard:
        """The rows at positions `left` of the index as `plan` has them; `names` is what they were checked with."""
        job = Job(
            id=job_id,
            names=names,
            defaults=self._base.sampling_defaults,
            max_model_len=self._base.max_model_len,
            seed=self._options.seed,
            dedupe=not self._options.no_dedupe,
        )
        merged = plan.merged
        # Rows with merged weights ask for no slots: to the forecast they are the base's.
        needs = [() if mix in merged else tuple(sha256 for sha256, _ in mix) for mix in plan.mixes]
        forecast = Forecast(plan.mix[plan.order], needs)
        rows = _read(source, index, left[plan.order])
        return Shard(job, rows, emit, merged=merged.__contains__, forecast=forecast)

    def _planned(self, draft: Draft, costs: Costs | None, decided: Mapping[str, str]) -> JobPlan:
        try:
            return draft.plan(
                slots=self._engine.config.max_loras_per_batch,
                max_num_seqs=self._engine.max_num_seqs,
                max_num_batched_tokens=self._options.max_num_batched_tokens,
                max_loaded_loras=self._options.max_loaded_loras,
                pinned=self._pinned,
                mode=self._options.lora_mode,
                order=self._options.order,
                costs=costs,
                decided=decided,
            )
        except ValueError as error:
            raise Failure(ExitCode.USAGE, str(error)) from error

    def _worth_measuring(self, draft: Draft, decided: Mapping[str, str]) -> bool:
        if self._options.lora_mode != "auto" or not draft.undecided(decided):
            return False
        share = draft.total_tokens * MEASURED_SHARE
        return self._costs is not None or share >= tokens_to_measure(self._engine.max_num_seqs)

    def _measured(self, draft: Draft) -> Costs | None:
        """What passes cost here; None while rows are running and nobody measured before."""
        if self._costs is None and not self._engine.has_work:
            measured = measure(self._engine, draft.by_use)
            timings = [Timing(one.seconds, one.tokens, one.rows, one.adapters) for one in measured.passes]
            if any(one.rows for one in timings):  # rows of a single token never decode
                self._costs = fit(timings, merge_s=measured.merge_s, load_s=measured.load_s, read_s=measured.read_s)
        return self._costs


def _read(source: Input, index: Index, order: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    for position in order:
        yield int(index.row[position]), source.read(int(index.offset[position]), int(index.length[position]))
