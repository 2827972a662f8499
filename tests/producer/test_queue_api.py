"""The Producer, against a real store and a worker in a thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import loramill
from loramill.producer.queue_api import Producer
from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.errors import JobNotFound, StoreLost, StoreUnreachable
from loramill.store.packing import Chunk
from loramill.store.records import Job, NewShard
from loramill.store.sqlite_store import SqliteStore
from tests.producer.queued import done_row
from tests.producer.served_by_stub import MANIFEST, Place, rows

Body = Callable[[Producer], Coroutine[Any, Any, None]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Place(tmp_path, MANIFEST)


def run(place: Place, body: Body, store: JobStore | None = None, **options: Any) -> None:
    async def main() -> None:
        async with Producer(store or place.url, **options) as producer:
            await body(producer)

    asyncio.run(main())


def answer(place: Place, job: Job, number: int, positions: list[int], *, again: bool = False) -> None:
    """Commits these rows of a claimed shard of the job."""
    claim = place.store.claim("w", MANIFEST.id)
    assert claim is not None
    lines = place.store.read_shard(job.id, claim.lease.shard)
    done = [done_row(job.id, *lines[position], fail={"r2"}) for position in positions]
    for _ in range(1 + again):
        place.store.commit(claim.lease, Chunk.of(done, positions))
    place.store.release(claim.lease)


def test_it_is_the_packages() -> None:
    assert loramill.Producer is Producer


def test_a_file_and_rows_come_to_the_same_job(place: Place) -> None:
    given = rows(40, None, "a00")

    async def as_they_come() -> AsyncIterator[dict[str, Any]]:
        for row in given:
            yield row

    async def body(producer: Producer) -> None:
        path = place.write(given)
        ways = [path, str(path), given, iter(given), as_they_come()]
        jobs = [await producer.submit(way, priority=2, window_s=60, metadata={"a": "b"}, seed=3) for way in ways]
        lines = [{number: json.loads(line) for number, line in place.lines(job.id).items()} for job in jobs]
        assert lines == [dict(enumerate(given))] * 5
        assert {(job.spec.priority, job.spec.window_s, job.spec.seed) for job in jobs} == {(2, 60, 3)}
        assert [job.id for job in await producer.jobs(limit=9)] == [job.id for job in reversed(jobs)]

    run(place, body)


def test_rows_without_an_id_are_numbered(place: Place) -> None:
    async def body(producer: Producer) -> None:
        job = await producer.submit([{"prompt": "a", "max_tokens": 1}, {"prompt": "b", "max_tokens": 1}])
        assert [json.loads(line)["id"] for line in place.lines(job.id).values()] == ["0", "1"]

    run(place, body)


def test_bad_rows_are_all_named_and_nothing_is_submitted(place: Place) -> None:
    async def body(producer: Producer) -> None:
        bad = [{"prompt": "a", "temperature": -1}, {"prompt": "b"}, {"prompt": "c", "adapter": "a0"}]
        with pytest.raises(ValueError, match=r"rows:1: temperature: (?s:.*)rows:3: model: (?s:.*)2 of 3 lines"):
            await producer.submit(bad)
        with pytest.raises(ValueError, match="row 1: it is no JSON object"):
            await producer.submit([{"prompt": "a"}, {"prompt": object()}])
        with pytest.raises(ValueError, match="cannot be a job's id"):
            await producer.submit([{"prompt": "a"}], id="a b")
        with pytest.raises(ValueError, match=r"nowhere\.jsonl: cannot be read"):
            await producer.submit(place.folder / "nowhere.jsonl")
        assert await producer.jobs() == []

    run(place, body)


def test_the_same_id_is_the_same_job(place: Place) -> None:
    async def body(producer: Producer) -> None:
        first = await producer.submit(rows(5), id="mine")
        assert await producer.submit(rows(5), id="mine") == first
        with pytest.raises(ValueError, match="another input"):
            await producer.submit(rows(6), id="mine")

    run(place, body)


def test_results_come_as_they_are_committed_each_once(place: Place) -> None:
    async def body(producer: Producer) -> None:
        job = await producer.submit(rows(6))
        answer(place, job, 0, [4, 1], again=True)
        answer(place, job, 0, [1, 2])
        found = [result async for result in producer.results(job, follow=False)]
        assert [result.index for result in found] == [4, 1, 2]
        assert found[0].text == "answer row 4"
        assert found[0].token_ids == []
        assert found[2].error == "no"
        followed = producer.results(job.id)
        assert [(await anext(followed)).index for _ in range(3)] == [4, 1, 2]
        threading.Timer(0.2, answer, (place, job, 0, [0, 5, 3])).start()
        assert [result.index async for result in followed] == [0, 5, 3]

    run(place, body)


def test_ordered_results_wait_for_those_before_them(place: Place) -> None:
    async def body(producer: Producer) -> None:
        job = await producer.submit(rows(6))
        answer(place, job, 0, [4, 1, 0])
        ordered = producer.results(job, ordered=True)
        assert [(await anext(ordered)).index for _ in range(2)] == [0, 1]
        answer(place, job, 0, [3])
        assert (await producer.cancel(job.id)).status is JobStatus.CANCELLED
        assert [result.index async for result in ordered] == [3, 4]

    run(place, body)


def test_waiting_for_a_job(place: Place) -> None:
    async def body(producer: Producer) -> None:
        job = await producer.submit(rows(6))
        with pytest.raises(TimeoutError):
            await producer.wait(job.id, timeout_s=0.3)
        threading.Timer(0.2, place.work).start()
        assert (await producer.wait(job.id, timeout_s=30)).status is JobStatus.COMPLETED
        with pytest.raises(JobNotFound):
            await producer.wait("nobody")

    run(place, body)


def test_retrying_what_failed(place: Place) -> None:
    async def body(producer: Producer) -> None:
        job = await producer.submit(rows(6))
        with pytest.raises(ValueError, match="only a job that has ended"):
            await producer.retry(job.id)
        place.work(fail={"r2", "r4"})
        again = await producer.retry(job.id, failed_only=True)
        assert again is not None
        assert (again.total, again.spec.retry_of) == (2, job.id)
        place.work()
        assert await producer.retry(again.id) is None

    run(place, body)


class Slow(SqliteStore):
    """Adds a shard only when it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.adding, self.go_on = threading.Event(), threading.Event()

    def add_shard(self, job_id: str, shard: NewShard) -> None:
        super().add_shard(job_id, shard)
        self.adding.set()
        assert self.go_on.wait(30)


