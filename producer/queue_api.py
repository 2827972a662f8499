"""The Python API of the queue, for asyncio: jobs handed to workers, and their results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryFile
from typing import BinaryIO, Self, TypeVar, cast

from loramill.producer.announce import announce
from loramill.producer.ask import Ask, OnInvalid, new_id
from loramill.producer.collect import Seen, pick, put
from loramill.producer.generated import Generated, generated
from loramill.producer.given_rows import Given, Stop, given_input, stoppable
from loramill.producer.reader import InputError
from loramill.producer.served import Served, published
from loramill.producer.spool import InOrder, Spool
from loramill.producer.submit import Submitted, submit
from loramill.producer.waiting import AWAY_S, LEAST_S, MOST_S, PAGE
from loramill.schemas.failures import ExitCode, Failure
from loramill.store.contract import JobStore
from loramill.store.errors import StoreError, StoreLost, StoreUnreachable
from loramill.store.packing import Chunk
from loramill.store.records import Job

_T = TypeVar("_T")


class Producer:
    """A store's jobs: `async with Producer("redis://host:6379/0") as p: job = await p.submit("jobs.jsonl")`.

    Any number of calls at once, of one event loop. What the store cannot do is raised as StoreError and its kinds
    (`loramill.store.errors`); reading and waiting go on when it has been away for less than ten minutes.
    """

    def __init__(
        self,
        store: str | JobStore,
        *,
        files: str | None = None,
        prefix: str = "loramill",
        base: str | None = None,
        broker: str | None = None,
        max_pending_rows: int | None = None,
    ) -> None:
        """`store`: its URL, or one that is open, which is then not closed. `files`: where rows and results are, if not
        in the store. `base`: which one the rows are for, where workers serve several. `broker`: where tickets go, if
        not to the store's Redis. With `max_pending_rows`, `submit` waits while more rows than that wait to be run."""
        self._given, self._files, self._prefix, self._base, self._broker = store, files, prefix, base, broker
        self._max_pending_rows = max_pending_rows

    async def __aenter__(self) -> Self:
        from loramill.store.opening import open_store

        given = self._given
        if isinstance(given, str):
            self._store = await asyncio.to_thread(open_store, given, files=self._files, prefix=self._prefix)
        else:
            self._store = given
        return self

    async def __aexit__(self, *_: object) -> None:
        if isinstance(self._given, str):
            await asyncio.to_thread(self._store.close)

    async def submit(
        self,
        given: Given,
        *,
        priority: int = 0,
        window_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        id: str | None = None,
        seed: int = 0,
        dedupe: bool = True,
        on_invalid: OnInvalid = "fail",
        limit: int | None = None,
    ) -> Job:
        """The accepted job of a file's lines, or of rows like those that Mill.run takes; rows go to disk as they come,
        and no more are taken than are there. The same `id` again gives the same job, and submits nothing.

        Raises ValueError with all that is wrong, by line and field, and then nothing was submitted. Cancelled, it takes
        back what it began.
        """
        ask = Ask(
            id=new_id() if id is None else id,
            priority=priority,
            window_s=window_s,
            metadata=dict(metadata or {}),
            seed=seed,
            dedupe=dedupe,
            on_invalid=on_invalid,
            limit=limit,
        )
        await self._room()
        stop = Stop()
        async with given_input(given, stop) as source:

            def work() -> Submitted:
                return submit(self._store, source, ask, self._served, lambda _: stop(), stop)

            with _as_errors():
                done = await stoppable(work, stop, self._unheard)
        if isinstance(self._given, str):
            await asyncio.to_thread(announce, done, self._store, self._given, prefix=self._prefix, broker=self._broker)
        return done.job

    async def job(self, job_id: str) -> Job:
        """How far it is. Raises JobNotFound."""
        return await self._read(lambda: self._store.job(job_id))

    async def jobs(self, *, after: str | None = None, limit: int = 20) -> list[Job]:
        """The newest first; those older than `after`, a job's id."""
        return await self._read(lambda: self._store.jobs(after=after, limit=limit))

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it has ended. Raises TimeoutError, and the job goes on."""
        async with asyncio.timeout(timeout_s):
            async for job in self._looks(job_id):
                if job.status.ended:
                    break
        return job

    async def results(self, job: Job | str, *, follow: bool = True, ordered: bool = False) -> AsyncIterator[Generated]:
        """Every row's result as it is committed, until the job has ended; without `follow` those that there are.

        With `ordered` in the order of the input: what is early waits on disk. Rows that never ran, because the job was
        cancelled or expired, have none. A page of results at a time is in memory, and no more are read than are taken.
        """
        job = job if isinstance(job, Job) else await self.job(job)
        chunks = self._chunks(job, follow=follow)
        if not ordered:
            async for chunk in chunks:
                for row in chunk.rows():
                    yield generated(row.row, row.line)
            return
        with TemporaryFile() as file:
            in_order = InOrder(Spool(job.total, cast(BinaryIO, file)))
            async for chunk in chunks:
                await asyncio.to_thread(put, in_order.spool, chunk)
                for number, line in in_order.ready():
                    yield generated(number, line)
            for number, line in in_order.rest():
                yield generated(number, line)

    async def cancel(self, job_id: str) -> Job:
        """Starts no more rows of it; results that there are stay. Raises JobNotFound."""
        return await asyncio.to_thread(self._store.cancel, job_id)

    async def retry(self, job_id: str, *, failed_only: bool = False) -> Job | None:
        """A new job of the rows of an ended one that failed or, without `failed_only`, never ran; None if there are
        none. Raises ValueError for a job that cannot be retried, JobNotFound."""
        from loramill.producer.retry import retry

        job = await self.job(job_id)
        with _as_errors():
            return await asyncio.to_thread(lambda: retry(self._store, job, failed_only=failed_only))

    async def _room(self) -> None:
        """Waits until no more rows than `max_pending_rows` wait to be run."""
        most, pause_s = self._max_pending_rows, LEAST_S
        while most is not None and (await self._read(self._store.info)).pending_rows > most:
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, MOST_S)

    async def _looks(self, job_id: str) -> AsyncIterator[Job]:
        """The job at once, and again with pauses between until it has ended, that included."""
        before, pause_s = None, LEAST_S
        while True:
            job = await self.job(job_id)
            yield job
            if job.status.ended:
                return
            pause_s = LEAST_S if job != before else min(pause_s * 1.5, MOST_S)
            before = job
            await asyncio.sleep(pause_s)

    async def _chunks(self, job: Job, *, follow: bool) -> AsyncIterator[Chunk]:
        """The chunks of results, each row once."""
        seen, start = Seen(job.total), 0
        async for now in self._looks(job.id):
            while start < now.chunks:
                limit = min(PAGE, now.chunks - start)
                page = await self._read(partial(self._store.results, job.id, start, limit))
                if not page:
                    raise StoreLost(f"job {job.id} had {now.chunks:,} chunks of results, and {start:,} is not there")
                for chunk in page:
                    yield pick(chunk, seen.first(chunk))
                start += len(page)
            if not follow:
                return

    async def _read(self, look: Callable[[], _T]) -> _T:
        """What the store says, as soon as it answers. Raises StoreUnreachable when it was away too long."""
        away_since_s: float | None = None
        while True:
            try:
                return await asyncio.to_thread(look)
            except StoreUnreachable:
                away_since_s = away_since_s or time.monotonic()
                if time.monotonic() - away_since_s >= AWAY_S:
                    raise
            await asyncio.sleep(MOST_S)

    def _served(self) -> Served:
        return published(self._store, self._base)

    def _unheard(self, done: Submitted) -> None:
        """Of a job that was accepted just when nobody waited for it any more."""
        if done.checked is not None:
            self._store.cancel(done.job.id)


@contextmanager
def _as_errors() -> Iterator[None]:
    """Failures, which are for commands, as what Python raises."""
    try:
        yield
    except InputError as error:
        raise ValueError(str(error)) from error
    except Failure as error:
        is_theirs = error.code in (ExitCode.INPUT, ExitCode.USAGE)
        raise (ValueError if is_theirs else StoreError)(str(error)) from error
