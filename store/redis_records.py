"""What the scripts answer, as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from loramill.schemas.job import JobError, JobSpec, JobStatus
from loramill.store.records import Claim, Job, Lease, ShardInfo, ShardState, WorkerRecord

NEARLY_FULL = 0.8


def job_of(pairs: Sequence[bytes], chunks: int) -> Job:
    """A job from its hash: names and values in turn."""
    fields = dict(zip(pairs[::2], pairs[1::2], strict=True))

    def time_ms(name: bytes) -> int | None:
        return int(fields[name]) if name in fields else None

    return Job(
        spec=JobSpec.model_validate_json(fields[b"spec"]), status=JobStatus(fields[b"status"].decode()),
        total=int(fields[b"total"]), completed=int(fields[b"completed"]), failed=int(fields[b"failed"]),
        prompt_tokens=int(fields[b"prompt"]), completion_tokens=int(fields[b"completion"]),
        shards=int(fields[b"shards"]), shards_done=int(fields[b"shards_done"]), chunks=chunks,
        created_ms=int(fields[b"created"]), accepted_ms=time_ms(b"accepted"), expires_ms=time_ms(b"expires"),
        ended_ms=time_ms(b"ended"), cancelled_ms=time_ms(b"cancelled"),
        errors=tuple(JobError(**error) for error in orjson.loads(fields.get(b"errors", b"[]"))),
    )  # fmt: skip


def shard_of(number: int, fields: Sequence[bytes | None]) -> ShardInfo:
    """A shard from what `shards.lua` says of it."""
    state, rows, done, adapters, attempts, worker, suspects = fields
    assert state is not None and adapters is not None
    return ShardInfo(
        number, ShardState(state.decode()), int(rows or 0), int(done or 0), tuple(orjson.loads(adapters)),
        int(attempts or 0), worker.decode() if worker is not None else None, _suspects(suspects or b"{}"),
    )  # fmt: skip


def claim_of(found: Sequence[Any], lease_s: float) -> Claim:
    """A claim from what `lease` in `lib.lua` returns."""
    job, number, epoch, counter, rows, adapters, done, suspects, attempts = found
    lease = Lease(job.decode(), int(number), int(epoch), int(counter), lease_s)
    return Claim(lease, int(rows), tuple(orjson.loads(adapters)), done, _suspects(suspects), int(attempts))


def worker_of(record: bytes) -> WorkerRecord:
    """A worker as it said of itself."""
    fields = orjson.loads(record)
    return WorkerRecord(**{**fields, "resident": tuple(fields["resident"])})


def warnings_of(info: Mapping[str, Any], *, durable: bool) -> tuple[str, ...]:
    """What an operator should know of a server, from its INFO."""
    found = []
    if not durable:
        found.append("a restart of the server loses every job: set appendonly yes")
    elif not info.get("aof_enabled"):
        found.append("a crash of the server loses what came since its last snapshot: set appendonly yes")
    if info.get("aof_last_write_status", "ok") != "ok" or info.get("rdb_last_bgsave_status", "ok") != "ok":
        found.append("the server could not write to its disk")
    if info["maxmemory"] and info["used_memory"] > NEARLY_FULL * info["maxmemory"]:
        found.append(f"{info['used_memory'] / info['maxmemory']:.0%} of the server's maxmemory is used")
    return tuple(found)


def _suspects(text: bytes) -> dict[int, int]:
    return {int(position): int(lone) for position, lone in sorted(orjson.loads(text).items())}
