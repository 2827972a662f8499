"""The engine in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from loramill.producer.failures import ExitCode, Failure
from loramill.producer.index import Index
from loramill.producer.models import Models
from loramill.producer.options import ModelOptions
from loramill.producer.plan import plan_order
from loramill.producer.reader import Input
from loramill.schemas.names import Names
from loramill.store.journal import DoneRow
from loramill.worker.adapters import Adapter
from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.model import ModelError
from loramill.worker.request import EngineStats
from loramill.worker.shard_runner import Job, ShardRunner
from loramill.worker.shard_runner import Shard as Shard  # the Python API's name for it


class LocalEngine:
    """The loaded base with its adapters, and the runner that feeds it."""

    def __init__(self, models: Models, options: ModelOptions, *, longest_row: int | None = None) -> None:
        """Loads the weights. `longest_row` in tokens, if it is known, saves cache memory. Raises Failure (INPUT)."""
        self._base = models.base
        self._options = options
        config = EngineConfig(
            models.base,
            dtype=options.dtype,
            device=options.device,
            max_loras_per_batch=options.max_loras_per_batch,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            kv_cache_memory=options.kv_cache_memory,
            max_row_tokens=longest_row,
        )
        try:
            self._engine = Engine(config, models.adapters.values(), models.prompter.decode)
        except ModelError as error:
            raise Failure(ExitCode.INPUT, str(error)) from error
        self.runner = ShardRunner(self._engine, models.prompter)

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
        """From now on rows can ask for this content."""
        self._engine.register(adapter)

    def forget(self, sha256: str) -> None:
        """No row asks for this content any more. Raises ValueError while one in the engine does."""
        self._engine.forget(sha256)

    def shard(
        self,
        source: Input,
        index: Index,
        left: NDArray[np.int64],
        *,
        names: Names,
        job_id: str,
        emit: Callable[[list[DoneRow]], None],
    ) -> Shard:
        """The rows at positions `left` of the index, in the order that is best for the engine; `names` is what they
        were checked with."""
        order = left[
            plan_order(
                index.mix[left],
                index.cost[left],
                slots=self._options.max_loras_per_batch,
                max_num_seqs=self._engine.max_num_seqs,
            )
        ]
        job = Job(
            id=job_id,
            names=names,
            defaults=self._base.sampling_defaults,
            max_model_len=self._base.max_model_len,
            seed=self._options.seed,
        )
        return Shard(job, _read(source, index, order), emit)


def _read(source: Input, index: Index, order: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    for position in order:
        yield int(index.row[position]), source.read(int(index.offset[position]), int(index.length[position]))