def test_a_cancelled_submit_takes_back_what_it_began(place: Place) -> None:
    store = Slow(place.folder / "jobs.db")

    async def body(producer: Producer) -> None:
        task = asyncio.create_task(producer.submit(rows(600), id="mine"))
        await asyncio.to_thread(store.adding.wait)
        task.cancel()
        await asyncio.sleep(0.05)
        store.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await producer.jobs() == []

    run(place, body, store)


def test_rows_are_pulled_no_further_once_cancelled(place: Place) -> None:
    pulled = threading.Event()

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            pulled.set()
            yield {"prompt": "p", "max_tokens": 1}

    async def body(producer: Producer) -> None:
        task = asyncio.create_task(producer.submit(endless()))
        await asyncio.to_thread(pulled.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await producer.jobs() == []

    run(place, body)


def test_submit_waits_while_too_many_rows_are_pending(place: Place) -> None:
    async def body(producer: Producer) -> None:
        await producer.submit(rows(20))
        task = asyncio.create_task(producer.submit(rows(20)))
        await asyncio.sleep(0.5)
        assert not task.done()
        place.work()
        assert (await asyncio.wait_for(task, 30)).total == 20

    run(place, body, max_pending_rows=10)


def test_a_store_that_is_away_is_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramill.producer.queue_api.MOST_S", 0.01)
    monkeypatch.setattr("loramill.producer.queue_api.AWAY_S", 0.2)
    job = place.submit(rows(6)).job
    away = 3

    class Away(SqliteStore):
        def job(self, job_id: str) -> Job:
            nonlocal away
            away -= 1
            if away >= 0:
                raise StoreUnreachable("away")
            return super().job(job_id)

    async def body(producer: Producer) -> None:
        nonlocal away
        assert (await producer.job(job.id)).id == job.id
        away = 10**9
        with pytest.raises(StoreUnreachable):
            await producer.job(job.id)

    run(place, body, Away(place.folder / "jobs.db"))


def test_a_store_that_never_was_is_made_for_submitting_and_has_no_worker(tmp_path: Path) -> None:
    async def body(producer: Producer) -> None:
        with pytest.raises(ValueError, match="no worker has told this store"):
            await producer.submit(rows(1))

    run(Place(tmp_path), body)
    with pytest.raises(StoreLost):
        SqliteStore(tmp_path / "none.db", create=False)
