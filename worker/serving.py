"""What an engine child serves: the engine, and what jobs may name of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from loramill.schemas.job import JobSpec, Lane
from loramill.schemas.manifest import Manifest
from loramill.schemas.names import Named, Names
from loramill.schemas.prompt import Prompter
from loramill.worker.request import EngineStats
from loramill.worker.settings import ModelOptions
from loramill.worker.shard import Job, RowEngine


class ServedEngine(RowEngine, Protocol):
    """The part of worker.engine.Engine that is used."""

    device: str

    @property
    def resident(self) -> Sequence[str]: ...
    @property
    def stats(self) -> EngineStats: ...


@dataclass(slots=True, frozen=True)
class Served:
    """A loaded engine with all that rows need beside it."""

    engine: ServedEngine
    manifest: Manifest
    blobs: Mapping[str, bytes]
    """The files that the manifest speaks of, by sha256."""
    prompter: Prompter
    """The base's."""
    adapters: Mapping[str, Named]
    """By key."""

    def job(self, spec: JobSpec) -> Job:
        """The job's rows resolve by the job's own names: what they stood for when it was checked.

        Raises NamesError for names that contradict each other.
        """
        # The store gives no shard to a worker that lacks its adapters. Should one come all the same, the engine knows
        # no such content and refuses the row: it is never answered by the base.
        known = {
            name: replace(self.adapters.get(pinned.key, Named(f"of key {pinned.key}")), scale=pinned.scale)
            for name, pinned in spec.names.adapters.items()
        }
        names = Names(spec.names.base, known, spec.names.aliases, spec.names.routes)
        return Job(
            spec.id,
            names,
            self.manifest.sampling_defaults,
            self.manifest.max_model_len,
            spec.seed,
            spec.dedupe,
            urgent=spec.lane is Lane.ASK,
            stream=spec.stream,
        )

    @property
    def alone(self) -> frozenset[str]:
        """Contents that can only be served merged."""
        return frozenset(named.sha256 for named in self.adapters.values() if named.alone)

    @property
    def resident(self) -> list[str]:
        """Keys of the adapters whose rows need no load."""
        held = set(self.engine.resident)
        return [key for key, named in self.adapters.items() if named.sha256 in held]


def open_served(options: ModelOptions) -> Served:
    """Opens the models and loads the weights. Raises Failure."""
    from loramill.worker.base_files import silence_libraries
    from loramill.worker.loading import load_engine  # torch comes with it
    from loramill.worker.manifest import manifest_of
    from loramill.worker.models import open_models

    silence_libraries()
    models = open_models(options)
    engine = load_engine(models, options, longest_row=options.longest_row)
    manifest, blobs = manifest_of(models, options, engine.dtype)
    adapters = {offer.key: models.names.adapters[offer.name] for offer in manifest.adapters}
    return Served(engine, manifest, blobs, models.prompter, adapters)
