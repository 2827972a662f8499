"""What can be asked of a store's workers: as they published it, or as models that are opened here will be served."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loramill.producer.job_plan import AdapterFacts
from loramill.producer.offers import Able, Offer, able, choose, of_base, open_offer
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.manifest import Manifest
from loramill.store.contract import JobStore
from loramill.store.records import WorkerRecord
from loramill.store.wishes import wishes
from loramill.worker.settings import ModelOptions

if TYPE_CHECKING:
    from loramill.worker.models import Models


@dataclass(slots=True, frozen=True)
class Served:
    """What rows are checked against, and who is there to run them."""

    offer: Offer
    manifests: Sequence[Manifest]
    workers: Sequence[WorkerRecord]
    warnings: tuple[str, ...] = ()

    def able(self, shards: Iterable[tuple[str, ...]]) -> Able:
        """Who could run shards with these adapters."""
        return able(self.manifests, self.workers, shards, self.offer.base_id)

    def servers(self, kinds: Sequence[frozenset[str]]) -> list[str]:
        """Which of the running workers could run rows that need these adapters: the same text for the same ones."""
        ids = {worker.manifest for worker in self.workers if worker.base_id == self.offer.base_id}
        running = [manifest for manifest in self.manifests if manifest.id in ids]
        keys = [{offer.key for offer in manifest.adapters} for manifest in running]
        return ["".join("01"[kind <= served] for served in keys) for kind in kinds]


def published(store: JobStore, base: str | None) -> Served:
    """By the manifests in the store. Raises Failure as `choose`, or where no worker was ever there; StoreError."""
    manifests, workers = store.manifests(), store.workers()
    if not manifests:
        raise nobody_yet()
    unwanted = {wish.name for wish in wishes(store.shelf) if not wish.wanted}
    offer = open_offer(choose(manifests, workers, base), workers, store.get_blob, unwanted=unwanted)
    return Served(offer, manifests, workers, offer.warnings)


def nobody_yet() -> Failure:
    """Of a store where no worker ever was."""
    ways = "start one with `loramill worker`, or say what it will serve: --base-model and --adapter"
    return Failure(ExitCode.INPUT, f"no worker has told this store yet what it serves: {ways}")


def opened_here(options: ModelOptions, store: JobStore | None, *, publish: bool) -> Served:
    """By models that are opened here, without their weights; with `publish` their manifest is published, so that a job
    can be there before the first worker. Raises Failure, StoreError."""
    from loramill.worker.manifest import manifest_of
    from loramill.worker.models import open_models

    models = open_models(options)
    manifest, blobs = manifest_of(models, options, _dtype(models, options))
    if store is not None and publish:
        for digest, content in blobs.items():
            if not store.has_blob(digest):
                store.put_blob(content)
        store.publish(manifest)
    others = store.manifests() if store is not None else []
    workers = store.workers() if store is not None else []
    group = of_base(manifest, others)

    def blob(digest: str) -> bytes:
        return blobs[digest] if digest in blobs or store is None else store.get_blob(digest)

    offer = open_offer(group, workers, blob)
    return Served(offer, [manifest, *others], workers, (*models.warnings, *offer.warnings))


def served_by_own(models: Models, options: ModelOptions) -> Served:
    """By engines of this very process, which will open the same: nobody else is asked. Raises Failure."""
    from loramill.worker.manifest import manifest_of

    manifest, _ = manifest_of(models, options, _dtype(models, options))
    # A split may lead to one that cannot be served: no row of a job does, but the job's names have it.
    keys = dict.fromkeys(models.unusable, "") | {offer.name: offer.key for offer in manifest.adapters}
    facts = {offer.sha256: AdapterFacts(offer.rank, offer.alone is not None) for offer in manifest.adapters}
    slots = manifest.max_loras
    offer = Offer(manifest.base_id, models.names, models.prompter, keys, facts, slots, slots, models.warnings)
    return Served(offer, [manifest], [])


def _dtype(models: Models, options: ModelOptions) -> str:
    """What a worker computes in. Raises Failure (INPUT) where only the weights could tell."""
    config = json.loads(Path(models.base.path, "config.json").read_bytes())
    said = config.get("dtype") or config.get("torch_dtype")
    if options.dtype != "auto":
        return options.dtype
    if not isinstance(said, str):
        raise Failure(ExitCode.INPUT, f"{models.base.path}: its config.json names no dtype: give --dtype")
    return said
