"""What the page shows, from the store's data: words, links, and what may be done. Nothing is read here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from loramill.producer.api.batch_book import Batch
from loramill.producer.api.context import Caller
from loramill.producer.status import Pace, done
from loramill.schemas.job import JobError, JobStatus
from loramill.schemas.manifest import Manifest
from loramill.store.records import Job, WorkerRecord
from loramill.worker.durations import in_words

SHOWN_ADAPTERS = 60
_TONES = {
    JobStatus.COMPLETED: "good",
    JobStatus.FAILED: "bad",
    JobStatus.CANCELLED: "rest",
    JobStatus.EXPIRED: "warn",
    JobStatus.CANCELLING: "rest",
}


@dataclass(slots=True, frozen=True)
class Action:
    """Something that a button does."""

    name: str
    """`cancel` or `retry`."""
    words: str
    url: str


@dataclass(slots=True, frozen=True)
class JobView:
    """A job, or a batch whose lines are being looked at, as a row of the table."""

    id: str
    input_name: str
    owner: str
    status: str
    tone: str
    is_open: bool
    created_ms: int
    never_run: int
    total: int = 0
    """0 while nobody knows."""
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ended_ms: int | None = None
    expires_ms: int | None = None
    took: str | None = None
    rows_per_s: float | None = None
    tokens_per_s: float | None = None
    eta: str | None = None
    retry_of: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    base: str = ""
    input_file: str | None = None
    """Where a batch's input is."""
    results: str | None = None
    """Where its answers are."""
    errors: str | None = None
    """Where its error lines are."""
    actions: tuple[Action, ...] = ()
    problems: tuple[JobError, ...] = ()
    """Of an input that was refused."""

    @property
    def name(self) -> str:
        """Its input's, without the folder that a command read it from."""
        return self.input_name.rstrip("/").rpartition("/")[2] or self.id

    @property
    def share(self) -> float | None:
        """Of its rows that are done; None while nobody knows how many there are."""
        return self.done / self.total if self.total else None


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


def may_see(caller: Caller, owner: str) -> bool:
    """Whether a caller may know that the job is there, and how it does."""
    return caller.operator or owner == caller.name


def may_read(caller: Caller, owner: str) -> bool:
    """Whether what its rows say is the caller's, or a command's whose operator the caller is."""
    return owner == caller.name or (caller.operator and not owner)


def job_view(job: Job, pace: Pace, caller: Caller) -> JobView:
    """A command's job."""
    spec, status = job.spec, job.status
    never_run = job.total - done(job) if status.ended else 0
    actions = list[Action]()
    if status is JobStatus.IN_PROGRESS:
        actions.append(Action("cancel", "Cancel", f"/jobs/{job.id}/cancel"))
    reads = may_read(caller, spec.owner)
    if reads and status.ended and status is not JobStatus.FAILED and job.failed + never_run:
        actions.append(_retry(f"/jobs/{job.id}/retry", never_run))
    return JobView(
        id=job.id,
        input_name=spec.input_name,
        owner=spec.owner,
        created_ms=job.created_ms,
        never_run=never_run,
        retry_of=spec.retry_of,
        results=f"/jobs/{job.id}/results" if reads and job.completed else None,
        errors=f"/jobs/{job.id}/errors" if reads and job.failed + never_run else None,
        actions=tuple(actions),
        problems=job.errors,
        **_of_status(status, job.failed),
        **_of_job(job, pace),
    )


