"""Which adapters there are, who serves them, and what came of operators' wishes about them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from loramill.producer.offers import together
from loramill.schemas.adapter_objects import AdapterObject, AdapterRows
from loramill.schemas.manifest import AdapterOffer, Manifest
from loramill.store.contract import JobStore
from loramill.store.records import WorkerRecord
from loramill.store.wishes import Wish, wishes

ANSWER_S = 30.0
"""How long whoever said a wish waits for workers: they look each second, and large adapters take seconds to read."""
LOOK_S = 0.25


def check_source(source: str) -> str:
    """The path, if it is one that can lead to an adapter: relative, and down. Raises ValueError."""
    path = PurePosixPath(source)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in source:
        raise ValueError(f"{source!r} is not a path in the workers' --adapters-dir: relative, without '..'")
    return source


@dataclass(slots=True, frozen=True)
class Heard:
    """What the running workers made of a wish, by their ids."""

    heeded: tuple[str, ...]
    refused: Mapping[str, str]
    """And why."""
    waiting: tuple[str, ...]

    @property
    def why(self) -> str:
        """Every reason once, with who gave it."""
        reasons: dict[str, list[str]] = {}
        for worker, why in self.refused.items():
            reasons.setdefault(why, []).append(worker)
        return "; ".join(f"{', '.join(workers)}: {why}" for why, workers in reasons.items())


def heard(wish: Wish, workers: Sequence[WorkerRecord]) -> Heard:
    """`workers`: those of the bases that it is about. One that loads its base, or ends, is not waited for."""
    ready = [worker for worker in workers if worker.state == "ready"]
    answered = [worker for worker in ready if worker.answered.get(wish.name) == wish.stamp]
    refused = {worker.id: worker.refused[wish.name] for worker in answered if wish.name in worker.refused}
    return Heard(
        tuple(worker.id for worker in answered if worker.id not in refused),
        refused,
        tuple(worker.id for worker in ready if worker not in answered),
    )


@dataclass(slots=True, frozen=True)
class Catalogue:
    """Everything that is known of adapters at one moment."""

    manifests: Sequence[Manifest]
    """The latest published first."""
    workers: Sequence[WorkerRecord]
    """Of those manifests."""
    wishes: Mapping[str, Wish]

    @property
    def adapters(self) -> dict[str, AdapterOffer | None]:
        """By name, in order; None is one that no worker has opened yet. Without those that operators have unloaded."""
        offers: dict[str, AdapterOffer | None] = {name: None for name, wish in self.wishes.items() if wish.wanted}
        offers.update(together(self.manifests).adapters)
        return {name: offers[name] for name in sorted(offers) if self._is_wanted(name)}

    def objects(self, names: Collection[str], *, operator: bool) -> Iterator[AdapterObject]:
        """Those of `names` that there are; for an operator with what went wrong."""
        served = self._served()
        for name, offer in self.adapters.items():
            if name in names:
                yield self._object(name, offer, served, operator=operator)

    def leading_to(self, name: str) -> str | None:
        """What keeps running workers from letting go of an adapter: an alias or a route of theirs."""
        running = {worker.manifest for worker in self.workers}
        for manifest in self.manifests:
            if manifest.id in running:
                leads = [f"the alias `{alias}`" for alias, to in manifest.aliases.items() if name in to]
                leads += [f"the route by `{by}`" for by, route in manifest.routes.items() if name in route.values()]
                if leads:
                    return leads[0]
        return None

    def _is_wanted(self, name: str) -> bool:
        wish = self.wishes.get(name)
        return wish is None or wish.wanted

    def _served(self) -> dict[str, dict[str, str]]:
        """Worker -> name -> key."""
        by_id = {manifest.id: {o.name: o.key for o in manifest.adapters} for manifest in self.manifests}
        return {worker.id: by_id.get(worker.manifest, {}) for worker in self.workers}

    def _object(
        self, name: str, offer: AdapterOffer | None, served: Mapping[str, Mapping[str, str]], *, operator: bool
    ) -> AdapterObject:
        wish = self.wishes.get(name)
        said = heard(wish, self.workers) if wish else None
        serving = [id for id, keys in served.items() if offer is not None and keys.get(name) == offer.key]
        refused = dict(said.refused) if said else {}
        scale = wish.scale if wish and wish.scale is not None else 1.0
        return AdapterObject(
            id=name,
            status="served" if serving else "refused" if said and refused and not said.waiting else "waiting",
            sha256=offer.sha256 if offer else None,
            rank=offer.rank if offer else None,
            targets=list(offer.targets) if offer else [],
            scale=offer.scale if offer else scale,
            alone=offer.alone if offer else None,
            workers=serving,
            resident=[one.id for one in self.workers if one.id in serving and offer and offer.key in one.resident],
            rows=rows_of(name, self.workers),
            source=wish.source if wish and operator else None,
            refused=refused if operator else {},
        )


def look(store: JobStore, base: str | None) -> Catalogue:
    """What there is of the base that is called `base`, or of all. Raises StoreError."""
    manifests = [manifest for manifest in store.manifests() if base in (None, manifest.base)]
    ids = {manifest.id for manifest in manifests}
    workers = [worker for worker in store.workers() if worker.manifest in ids]
    return Catalogue(manifests, workers, {wish.name: wish for wish in wishes(store.shelf)})


def workers_of(store: JobStore, base: str | None) -> Sequence[WorkerRecord]:
    """Those that serve it, or all. Raises StoreError."""
    return store.workers() if base is None else look(store, base).workers


def rows_of(name: str, workers: Sequence[WorkerRecord]) -> AdapterRows:
    """What these workers did with an adapter since they started."""
    said = [worker.stats.get("adapters", {}).get(name, {}) for worker in workers]
    return AdapterRows(**{field: sum(one.get(field, 0) for one in said) for field in AdapterRows.model_fields})
