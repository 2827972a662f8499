"""The contract in dictionaries: what every store must come to. One process, one thread, a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loramill.schemas.job import JobError, JobSpec, JobStatus, Lane
from loramill.schemas.manifest import Manifest
from loramill.store.contract import (
    AFFINITY_S,
    ASK_RETENTION_S,
    HEAD,
    LEASE_S,
    PER_ADAPTER,
    RETENTION_S,
    STAGING_S,
    WORKER_TTL_S,
    JobStore,
    rank_s,
)
from loramill.store.errors import Fenced, JobNotFound, StoreError, StoreLost, StoreRefused
from loramill.store.packing import Chunk
from loramill.store.records import (
    Backlog,
    Claim,
    Committed,
    Event,
    Job,
    Lease,
    NewShard,
    Reaped,
    ShardInfo,
    ShardState,
    StoreInfo,
    Verdict,
    WorkerRecord,
)
from tests.contract.shelf_model import ShelfModel

ENDING = {JobStatus.CANCELLING: JobStatus.CANCELLED, JobStatus.FINALIZING: JobStatus.EXPIRED}
"""The states of a job whose shards are only let go of -> what it comes to."""


@dataclass(slots=True)
class _Shard:
    number: int
    rows: int
    adapters: tuple[str, ...]
    kept: bytes
    state: ShardState = ShardState.STAGED
    done: set[int] = field(default_factory=set)
    suspects: dict[int, int] = field(default_factory=dict)
    attempts: int = 0
    worker: str | None = None
    counter: int = 0
    deadline_ms: int = 0


@dataclass(slots=True)
class _Job:
    spec: JobSpec
    created_ms: int
    touched_ms: int
    """When something was last staged."""
    status: JobStatus = JobStatus.VALIDATING
    accepted_ms: int | None = None
    expires_ms: int | None = None
    ended_ms: int | None = None
    cancelled_ms: int | None = None
    errors: tuple[JobError, ...] = ()
    shards: dict[int, _Shard] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def rank(self) -> float:
        assert self.accepted_ms is not None
        expires_s = None if self.expires_ms is None else self.expires_ms / 1000
        return rank_s(self.accepted_ms / 1000, self.spec.priority, expires_s)


class Model(JobStore):
    """A store that lives as long as the object."""

    def __init__(
        self, clock: Callable[[], float], *, lease_s: float = LEASE_S, retention_s: float = RETENTION_S
    ) -> None:
        """`clock`: seconds since 1970."""
        super().__init__(None)
        self._clock, self._lease_s, self._retention_s = clock, lease_s, retention_s
        self._jobs: dict[str, _Job] = {}
        self._manifests: dict[str, Manifest] = {}
        self._workers: dict[str, tuple[int, WorkerRecord]] = {}
        self._blobs: dict[str, bytes] = {}
        self._leases = self._expired = 0
        self._shelf = ShelfModel(lambda: self._now)

    # Submitting.

    def stage(self, spec: JobSpec) -> None:
        if spec.id in self._jobs:
            raise StoreRefused(spec.id)
        self._jobs[spec.id] = _Job(spec, self._now, self._now)

    def _add_shard(self, job_id: str, shard: NewShard, kept: bytes) -> None:
        job = self._staged(job_id)
        job.touched_ms = self._now
        job.shards[shard.number] = _Shard(shard.number, len(shard.rows), shard.adapters, kept)
        job.total += len(shard.rows)

    def _add_results(self, job_id: str, chunk: Chunk, entry: bytes) -> None:
        job = self._staged(job_id)
        job.touched_ms = self._now
        job.total += len(chunk)
        self._count(job, chunk, set(), entry)

    def accept(self, job_id: str) -> Job:
        if job_id in self._jobs and self._jobs[job_id].accepted_ms is not None:
            return self.job(job_id)
        job = self._staged(job_id)
        job.status, job.accepted_ms = JobStatus.IN_PROGRESS, self._now
        if job.spec.window_s is not None:
            job.expires_ms = self._now + round(job.spec.window_s * 1000)
        for shard in job.shards.values():
            shard.state = ShardState.READY
        self._settle(job, "accepted")
        return self.job(job_id)

    def refuse(self, job_id: str, errors: Sequence[JobError]) -> Job:
        job = self._staged(job_id)
        job.errors = tuple(errors)
        self._drop(job)
        self._end(job, JobStatus.FAILED)
        return self.job(job_id)

    # Looking.

    def job(self, job_id: str) -> Job:
        job = self._found(job_id)
        done = sum(shard.state is ShardState.DONE for shard in job.shards.values())
        return Job(
            job.spec, job.status, job.total, job.completed, job.failed, job.prompt_tokens, job.completion_tokens,
            len(job.shards), done, len(job.chunks), job.created_ms, job.accepted_ms, job.expires_ms, job.ended_ms,
            job.cancelled_ms, job.errors,
        )  # fmt: skip

    def jobs(self, *, after: str | None = None, limit: int = 20) -> list[Job]:
        newest = [job_id for job_id, job in reversed(self._jobs.items()) if job.spec.lane is Lane.BULK]
        if after is not None:
            if after not in newest:
                raise JobNotFound(after)
            newest = newest[newest.index(after) + 1 :]
        return [self.job(job_id) for job_id in newest[:limit]]

    def shards(self, job_id: str) -> list[ShardInfo]:
        return [
            ShardInfo(s.number, s.state, s.rows, len(s.done), s.adapters, s.attempts, s.worker, dict(s.suspects))
            for _, s in sorted(self._found(job_id).shards.items())
        ]

    def events(self, job_id: str, after: int = 0) -> list[Event]:
        return self._found(job_id).events[after:]

    def _results(self, job_id: str, start: int, limit: int) -> list[bytes]:
        return self._found(job_id).chunks[start : start + limit]

    def _shard_kept(self, job_id: str, number: int) -> bytes:
        return self._found(job_id).shards[number].kept

    # Ending.

    def cancel(self, job_id: str) -> Job:
        job = self._found(job_id)
        if not job.status.ended and job.status not in ENDING:
            job.cancelled_ms = self._now
            job.status = JobStatus.CANCELLING
            self._drop(job)
            self._settle(job, "cancelling")
        return self.job(job_id)

    def _remove(self, job_id: str, *, only_staged: bool) -> None:
        if only_staged:
            if job_id in self._jobs and self._jobs[job_id].status is JobStatus.VALIDATING:
                del self._jobs[job_id]
        elif not self._found(job_id).status.ended:
            raise StoreRefused(job_id)
        else:
            del self._jobs[job_id]

    # Working.

    def claim(
        self, worker: str, manifest: str, resident: Sequence[str] = (), *, lane: Lane = Lane.BULK
    ) -> Claim | None:
        if manifest not in self._manifests:
            raise StoreLost(f"the manifest {manifest} is not there")
        serves, slots = self._manifests[manifest], set(resident)
        keys = {offer.key for offer in serves.adapters}
        suiting = sorted(
            (job.rank, job.spec.id, shard.number, shard)
            for job in self._jobs.values()
            if job.accepted_ms is not None and job.spec.base_id == serves.base_id and job.spec.lane is lane
            for shard in job.shards.values()
            if shard.state is ShardState.READY
            and set(shard.adapters) <= keys
            and len(shard.adapters) <= serves.max_loras
        )
        looked_at = suiting[:HEAD]
        for key in slots:
            looked_at += [place for place in suiting if key in place[3].adapters][:PER_ADAPTER]
        if not looked_at:
            return None
        _, job_id, _, chosen = min(looked_at, key=lambda place: (place[0] - AFFINITY_S * share(place[3], slots), place))
        return self._lease(worker, job_id, chosen)

    def reclaim(self, worker: str, lease: Lease) -> Claim | None:
        shard = self._shard(lease)
        if shard is None:
            return None
        if shard.state is ShardState.LEASED and self._now > shard.deadline_ms:
            shard.attempts += 1
        elif shard.state is not ShardState.READY:
            return None
        return self._lease(worker, lease.job, shard)

    def pulse(self, leases: Sequence[Lease], *, renew: bool) -> list[Verdict]:
        return [self._pulse(lease, renew) for lease in leases]

    def _pulse(self, lease: Lease, renew: bool) -> Verdict:
        shard = self._held(lease)
        if shard is None:
            return Verdict.FENCED
        if renew:
            shard.deadline_ms = self._now + round(self._lease_s * 1000)
        return Verdict.OVER if self._jobs[lease.job].status in ENDING else Verdict.HELD

    def _commit(self, lease: Lease, chunk: Chunk, entry: bytes) -> Committed:
        shard = self._held_or_fenced(lease)
        job = self._jobs[lease.job]
        new = self._count(job, chunk, shard.done, entry)
        if len(shard.done) == shard.rows:
            shard.state, shard.worker = ShardState.DONE, None
            self._settle(job, f"shard {shard.number} done")
        return Committed(new, shard.state is ShardState.DONE)

    def strike(self, lease: Lease, position: int) -> int:
        shard = self._held_or_fenced(lease)
        shard.suspects[position] = shard.suspects.get(position, 0) + 1
        return shard.suspects[position]

    def release(self, lease: Lease, *, suspects: Iterable[int] = ()) -> None:
        shard = self._held(lease)
        if shard is not None:
            shard.suspects = dict.fromkeys(suspects, 0) | shard.suspects
            self._give_back(self._jobs[lease.job], shard)

    def reap(self) -> Reaped:
        leases = expired = abandoned = purged = 0
        for job_id, job in list(self._jobs.items()):
            if job.status is JobStatus.VALIDATING and self._now >= job.touched_ms + round(STAGING_S * 1000):
                del self._jobs[job_id]
                abandoned += 1
            elif job.ended_ms is not None and self._now >= job.ended_ms + round(self._kept_s(job) * 1000):
                del self._jobs[job_id]
                purged += 1
            elif job.accepted_ms is not None:
                if job.status is JobStatus.IN_PROGRESS and job.expires_ms is not None and self._now >= job.expires_ms:
                    expired += 1
                    job.status = JobStatus.FINALIZING
                    self._drop(job)
                    self._settle(job, "finalizing")
                for shard in job.shards.values():
                    if shard.state is ShardState.LEASED and self._now > shard.deadline_ms:
                        leases += 1
                        shard.attempts += 1
                        self._give_back(job, shard)
        self._expired += leases
        return Reaped(leases, expired, abandoned, purged)

    def ready(self) -> Mapping[str, int]:
        return {base_id: waiting.shards for base_id, waiting in self.backlog().items()}

    def backlog(self) -> Mapping[str, Backlog]:
        found: dict[str, Backlog] = {}
        for job in self._jobs.values():
            waiting = [shard for shard in job.shards.values() if shard.state is ShardState.READY]
            if waiting and job.spec.lane is Lane.BULK:
                assert job.accepted_ms is not None
                had = found.get(job.spec.base_id, Backlog(0, 0, job.accepted_ms))
                rows = sum(shard.rows - len(shard.done) for shard in waiting)
                oldest_ms = min(had.oldest_ms, job.accepted_ms)
                found[job.spec.base_id] = Backlog(had.shards + len(waiting), had.rows + rows, oldest_ms)
        return found

    # Who serves what.

    def publish(self, manifest: Manifest) -> None:
        self._manifests.pop(manifest.id, None)
        self._manifests[manifest.id] = manifest

    def manifests(self) -> list[Manifest]:
        return list(reversed(self._manifests.values()))

    def hello(self, worker: WorkerRecord) -> None:
        self._workers[worker.id] = (self._now, worker)

    def goodbye(self, worker: str) -> None:
        self._workers.pop(worker, None)

    def workers(self) -> list[WorkerRecord]:
        known = sorted(self._workers.items())
        return [record for _, (heard, record) in known if self._now <= heard + round(WORKER_TTL_S * 1000)]

    def _put_blob(self, digest: str, data: bytes) -> None:
        self._blobs[digest] = data

    def get_blob(self, digest: str) -> bytes:
        if digest not in self._blobs:
            raise StoreError(digest)
        return self._blobs[digest]

    def has_blob(self, digest: str) -> bool:
        return digest in self._blobs

    # The store itself.

    @property
    def shelf(self) -> ShelfModel:
        return self._shelf

    def info(self) -> StoreInfo:
        going = [job for job in self._jobs.values() if job.accepted_ms is not None and job.ended_ms is None]
        pending = sum(job.total - job.completed - job.failed for job in going)
        return StoreInfo("model:", "model", "model", False, 0, None, pending, (), self._expired)

    def close(self) -> None:
        pass

    def undone(self, job_id: str, shard: ShardInfo) -> dict[int, int]:
        """The suspects among a shard's rows that have no result."""
        done = self._jobs[job_id].shards[shard.number].done
        return {position: lone for position, lone in shard.suspects.items() if position not in done}

    # What the above share.

    @property
    def _now(self) -> int:
        return round(self._clock() * 1000)

    def _kept_s(self, job: _Job) -> float:
        return self._retention_s if job.spec.lane is Lane.BULK else min(self._retention_s, ASK_RETENTION_S)

    def _found(self, job_id: str) -> _Job:
        if job_id not in self._jobs:
            raise JobNotFound(job_id)
        return self._jobs[job_id]

    def _staged(self, job_id: str) -> _Job:
        job = self._found(job_id)
        if job.status is not JobStatus.VALIDATING:
            raise JobNotFound(job_id)
        return job

    def _shard(self, lease: Lease) -> _Shard | None:
        job = self._jobs.get(lease.job)
        return None if job is None else job.shards.get(lease.shard)

    def _held(self, lease: Lease) -> _Shard | None:
        shard = self._shard(lease)
        held = shard is not None and shard.state is ShardState.LEASED and shard.counter == lease.counter
        return shard if held and self._now <= shard.deadline_ms else None

    def _held_or_fenced(self, lease: Lease) -> _Shard:
        shard = self._held(lease)
        if shard is None:
            raise Fenced(lease.token)
        return shard

    def _lease(self, worker: str, job_id: str, shard: _Shard) -> Claim:
        self._leases += 1
        shard.state, shard.worker, shard.counter = ShardState.LEASED, worker, self._leases
        shard.deadline_ms = self._now + round(self._lease_s * 1000)
        lease = Lease(job_id, shard.number, 1, self._leases, self._lease_s)
        done = bytearray((shard.rows + 7) // 8)
        for position in shard.done:
            done[position >> 3] |= 0x80 >> (position & 7)
        return Claim(lease, shard.rows, shard.adapters, bytes(done), dict(shard.suspects), shard.attempts)

    def _count(self, job: _Job, chunk: Chunk, done: set[int], entry: bytes) -> int:
        """Takes up the rows that are new; how many there were."""
        before = len(done)
        for one in chunk.index:
            if int(one["position"]) not in done:
                done.add(int(one["position"]))
                job.failed += bool(one["failed"])
                job.completed += not one["failed"]
                job.prompt_tokens += int(one["prompt_tokens"])
                job.completion_tokens += int(one["completion_tokens"])
        if len(done) > before:
            job.chunks.append(entry)
        return len(done) - before

    def _give_back(self, job: _Job, shard: _Shard) -> None:
        shard.worker = None
        shard.state = ShardState.DROPPED if job.status in ENDING else ShardState.READY
        self._settle(job, f"shard {shard.number} given back")

    def _drop(self, job: _Job) -> None:
        for shard in job.shards.values():
            if shard.state in (ShardState.STAGED, ShardState.READY):
                shard.state = ShardState.DROPPED

    def _settle(self, job: _Job, what: str) -> None:
        """Notes what happened, and ends the job if that was the last thing to happen."""
        self._note(job, what)
        states = {shard.state for shard in job.shards.values()}
        if job.status in ENDING:
            if ShardState.LEASED not in states:
                self._end(job, ENDING[job.status])
        elif states <= {ShardState.DONE}:
            self._end(job, JobStatus.COMPLETED)

    def _end(self, job: _Job, status: JobStatus) -> None:
        job.status, job.ended_ms = status, self._now
        self._note(job, status)

    def _note(self, job: _Job, what: str) -> None:
        job.events.append(Event(len(job.events) + 1, self._now, what))


def share(shard: _Shard, resident: set[str]) -> float:
    """The part of a shard's adapters that is in the worker's slots."""
    return len(resident & set(shard.adapters)) / len(shard.adapters) if shard.adapters else 1.0
