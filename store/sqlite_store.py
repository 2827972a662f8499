"""The embedded store: everything in one SQLite file, for any number of processes of one machine."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path

import orjson

from loramill.schemas.job import JobError, JobSpec, JobStatus, Lane
from loramill.schemas.manifest import Manifest
from loramill.store import sqlite_jobs as jobs
from loramill.store import sqlite_queue as queue
from loramill.store.contract import LEASE_S, RETENTION_S, STAGING_S, WORKER_TTL_S, JobStore
from loramill.store.errors import JobNotFound, StoreError, StoreLost, StoreRefused
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
from loramill.store.sqlite_file import Database
from loramill.store.sqlite_shelf import SqliteShelf


class SqliteStore(JobStore):
    """Its clock is the machine's. A commit has reached the disk when it returns."""

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        files: Files | None = None,
        create: bool = True,
        retention_s: float = RETENTION_S,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens the file, or makes it if `create`. `clock`: seconds since 1970, for tests.

        Raises StoreLost if nothing was ever submitted there and it is not to be made; StoreRefused if it cannot be used
        (no folder, no rights, not a database, another's, of another format); StoreUnreachable; StoreFull.
        """
        super().__init__(files)
        self._lease_s, self._retention_ms, self._clock = lease_s, round(retention_s * 1000), clock
        self._database = Database(Path(path), create=create)
        self._shelf = SqliteShelf(self._database, files, self._now_ms)
        self._manifests: dict[str, Manifest] = {}

    def stage(self, spec: JobSpec) -> None:
        with self._database.write() as db:
            jobs.stage(db, spec, self._now_ms())

    def _add_shard(self, job_id: str, shard: NewShard, kept: bytes) -> None:
        with self._database.write() as db:
            jobs.add_shard(db, jobs.staged(db, job_id, self._now_ms()), shard, kept)

    def _add_results(self, job_id: str, chunk: Chunk, entry: bytes) -> None:
        with self._database.write() as db:
            jobs.staged(db, job_id, self._now_ms())
            db.execute("UPDATE jobs SET total = total + ? WHERE id = ?", (len(chunk), job_id))
            jobs.count(db, job_id, chunk, bytes((len(chunk) + 7) // 8), len(chunk), entry)

    def accept(self, job_id: str) -> Job:
        with self._database.write() as db:
            now_ms = self._now_ms()
            if not _is(db, job_id, "accepted_ms IS NOT NULL"):
                jobs.accept(db, jobs.staged(db, job_id, now_ms), now_ms)
            return jobs.find(db, job_id)

    def refuse(self, job_id: str, errors: Sequence[JobError]) -> Job:
        with self._database.write() as db:
            now_ms = self._now_ms()
            jobs.refuse(db, jobs.staged(db, job_id, now_ms), errors, now_ms)
            return jobs.find(db, job_id)

    def job(self, job_id: str) -> Job:
        with self._database.read() as db:
            return jobs.find(db, job_id)

    def jobs(self, *, after: str | None = None, limit: int = 20) -> list[Job]:
        with self._database.read() as db:
            return jobs.newest(db, after, limit)

    def shards(self, job_id: str) -> list[ShardInfo]:
        with self._database.read() as db:
            jobs.must_exist(db, job_id)
            return jobs.shards(db, job_id)

    def events(self, job_id: str, after: int = 0) -> list[Event]:
        with self._database.read() as db:
            jobs.must_exist(db, job_id)
            query = "SELECT number, at_ms, what FROM events WHERE job = ? AND number > ? ORDER BY number"
            return [Event(*row) for row in db.execute(query, (job_id, after))]

    def _results(self, job_id: str, start: int, limit: int) -> list[bytes]:
        with self._database.read() as db:
            jobs.must_exist(db, job_id)
            query = "SELECT entry FROM chunks WHERE job = ? AND number >= ? ORDER BY number LIMIT ?"
            return [entry for (entry,) in db.execute(query, (job_id, start, limit))]

    def _shard_kept(self, job_id: str, number: int) -> bytes:
        with self._database.read() as db:
            found = db.execute("SELECT kept FROM inputs WHERE job = ? AND number = ?", (job_id, number)).fetchone()
        if found is None:
            raise JobNotFound(f"there is no job {job_id} with a shard {number}")
        return bytes(found[0])

    def cancel(self, job_id: str) -> Job:
        with self._database.write() as db:
            status = jobs.find(db, job_id).status
            if not status.ended and status not in jobs.ENDING:
                jobs.let_go(db, job_id, JobStatus.CANCELLING, self._now_ms())
            return jobs.find(db, job_id)

    def _remove(self, job_id: str, *, only_staged: bool) -> None:
        with self._database.write() as db:
            if only_staged:
                found = db.execute("SELECT status FROM jobs WHERE id = ?", (job_id,)).fetchone()
                if found != (JobStatus.VALIDATING,):
                    return
            elif not jobs.find(db, job_id).status.ended:
                raise StoreRefused(f"the job {job_id} has not ended: cancel it first")
            jobs.remove(db, job_id)

    def claim(
        self, worker: str, manifest: str, resident: Sequence[str] = (), *, lane: Lane = Lane.BULK
    ) -> Claim | None:
        with self._database.read() as db:
            # Asked again and again, and mostly for nothing: not worth a turn at writing.
            if not queue.waits(db, self._manifest(db, manifest), lane):
                return None
        with self._database.write() as db:
            place = queue.choose(db, self._manifest(db, manifest), resident, lane)
            return None if place is None else queue.lease(db, *place, worker, self._now_ms(), self._lease_s)

    def reclaim(self, worker: str, lease: Lease) -> Claim | None:
        with self._database.write() as db:
            return queue.reclaim(db, lease, worker, self._now_ms(), self._lease_s)

    def pulse(self, leases: Sequence[Lease], *, renew: bool) -> list[Verdict]:
        with self._database.write() if renew else self._database.read() as db:
            now_ms = self._now_ms()
            if renew:
                for lease in leases:
                    queue.renew(db, lease, now_ms, self._lease_s)
            return [queue.verdict(db, lease, now_ms) for lease in leases]

    def _commit(self, lease: Lease, chunk: Chunk, entry: bytes) -> Committed:
        with self._database.write() as db:
            return queue.commit(db, lease, chunk, entry, self._now_ms())

    def strike(self, lease: Lease, position: int) -> int:
        with self._database.write() as db:
            return queue.strike(db, lease, position, self._now_ms())

    def release(self, lease: Lease, *, suspects: Iterable[int] = ()) -> None:
        with self._database.write() as db:
            queue.release(db, lease, suspects, self._now_ms())

    def reap(self) -> Reaped:
        now_ms = self._now_ms()
        with self._database.read() as db:
            old = jobs.outlived(db, now_ms, self._retention_ms)
        for job_id in old:
            # What outlives its entry would never be found again, so the files go first.
            self._remove_files(job_id)
        with self._database.write() as db:
            purged = [job_id for job_id in old if _is(db, job_id, "ended_ms IS NOT NULL")]
            going = "SELECT id FROM jobs WHERE ended_ms IS NULL AND status = ? AND"
            late = db.execute(f"{going} expires_ms <= ?", (JobStatus.IN_PROGRESS, now_ms)).fetchall()
            for (job_id,) in late:
                jobs.let_go(db, job_id, JobStatus.FINALIZING, now_ms)
            lost = queue.reap_leases(db, now_ms)
            db.execute("UPDATE meta SET value = value + ? WHERE name = 'expired'", (lost,))
            quiet_ms = now_ms - round(STAGING_S * 1000)
            quiet = db.execute(f"{going} touched_ms <= ?", (JobStatus.VALIDATING, quiet_ms)).fetchall()
            abandoned = [job_id for (job_id,) in quiet]
            for job_id in (*purged, *abandoned):
                jobs.remove(db, job_id)
        for job_id in abandoned:
            # Only now: its submit may have come back to life until it was gone.
            self._remove_files(job_id)
        return Reaped(lost, len(late), len(abandoned), len(purged))

    def take_back(self) -> int:
        """Takes back every lease, run out or not; how many. For whoever knows that no worker is left."""
        with self._database.write() as db:
            return queue.reap_leases(db, self._now_ms(), all_of_them=True)

    def ready(self) -> Mapping[str, int]:
        with self._database.read() as db:
            return queue.ready(db)

    def backlog(self) -> Mapping[str, Backlog]:
        with self._database.read() as db:
            return queue.backlog(db)

    def publish(self, manifest: Manifest) -> None:
        with self._database.write() as db:
            said = (manifest.id, manifest.model_dump_json())
            db.execute("INSERT OR REPLACE INTO manifests (id, manifest) VALUES (?, ?)", said)

    def manifests(self) -> list[Manifest]:
        with self._database.read() as db:
            query = "SELECT manifest FROM manifests ORDER BY sequence DESC"
            return [Manifest.model_validate_json(said) for (said,) in db.execute(query)]

    def hello(self, worker: WorkerRecord) -> None:
        with self._database.write() as db:
            said = (worker.id, self._now_ms(), orjson.dumps(worker))
            db.execute("INSERT OR REPLACE INTO workers VALUES (?, ?, ?)", said)
            db.execute("DELETE FROM workers WHERE heard_ms < ?", (self._last_heard_ms(),))

    def goodbye(self, worker: str) -> None:
        with self._database.write() as db:
            db.execute("DELETE FROM workers WHERE id = ?", (worker,))

    def workers(self) -> list[WorkerRecord]:
        with self._database.read() as db:
            query = "SELECT record FROM workers WHERE heard_ms >= ? ORDER BY id"
            said = [orjson.loads(record) for (record,) in db.execute(query, (self._last_heard_ms(),))]
        return [WorkerRecord(**one | {"resident": tuple(one["resident"])}) for one in said]

    def _put_blob(self, digest: str, data: bytes) -> None:
        with self._database.write() as db:
            db.execute("INSERT INTO blobs VALUES (?, ?) ON CONFLICT DO NOTHING", (digest, data))

    def get_blob(self, digest: str) -> bytes:
        with self._database.read() as db:
            found = db.execute("SELECT data FROM blobs WHERE digest = ?", (digest,)).fetchone()
        if found is None:
            raise StoreError(f"the store {self._database.path} has no blob {digest}")
        return bytes(found[0])

    def has_blob(self, digest: str) -> bool:
        with self._database.read() as db:
            return db.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchone() is not None

    @property
    def shelf(self) -> SqliteShelf:
        return self._shelf

    def info(self) -> StoreInfo:
        path = self._database.path
        with self._database.read() as db:
            query = (
                "SELECT coalesce(sum(total - completed - failed), 0) FROM jobs WHERE ended_ms IS NULL AND status <> ?"
            )
            [(pending,)] = db.execute(query, (JobStatus.VALIDATING,))
            used = path.stat().st_size
            limit = used + shutil.disk_usage(path.parent).free
            [(expired,)] = db.execute("SELECT value FROM meta WHERE name = 'expired'")
        server = f"sqlite {sqlite3.sqlite_version}"
        return StoreInfo(f"sqlite:///{path}", self._database.id, server, True, used, limit, pending or 0, (), expired)

    def close(self) -> None:
        self._database.close()

    def _now_ms(self) -> int:
        return round(self._clock() * 1000)

    def _last_heard_ms(self) -> int:
        return self._now_ms() - round(WORKER_TTL_S * 1000)

    def _manifest(self, db: sqlite3.Connection, manifest: str) -> Manifest:
        if manifest not in self._manifests:
            found = db.execute("SELECT manifest FROM manifests WHERE id = ?", (manifest,)).fetchone()
            if found is None:
                raise StoreLost(f"the store {self._database.path} has no manifest {manifest}: publish it again")
            self._manifests[manifest] = Manifest.model_validate_json(found[0])
        return self._manifests[manifest]


def _is(db: sqlite3.Connection, job_id: str, what: str) -> bool:
    return db.execute(f"SELECT 1 FROM jobs WHERE id = ? AND {what}", (job_id,)).fetchone() is not None
