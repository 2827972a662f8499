"""The engine with its base loaded, as settings say."""

from __future__ import annotations

from collections.abc import Iterable

from loramill.schemas.errors import did_you_mean
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.adapters import AdapterError
from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.model import ModelError
from loramill.worker.models import Models
from loramill.worker.settings import ModelOptions
from loramill.worker.slot_count import LEAST
from loramill.worker.slots import Eviction


def load_engine(
    models: Models,
    options: ModelOptions,
    *,
    longest_row: int | None = None,
    adapters: Iterable[str] | None = None,
) -> Engine:
    """Loads the weights. `longest_row` in tokens, if it is known, saves cache memory; `adapters` are the names that
    rows can come to, all of them by default. Raises Failure (USAGE for --pin, otherwise INPUT)."""
    registered = {name: models.adapters[name] for name in (models.adapters if adapters is None else adapters)}
    pinned = pinned_by(models, options)
    known = [*registered.values(), *(a for a in models.adapters.values() if a.sha256 in pinned)]
    few = max(LEAST, len({adapter.sha256 for adapter in known}))
    config = EngineConfig(
        models.base,
        dtype=options.dtype,
        device=options.device,
        max_loras_per_batch=options.max_loras_per_batch or min(models.slots, few),
        max_loaded_loras=options.max_loaded_loras,
        lora_host_bytes=options.lora_host_bytes,
        lora_eviction=Eviction(options.lora_eviction_policy),
        pinned=pinned,
        merging=options.lora_mode != "dynamic",
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_cache_memory=options.kv_cache_memory,
        prefix_sharing=not options.no_prefix_sharing,
        max_row_tokens=longest_row,
    )
    try:
        engine = Engine(config, known)
        if options.preload:
            engine.preload()
    except (ModelError, AdapterError, ValueError) as error:
        raise Failure(ExitCode.INPUT, str(error)) from error
    return engine


def pinned_by(models: Models, options: ModelOptions) -> frozenset[str]:
    """Content hashes of --pin. Raises Failure (USAGE)."""
    for name in options.pinned:
        if name not in models.adapters:
            raise Failure(
                ExitCode.USAGE, f"--pin {name}: no adapter has that name{did_you_mean(name, models.adapters)}"
            )
        if reasons := models.adapters[name].static_only:
            raise Failure(ExitCode.USAGE, f"--pin {name}: it can only be served merged: {'; '.join(reasons)}")
    pinned = frozenset(models.adapters[name].sha256 for name in options.pinned)
    others = {adapter.sha256 for adapter in models.adapters.values()} - pinned
    if len(pinned) > models.slots - bool(others):
        slots = f"--max-loras-per-batch {models.slots}"
        raise Failure(ExitCode.USAGE, f"--pin: {len(pinned)} adapters leave no slot of {slots} for the others")
    return pinned
