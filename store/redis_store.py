"""The job store on a Redis server: what the scripts in `lua/` keep there, as the contract has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson

from loramill.schemas.job import JobError, JobSpec, Lane
from loramill.schemas.manifest import Manifest
from loramill.store.contract import (
    AFFINITY_S,
    ASK_RETENTION_S,
    DEADLINE_LEAD_S,
    HEAD,
    LEASE_S,
    PER_ADAPTER,
    PRIORITY_S,
    RETENTION_S,
    STAGING_S,
    WORKER_TTL_S,
    JobStore,
    queue_of,
)
from loramill.store.errors import JobNotFound, StoreError, StoreRefused
from loramill.store.packing import Chunk
from loramill.store.part_files import Files
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
    StoreInfo,
    Verdict,
    WorkerRecord,
)
from loramill.store.redis_link import READ_TIMEOUT_S, Link
from loramill.store.redis_records import claim_of, job_of, shard_of, warnings_of, worker_of
from loramill.store.redis_shelf import RedisShelf

LOOK_ON = 2048
"""Shards that are looked at for HEAD of them that the worker can serve: 7 ms if it can serve none of them. What is
behind them is found by the adapters that it serves."""
REAP_MOST = 256
"""Of each kind in one round: a script holds up everybody else."""


class RedisStore(JobStore):
    """See `lua/lib.lua` for the keys. All of them begin with `prefix`, so that several stores can share a database."""

    def __init__(
        self,
        url: str,
        *,
        files: Files | None = None,
        prefix: str = "loramill",
        create: bool = True,
        volatile: bool = False,
        retention_s: float = RETENTION_S,
        lease_s: float = LEASE_S,
        staging_s: float = STAGING_S,
        worker_ttl_s: float = WORKER_TTL_S,
        timeout_s: float = READ_TIMEOUT_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`volatile`: accept a server that keeps nothing on disk. `clock`: seconds since 1970, in place of the server's
        time where a test moves it. Raises StoreError; StoreLost if nothing is there and `create` is not set."""
        super().__init__(files)
        self._lease_s, self._lease_ms = lease_s, _ms(lease_s)
        self._retention_ms, self._staging_ms, self._worker_ttl_ms = _ms(retention_s), _ms(staging_s), _ms(worker_ttl_s)
        self._link = Link(url, prefix, timeout_s=timeout_s, clock=clock)
        self._shelf = RedisShelf(self._link, files)
        try:
            info = self._link.info()
            self._snapshots = not info.get("aof_enabled") and self._link.snapshots()
            if not (volatile or info.get("aof_enabled") or self._snapshots):
                raise StoreRefused(
                    f"{self._link.url} keeps nothing on disk, so a restart would lose every job: "
                    "set appendonly yes, or add ?volatile=1 to the URL if that is all right"
                )
            self._link.open(create=create)
        except BaseException:
            self._link.close()
            raise

    # Submitting.

    def stage(self, spec: JobSpec) -> None:
        window_ms = "" if spec.window_s is None else _ms(spec.window_s)
        handicap_ms = _ms(PRIORITY_S * spec.priority)
        queue = queue_of(spec.base_id, spec.lane)
        self._link.call("stage", spec.id, spec.model_dump_json(), queue, spec.lane, handicap_ms, window_ms)

    def _add_shard(self, job_id: str, shard: NewShard, kept: bytes) -> None:
        self._link.call("add_shard", job_id, shard.number, len(shard.rows), orjson.dumps(shard.adapters), kept)

    def _add_results(self, job_id: str, chunk: Chunk, entry: bytes) -> None:
        self._link.call("add_results", job_id, chunk.counts(), entry)

    def accept(self, job_id: str) -> Job:
        self._link.call("accept", job_id, _ms(DEADLINE_LEAD_S))
        return self.job(job_id)

    def refuse(self, job_id: str, errors: Sequence[JobError]) -> Job:
        self._link.call("refuse", job_id, orjson.dumps([error.model_dump() for error in errors]))
        return self.job(job_id)

    # Looking.

    def job(self, job_id: str) -> Job:
        fields, chunks = self._read_job(job_id, ("HGETALL", f"job:{job_id}"), ("LLEN", f"job:{job_id}:chunks"))
        return job_of(fields, chunks)

    def jobs(self, *, after: str | None = None, limit: int = 20) -> list[Job]:
        found = self._link.call("jobs", after or "", limit, about=after)
        return [job_of(fields, chunks) for fields, chunks in found]

    def shards(self, job_id: str) -> list[ShardInfo]:
        return [shard_of(number, fields) for number, fields in self._link.call("shards", job_id)]

    def events(self, job_id: str, after: int = 0) -> list[Event]:
        (entries,) = self._read_job(job_id, ("LRANGE", f"job:{job_id}:events", 0, -1))
        return [event for event in (Event(*orjson.loads(entry)) for entry in entries) if event.number > after]

    def _results(self, job_id: str, start: int, limit: int) -> list[bytes]:
        (entries,) = self._read_job(job_id, ("LRANGE", f"job:{job_id}:chunks", start, start + limit - 1))
        return list(entries)

    def _shard_kept(self, job_id: str, number: int) -> bytes:
        (kept,) = self._read_job(job_id, ("GET", f"job:{job_id}:input:{number}"))
        if kept is None:
            raise JobNotFound(f"{self._link.url} has no shard {number} of the job {job_id}")
        return bytes(kept)

    def _read_job(self, job_id: str, *commands: tuple[str | int, ...]) -> list[Any]:
        there, *answers = self._link.read(("EXISTS", f"job:{job_id}"), *commands)
        if not there:
            raise JobNotFound(f"{self._link.url} has no job {job_id}")
        return answers

    # Ending.

    def cancel(self, job_id: str) -> Job:
        self._link.call("cancel", job_id)
        return self.job(job_id)

    def _remove(self, job_id: str, *, only_staged: bool) -> None:
        self._link.call("remove", job_id, int(only_staged))

    # Working.

    def claim(
        self, worker: str, manifest: str, resident: Sequence[str] = (), *, lane: Lane = Lane.BULK
    ) -> Claim | None:
        limits = (HEAD, PER_ADAPTER, LOOK_ON, _ms(AFFINITY_S))
        suffix = queue_of("", lane)
        found = self._link.call("claim", worker, manifest, self._lease_ms, *limits, suffix, *resident, about=manifest)
        return found and claim_of(found, self._lease_s)

    def reclaim(self, worker: str, lease: Lease) -> Claim | None:
        found = self._link.call("reclaim", worker, lease.job, lease.shard, self._lease_ms)
        return found and claim_of(found, self._lease_s)

    def pulse(self, leases: Sequence[Lease], *, renew: bool) -> list[Verdict]:
        given = [part for lease in leases for part in (lease.job, lease.shard, lease.token)]
        return [Verdict(said.decode()) for said in self._link.call("pulse", int(renew), self._lease_ms, *given)]

    def _commit(self, lease: Lease, chunk: Chunk, entry: bytes) -> Committed:
        new, done = self._link.call("commit", lease.job, lease.shard, lease.token, chunk.counts(), entry)
        return Committed(new, bool(done))

    def strike(self, lease: Lease, position: int) -> int:
        return int(self._link.call("strike", lease.job, lease.shard, lease.token, position))

    def release(self, lease: Lease, *, suspects: Iterable[int] = ()) -> None:
        self._link.call("release", lease.job, lease.shard, lease.token, *suspects)

    def reap(self) -> Reaped:
        asked_ms = min(self._retention_ms, _ms(ASK_RETENTION_S))
        times = (self._staging_ms, self._retention_ms, asked_ms, self._worker_ttl_ms)
        leases, expired, abandoned, ended, answered = self._link.call("reap", *times, REAP_MOST)
        purged = 0
        for job_id in abandoned:
            self._remove_files(job_id.decode())
        for job_id in (*ended, *answered):
            # Files first: a job that is still named is found again after a crash in between.
            self._remove_files(job_id.decode())
            try:
                self._remove(job_id.decode(), only_staged=False)
            except JobNotFound:
                continue  # another came first
            purged += 1
        return Reaped(leases, expired, len(abandoned), purged)

    def ready(self) -> Mapping[str, int]:
        (bases,) = self._link.read(("SMEMBERS", "bases"))
        names = [base.decode() for base in bases]
        counts = self._link.read(*(("ZCARD", f"ready:{name}") for name in names))
        return {name: count for name, count in zip(names, counts, strict=True) if count}

    def backlog(self) -> Mapping[str, Backlog]:
        return {base.decode(): Backlog(*said) for base, *said in self._link.call("backlog")}

    # Who serves what.

    def publish(self, manifest: Manifest) -> None:
        keys = [offer.key for offer in manifest.adapters]
        said = (manifest.id, manifest.model_dump_json(), manifest.base_id, manifest.max_loras)
        self._link.call("publish", *said, *keys)

    def manifests(self) -> list[Manifest]:
        (ids,) = self._link.read(("ZRANGE", "manifests", 0, -1, "REV"))
        found = self._link.read(*(("HGET", f"manifest:{one.decode()}", "manifest") for one in ids))
        return [Manifest.model_validate_json(text) for text in found]

    def hello(self, worker: WorkerRecord) -> None:
        self._link.call("hello", worker.id, orjson.dumps(worker))

    def goodbye(self, worker: str) -> None:
        self._link.call("goodbye", worker)

    def workers(self) -> list[WorkerRecord]:
        return sorted(map(worker_of, self._link.call("workers", self._worker_ttl_ms)), key=lambda worker: worker.id)

    def _put_blob(self, digest: str, data: bytes) -> None:
        self._link.call("put_blob", digest, data)

    def get_blob(self, digest: str) -> bytes:
        (data,) = self._link.read(("GET", f"blob:{digest}"))
        if data is None:
            raise StoreError(f"{self._link.url} has no blob {digest}: its worker has to publish it again")
        return bytes(data)

    def has_blob(self, digest: str) -> bool:
        (there,) = self._link.read(("EXISTS", f"blob:{digest}"))
        return bool(there)

    # The store itself.

    @property
    def shelf(self) -> RedisShelf:
        return self._shelf

    def info(self) -> StoreInfo:
        info = self._link.info()
        ((pending, expired),) = self._link.read(("HMGET", "store", "pending", "expired"))
        durable = bool(info.get("aof_enabled")) or self._snapshots
        return StoreInfo(
            self._link.url, self._link.id, f"redis {info['redis_version']}", durable, int(info["used_memory"]),
            int(info["maxmemory"]) or None, int(pending or 0), warnings_of(info, durable=durable), int(expired or 0),
        )  # fmt: skip

    def close(self) -> None:
        self._link.close()


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
