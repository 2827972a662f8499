"""What the page shows of workers and adapters, from the store's data. Nothing is read here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loramill.producer.api.context import Caller
from loramill.schemas.manifest import Manifest
from loramill.store.records import Job, WorkerRecord
from loramill.worker.durations import in_words

SHOWN_ADAPTERS = 60


@dataclass(slots=True, frozen=True)
class WorkerView:
    """A worker."""

    id: str
    device: str
    state: str
    tone: str
    host: str
    base: str
    resident: tuple[str, ...]
    """Names of the adapters in its slots."""
    rows_done: int
    restarts: int
    up: str
    refused: Mapping[str, str]


@dataclass(slots=True, frozen=True)
class AdapterView:
    """An adapter that running workers serve."""

    name: str
    rank: int
    merged: bool
    resident: int
    """On how many workers it is in a slot."""
    served: int
    """By how many."""
    jobs: int
    """Open ones that name it."""
    rows: int
    """Answered since the workers started, as far as they say."""


def worker_views(
    workers: Iterable[WorkerRecord], manifests: Iterable[Manifest], now_ms: float, caller: Caller
) -> list[WorkerView]:
    """By id, with those of their adapters that the caller may use."""
    by_id = {manifest.id: manifest for manifest in manifests}
    views = []
    for worker in workers:
        manifest = by_id.get(worker.manifest)
        names = {offer.key: offer.name for offer in manifest.adapters} if manifest else {}
        views.append(
            WorkerView(
                id=worker.id,
                device=worker.device,
                state=worker.state,
                tone={"ready": "good", "draining": "warn"}.get(worker.state, "run"),
                host=worker.host,
                base=manifest.base if manifest else "?",
                resident=tuple(name for key in worker.resident if caller.may_use(name := names.get(key, key[:12]))),
                rows_done=worker.rows_done,
                restarts=worker.restarts,
                up=in_words((now_ms - worker.started_ms) / 1000),
                refused=worker.refused,
            )
        )
    return views


def adapter_views(
    workers: Sequence[WorkerRecord], manifests: Iterable[Manifest], open_jobs: Iterable[Job], caller: Caller
) -> list[AdapterView]:
    """Those that the caller may use: in use first, then those in slots, then by name."""
    by_id = {manifest.id: manifest for manifest in manifests}
    wanted = Counter(pinned.key for job in open_jobs for pinned in set(job.spec.names.adapters.values()))
    resident = Counter(key for worker in workers for key in set(worker.resident))
    served, offers = Counter[str](), {}
    rows = Counter[str]()
    for worker in workers:
        manifest = by_id.get(worker.manifest)
        for offer in manifest.adapters if manifest else ():
            served[offer.name] += 1
            offers[offer.name] = offer
        for name, counts in worker.stats.get("adapters", {}).items():
            rows[name] += counts.get("completed", 0)
    views = [
        AdapterView(
            name=name,
            rank=offer.rank,
            merged=offer.alone is not None,
            resident=resident[offer.key],
            served=served[name],
            jobs=wanted[offer.key],
            rows=rows[name],
        )
        for name, offer in offers.items()
        if caller.may_use(name)
    ]
    return sorted(views, key=lambda view: (not view.jobs, not view.resident, view.name))
