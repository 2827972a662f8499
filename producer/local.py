"""The engine in this process. The only module of the producer that knows the worker."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loramill.producer import base as bases
from loramill.producer.failures import ExitCode, Failure
from loramill.producer.index import Index
from loramill.producer.options import ModelOptions
from loramill.producer.plan import plan_order
from loramill.producer.reader import Input
from loramill.producer.registry import find_adapters
from loramill.schemas.prompt import Limits, Prompter
from loramill.store.journal import DoneRow
from loramill.worker.adapters import Adapter, AdapterError, open_adapter
from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.model import BaseInfo, ModelError, describe_base
from loramill.worker.request import EngineStats
from loramill.worker.shard_runner import Job, ShardRunner
from loramill.worker.shard_runner import Shard as Shard  # the Python API's name for it


@dataclass(slots=True, frozen=True)
class Models:
    """What rows can ask for: checked, and no weight of the base loaded."""

    base: BaseInfo
    base_name: str
    adapters: Mapping[str, Adapter]
    unusable: Mapping[str, list[str]]
    """Adapters of --adapters-dir that cannot be served, and why: it matters only to rows that name one."""
    prompter: Prompter
    parts: Mapping[str, str]
    """What decides the answers, as a person calls it: the base, its tokenizer, each adapter -> its content's hash."""

    @property
    def names(self) -> list[str]:
        """Every adapter's name, as `Index.adapter` counts them."""
        return [*self.adapters, *self.unusable]

    def named_by(self, index: Index) -> list[str]:
        """The adapters that the rows name."""
        names = self.names
        return [names[position] for position in np.unique(index.adapter) if position >= 0]


def open_models(options: ModelOptions) -> Models:
    """Finds and checks the base and every adapter. Raises Failure with all that is wrong with the adapters at once."""
    template = bases.read_template(options.chat_template) if options.chat_template else None
    folders = find_adapters(options.adapters, options.adapters_dir)
    path = bases.locate_base(options.base_model)
    try:
        base = describe_base(str(path), options.max_model_len)
    except ModelError as error:
        raise Failure(ExitCode.INPUT, str(error)) from error
    adapters: dict[str, Adapter] = {}
    templates: dict[str, str] = {}
    problems: dict[str, list[str]] = {name: [why] for name, why in folders.refused.items()}
    for name, folder in folders.all().items():
        try:
            adapters[name] = _open(folder, base, options)
            if own := bases.adapter_template(folder):
                templates[name] = own
        except (AdapterError, ValueError) as error:
            problems[name] = error.problems if isinstance(error, AdapterError) else [str(error)]
            adapters.pop(name, None)
    refuse_adapters({name: problems[name] for name in folders.given if name in problems})
    limits = Limits(base.max_model_len, base.vocab_size)
    parts = {
        "base model": base.fingerprint,
        "the base's generation config": _sha256(repr((sorted(base.sampling_defaults.items()), base.eos_token_ids))),
        "the base's tokenizer": bases.tokenizer_sha256(path),
        "--chat-template": _sha256(template or ""),
        "--max-model-len": str(base.max_model_len),
        "--dtype": options.dtype,
        "--seed": str(options.seed),
    }
    parts |= {_part(name): _sha256(adapter.sha256 + templates.get(name, "")) for name, adapter in adapters.items()}
    return Models(
        base,
        options.base_name or bases.base_name_of(options.base_model),
        adapters,
        problems,
        bases.load_prompter(path, limits, chat_template=template, adapter_templates=templates),
        parts,
    )


def identity_of(models: Models, named: Iterable[str]) -> dict[str, str]:
    """`parts`, with no adapter but those `named`."""
    others = {_part(name) for name in models.adapters} - {_part(name) for name in named}
    return {part: value for part, value in models.parts.items() if part not in others}


def refuse_adapters(problems: Mapping[str, list[str]]) -> None:
    """Raises Failure (INPUT) with every problem of these adapters, if there are any."""
    if problems:
        raise Failure(ExitCode.INPUT, *(f"adapter `{name}`: {why}" for name, all_ in problems.items() for why in all_))


class LocalEngine:
    """The loaded base with its adapters, and the runner that feeds it."""

    def __init__(self, models: Models, options: ModelOptions, *, longest_row: int | None = None) -> None:
        """Loads the weights. `longest_row` in tokens, if it is known, saves cache memory. Raises Failure (INPUT)."""
        self._models = models
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

    def shard(
        self,
        source: Input,
        index: Index,
        left: NDArray[np.int64],
        *,
        job_id: str,
        emit: Callable[[list[DoneRow]], None],
    ) -> Shard:
        """The rows at positions `left` of the index, in the order that is best for the engine."""
        order = left[
            plan_order(
                index.adapter[left],
                index.cost[left],
                slots=self._options.max_loras_per_batch,
                max_num_seqs=self._engine.max_num_seqs,
            )
        ]
        job = Job(
            id=job_id,
            base_name=self._models.base_name,
            adapters={name: adapter.sha256 for name, adapter in self._models.adapters.items()},
            defaults=self._models.base.sampling_defaults,
            max_model_len=self._models.base.max_model_len,
            seed=self._options.seed,
        )
        return Shard(job, _read(source, index, order), emit)


def _read(source: Input, index: Index, order: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    for position in order:
        yield int(index.row[position]), source.read(int(index.offset[position]), int(index.length[position]))


def _open(folder: Path, base: BaseInfo, options: ModelOptions) -> Adapter:
    return open_adapter(str(folder), base, max_rank=options.max_lora_rank, allow_noop=options.allow_noop_adapters)


def _part(adapter: str) -> str:
    return f"adapter `{adapter}`"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
