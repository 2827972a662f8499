"""What an engine child serves: the engine, and what jobs may name of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from loramill.schemas.job import JobSpec, Lane
from loramill.schemas.manifest import Manifest
from loramill.schemas.names import Named, Names
from loramill.schemas.prompt import Prompter
from loramill.worker.registry import find
from loramill.worker.request import EngineStats
from loramill.worker.settings import ModelOptions
from loramill.worker.shard import Job, RowEngine

if TYPE_CHECKING:
    from loramill.worker.models import Models


class ServedEngine(RowEngine, Protocol):
    """The part of worker.engine.Engine that is used."""

    device: str

    @property
    def resident(self) -> Sequence[str]: ...
    @property
    def stats(self) -> EngineStats: ...
    def register(self, adapter: Any) -> None: ...
    def forget(self, sha256: str) -> None: ...


class Offers(Protocol):
    """What is served beside the base; a change makes another one. Reads and checks files: for a thread beside the
    passes."""

    def adding(self, name: str, source: str | None, scale: float | None) -> Change:
        """One adapter more, or another one of that name; see `registry.find`. Raises ValueError with every reason
        against it, Failure."""
        ...

    def removing(self, name: str) -> Change:
        """Without that adapter. Raises ValueError if it has to stay."""
        ...


@dataclass(slots=True, frozen=True)
class Change:
    """Other adapters than before, ready to be taken over."""

    offers: Offers
    manifest: Manifest
    blobs: Mapping[str, bytes]
    adapters: Mapping[str, Named]
    """By key."""
    opened: Any = None
    """What the engine has to know before."""


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
    """By key: those of the manifest, and those that shards of before may still need."""
    offers: Offers

    def taking(self, change: Change) -> Served:
        """The same after a change. Raises ValueError if the engine cannot hold the adapter."""
        if change.opened is not None:
            self.engine.register(change.opened)
        known = {**self.adapters, **change.adapters}
        return replace(self, manifest=change.manifest, blobs=change.blobs, adapters=known, offers=change.offers)

    def dropping(self, key: str) -> Served:
        """The same without an adapter that no shard needs any more; the engine forgets its content. One that the
        manifest has (again) stays, and so does one of which rows are left."""
        left = {other: named for other, named in self.adapters.items() if other != key}
        if len(left) == len(self.adapters) or any(offer.key == key for offer in self.manifest.adapters):
            return self
        sha256 = self.adapters[key].sha256
        if all(named.sha256 != sha256 for named in left.values()):
            try:
                self.engine.forget(sha256)
            except ValueError:
                return self
        return replace(self, adapters=left)

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
    from loramill.worker.models import open_models

    silence_libraries()
    models = open_models(options)
    engine = load_engine(models, options, longest_row=options.longest_row)
    first = OpenedHere(models, options, engine.dtype).change()
    return Served(engine, first.manifest, first.blobs, models.prompter, first.adapters, first.offers)


@dataclass(slots=True, frozen=True)
class OpenedHere:
    """Offers of models that this process has opened."""

    models: Models
    options: ModelOptions
    dtype: str
    """What is computed in."""

    def adding(self, name: str, source: str | None, scale: float | None) -> Change:
        models, opened = self.models.adding(name, find(self.options, name, source), scale)
        self._refuse_pinned(name, opened.named.sha256)
        return replace(self, models=models).change(opened.adapter)

    def removing(self, name: str) -> Change:
        self._refuse_pinned(name, None)
        return replace(self, models=self.models.without_adapter(name)).change()

    def change(self, opened: Any = None) -> Change:
        """What these models come to; `opened` is what came last."""
        from loramill.worker.manifest import manifest_of

        manifest, blobs = manifest_of(self.models, self.options, self.dtype)
        adapters = {offer.key: self.models.names.adapters[offer.name] for offer in manifest.adapters}
        return Change(self, manifest, blobs, adapters, opened)

    def _refuse_pinned(self, name: str, sha256: str | None) -> None:
        if name in self.options.pinned and self.models.names.adapters[name].sha256 != sha256:
            raise ValueError("a slot is kept for it (--pin): start the worker without that, or with the other one")