def batch_view(batch: Batch, job: Job | None, pace: Pace, name: str, caller: Caller) -> JobView:
    """A batch; `job` is its own, None before its lines were looked at and once it was removed, `name` its input's."""
    data, status = batch.data, status_of_batch(batch, job)
    mine, path = batch.owner == caller.name, f"/v1/batches/{batch.id}"
    facts = _of_job(job, pace) if job else {}
    if batch.ended:
        counts = ("total", "failed", "prompt_tokens", "completion_tokens", "ended_ms")
        facts |= {count: getattr(data, count) for count in counts} | {"done": data.completed + data.failed}
    never_run = data.total - data.completed - data.failed if batch.ended else 0
    actions = list[Action]()
    if status in (JobStatus.VALIDATING, JobStatus.IN_PROGRESS) and (mine or job is not None):
        actions.append(Action("cancel", "Cancel", f"{path if mine else f'/jobs/{batch.id}'}/cancel"))
    if mine and batch.ended and status is not JobStatus.FAILED and data.failed + never_run:
        actions.append(_retry(f"{path}/retry", never_run))
    return JobView(
        id=batch.id,
        input_name=name,
        owner=batch.owner,
        created_ms=batch.record.created_ms,
        never_run=never_run,
        retry_of=data.retry_of,
        input_file=_content(data.input_file_id) if mine else None,
        results=_content(data.output_file_id) if mine else None,
        errors=_content(data.error_file_id) if mine else None,
        actions=tuple(actions),
        problems=data.errors,
        **_of_status(status, data.failed),
        **(facts | {"metadata": data.metadata or {}, "priority": data.priority}),
    )


def status_of_batch(batch: Batch, job: Job | None) -> JobStatus:
    """What its record and its job say together."""
    if batch.ended:
        return batch.data.status
    if job is None or job.status in (JobStatus.VALIDATING, JobStatus.FAILED):
        return JobStatus.CANCELLING if batch.data.cancelling_ms is not None else JobStatus.VALIDATING
    return JobStatus.FINALIZING if job.status.ended else job.status


def worker_views(workers: Iterable[WorkerRecord], manifests: Iterable[Manifest], now_ms: float) -> list[WorkerView]:
    """By device and id."""
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
                resident=tuple(names.get(key, key[:12]) for key in worker.resident),
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


def when(at_ms: int) -> str:
    """In full, the same for everybody: `2026-01-31 12:00:00 UTC`."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def iso(at_ms: int) -> str:
    """For machines."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")


def ago(at_ms: int, now_ms: float) -> str:
    """`4 m ago`: the largest unit alone."""
    passed_s = (now_ms - at_ms) / 1000
    if passed_s < 5:
        return "just now"
    count, unit = in_words(passed_s).split(" ")[:2]
    return f"{count} {unit} ago"


def short(number: float) -> str:
    """`950`, `12.4 k`, `3.1 M`: for places where the exact number is noise."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            by = 1e3 if unit == "k" else size
            return f"{number / by:.1f} {unit}"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def _of_status(status: JobStatus, failed: int) -> dict[str, Any]:
    words = "running" if status is JobStatus.IN_PROGRESS else str(status)
    tone = "warn" if status is JobStatus.COMPLETED and failed else _TONES.get(status, "run")
    return {"status": words, "tone": tone, "is_open": not status.ended}


def _of_job(job: Job, pace: Pace) -> dict[str, Any]:
    """What is the same whoever submitted it."""
    spec, staged = job.spec, job.status is JobStatus.VALIDATING
    ended_ms, accepted_ms = job.ended_ms, job.accepted_ms
    took = ended_ms is not None and accepted_ms is not None and in_words((ended_ms - accepted_ms) / 1000)
    return {
        "total": 0 if staged else job.total,
        "done": done(job),
        "failed": job.failed,
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "ended_ms": ended_ms,
        "expires_ms": None if job.status.ended else job.expires_ms,
        "took": took or None,
        "rows_per_s": pace.rows_per_s,
        "tokens_per_s": pace.tokens_per_s,
        "eta": in_words(pace.eta_s) if pace.eta_s is not None and job.status is JobStatus.IN_PROGRESS else None,
        "metadata": spec.metadata,
        "priority": spec.priority,
        "base": spec.names.base,
    }


def _retry(url: str, never_run: int) -> Action:
    return Action("retry", "Retry the rest" if never_run else "Retry failed", url)


def _content(file_id: str | None) -> str | None:
    return file_id and f"/v1/files/{file_id}/content"
