"""Batches from their creation to their end, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramill.producer.api import batch_steps, intake
from loramill.producer.api.batch_book import Batch as Kept
from loramill.producer.api.batch_book import BatchData, Book, new_batch_id
from loramill.producer.api.contents import Contents, Writing
from loramill.producer.api.context import Api
from loramill.producer.api.keys import Keys
from loramill.producer.api.minder import Minder
from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.errors import StoreFull
from loramill.store.redis_store import RedisStore
from loramill.store.shelf import Shelf
from loramill.store.sqlite_store import SqliteStore
from tests.producer.api.batch_server import FAST, Served, chats, serving, until
from tests.producer.served_by_stub import MANIFEST, Place

WINDOW_S = 86400.0
PATIENT = replace(FAST, lock_s=0.7)
"""Whoever is taken for dead is so soon."""


def put(server: Served, rows: int, *, window_s: float = WINDOW_S, **data: Any) -> Kept:
    """A batch as a create leaves it."""
    said: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "pending_rows": 10**6}
    said |= {"input_file_id": server.upload(chats(rows)), "window_s": window_s} | data
    return Book(server.api.shelf).put(new_batch_id(), "", BatchData(**said))


def everywhere(deaths: Iterable[str], also_in_redis: Collection[str]) -> list[tuple[str, str]]:
    """(store, where) of every test."""
    return [("sqlite", where) for where in deaths] + [("redis", where) for where in deaths if where in also_in_redis]


def until_status(server: Served, id: str, *statuses: str) -> Kept:
    book = Book(server.api.shelf)
    return until(lambda: book.get(id), lambda batch: batch.data.status in statuses)


def is_whole(server: Served, batch: Kept, rows: int) -> None:
    """Every row is in a file, in order, and nothing is there beside the files of this batch."""
    got = [line["custom_id"] for line in server.lines(batch.data.output_file_id)]
    assert got == [f"r{at}" for at in range(rows)]
    files, _ = Contents(server.api.shelf).list("", purpose="batch_output")
    assert [file.id for file in files] == [batch.data.output_file_id]
    assert until(lambda: list(Book(server.api.shelf).open()), lambda left: not left) == []


class Death:
    """Kills this process when a method is called for the nth time, before or after it has done its work."""

    def __init__(self, owner: Any, name: str, nth: int = 1, *, after: bool = False) -> None:
        self.owner, self.name, self.nth, self.after = owner, name, nth, after

    def lurk(self) -> None:
        owners = (SqliteStore, RedisStore) if self.owner == "store" else (self.owner,)
        for owner in owners:
            self._lurk(owner)

    def _lurk(self, owner: Any) -> None:
        real, left = getattr(owner, self.name), self.nth

        def deadly(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = real(*given, **named)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(owner, self.name, deadly)


def dies(open_store: Callable[[], JobStore], death: Death) -> None:
    """A server's minder in a process of its own, until that is killed where it was to be.

    To be called without a server in this process: a fork that has threads beside it may inherit what they locked."""
    child = os.fork()
    if not child:
        try:
            death.lurk()
            Minder(Api(open_store(), Keys(None), name="mortal"), pace=replace(FAST, lock_s=0.5)).start()
            time.sleep(60)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


VALIDATING = {
    "before the attempt is noted": Death(Book, "change"),
    "before anything is staged": Death("store", "stage"),
    "amid the shards": Death("store", "add_shard", 3),
    "before the job is accepted": Death("store", "accept"),
    "when the job was accepted": Death("store", "accept", after=True),
    "before the batch is in progress": Death(Book, "change", 2),
    "when the batch is in progress": Death(Book, "change", 2, after=True),
    "before it is known to run": Death(Book, "runs"),
}
FINALIZING = {
    "before the attempt is noted": Death(Book, "change"),
    "before the file is begun": Death(Contents, "begin"),
    "amid the file": Death(Writing, "write", after=True),
    "before the file is there": Death(Writing, "finish"),
    "when the file is there": Death(Writing, "finish", after=True),
    "before the batch has ended": Death(Book, "change", 2),
    "when the batch has ended": Death(Book, "change", 2, after=True),
    "before it is put away": Death(Book, "put_away"),
}
REDIS = {"amid the shards", "when the job was accepted", "when the file is there", "before the batch has ended"}


@pytest.mark.parametrize(("open_store", "where"), everywhere(VALIDATING, REDIS), indirect=["open_store"])
def test_a_server_that_is_killed_while_it_validates(
    open_store: Callable[[], JobStore], place: Place, where: str
) -> None:
    rows = 1100
    with serving(place.store, minds=False) as server:
        batch = put(server, rows)
    dies(open_store, VALIDATING[where])
    with serving(place.store, name="heir") as server:
        running = until_status(server, batch.id, JobStatus.IN_PROGRESS)
        assert running.data.total == rows
        server.work(batch.id)
        is_whole(server, Book(server.api.shelf).get(batch.id), rows)
    # Nothing of the dead server's attempt is left to be run.
    assert [job.total for job in place.store.jobs()] == [rows]


@pytest.mark.parametrize(("open_store", "where"), everywhere(FINALIZING, REDIS), indirect=["open_store"])
def test_a_server_that_is_killed_while_it_finalizes(
    open_store: Callable[[], JobStore], place: Place, where: str
) -> None:
    rows, ended = 30, list[str]()
    with serving(place.store) as server:
        batch = put(server, rows)
        until_status(server, batch.id, JobStatus.IN_PROGRESS)
    with serving(place.store, minds=False) as server:
        server.answer(server.claim())
    dies(open_store, FINALIZING[where])
    with serving(place.store, name="heir", on_end=lambda one: ended.append(one.id)) as server:
        done = until_status(server, batch.id, JobStatus.COMPLETED)
        is_whole(server, done, rows)
    assert set(ended) == {batch.id}


def test_several_servers_see_to_each_batch_once(place: Place) -> None:
    # Who is slow here is not taken for dead.
    ended, unhurried = list[str](), replace(FAST, lock_s=60.0)

    def hear(batch: Kept) -> None:
        ended.append(batch.id)

    with serving(place.store, on_end=hear, pace=unhurried) as one:
        others = [Minder(Api(place.store, Keys(None), name=name), hear, unhurried) for name in "abc"]
        for other in others:
            other.start()
        made = [put(one, 5).id for _ in range(12)]
        for id in made:
            one.work(id)
        for other in others:
            other.close()
    assert sorted(ended) == sorted(made)
    assert len(Contents(place.store.shelf).list("", purpose="batch_output")[0]) == 12
    assert len(place.store.jobs(limit=100)) == 12


def _has(store: JobStore, job_id: str, status: JobStatus) -> bool:
    return any(job.id == job_id and job.status is status for job in store.jobs())


@pytest.mark.parametrize("where", ["stage", "add_shard", "accept"])
def test_who_was_taken_for_dead_spoils_nothing(place: Place, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A server is stopped for longer than its lock lasts, and goes on when another has submitted the batch."""
    with serving(place.store, minds=False) as server:
        batch = put(server, 1100)
        asleep, wake = threading.Event(), threading.Event()
        slow = SqliteStore(place.folder / "jobs.db")
        real = getattr(slow, where)

        def late(*given: Any) -> Any:
            asleep.set()
            wake.wait(60)
            return real(*given)

        monkeypatch.setattr(slow, where, late)
        sleeper = Minder(Api(slow, Keys(None), name="sleeper"), pace=PATIENT)
        monkeypatch.setattr(sleeper, "_renew", lambda: None)
        sleeper.start()
        assert asleep.wait(60)
        with serving(place.store, name="heir") as heir:
            until_status(heir, batch.id, JobStatus.IN_PROGRESS)
            wake.set()
            second = f"{batch.id}-2"
            until(lambda: place.store.job(second).status, lambda status: status is JobStatus.IN_PROGRESS)
            if where == "stage":
                until(lambda: _has(place.store, batch.id, JobStatus.CANCELLED))
            heir.work(batch.id)
            is_whole(heir, Book(heir.api.shelf).get(batch.id), 1100)
            # What the other one had accepted all the same is taken back.
            until(lambda: [job.id for job in place.store.jobs() if job.status is not JobStatus.CANCELLED] == [second])
        sleeper.close()
        slow.close()


def test_who_was_taken_for_dead_publishes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(place.store) as server:
        batch = put(server, 20)
        until_status(server, batch.id, JobStatus.IN_PROGRESS)
    with serving(place.store, minds=False) as server:
        server.answer(server.claim())
        asleep, wake = threading.Event(), threading.Event()
        real = batch_steps.publish

        def publish(store: JobStore, *given: Any) -> Any:
            if store is slow:
                asleep.set()
                wake.wait(60)
            return real(store, *given)

        monkeypatch.setattr(batch_steps, "publish", publish)
        slow = SqliteStore(place.folder / "jobs.db")
        sleeper = Minder(Api(slow, Keys(None), name="sleeper"), pace=PATIENT)
        monkeypatch.setattr(sleeper, "_renew", lambda: None)
        sleeper.start()
        assert asleep.wait(60)
        with serving(place.store, name="heir") as heir:
            done = until_status(heir, batch.id, JobStatus.COMPLETED)
            wake.set()
            sleeper.close()
            is_whole(heir, done, 20)
        slow.close()


def test_a_window_that_ends_keeps_what_is_finished(place: Place) -> None:
    with serving(place.store) as server:
        batch = put(server, 1000, window_s=3.0)
        until_status(server, batch.id, JobStatus.IN_PROGRESS)
        claim = server.claim()
        server.answer(claim, range(5))
        until(lambda: place.store.job(batch.id).status, lambda status: status is JobStatus.FINALIZING)
        assert server.client().batches.retrieve(batch.id).status == "finalizing"
        place.store.release(claim.lease)
        done = server.see(batch.id)
        assert done.status == "expired" and done.expired_at is not None and done.cancelled_at is None
        assert len(server.lines(done.output_file_id)) == 5
        never = server.lines(done.error_file_id)
        assert len(never) == 995 and {line["error"]["code"] for line in never} == {"batch_expired"}


def test_without_workers_a_batch_waits_until_its_window_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    nobody = Place(tmp_path)
    with serving(nobody.store) as server:
        short, long = put(server, 3, window_s=1.0), put(server, 3)
        failed = server.see(short.id)
        assert failed.status == "failed" and failed.errors is not None and failed.errors.data is not None
        assert failed.errors.data[0].code == "batch_expired"
        assert server.client().batches.retrieve(long.id).status == "validating"
        nobody.store.publish(MANIFEST)
        assert server.work(long.id).status == "completed"


def test_a_cancel_stops_the_validation(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    began, real = threading.Event(), intake.check

    def check(source: Any, served: Any, ask: Any, invalid: Any, on_progress: Callable[[int], None]) -> Any:
        began.set()
        until(lambda: on_progress(1) or False)  # type: ignore[func-returns-value]
        return real(source, served, ask, invalid, on_progress)

    monkeypatch.setattr(intake, "check", check)
    with serving(place.store) as server:
        made = server.create(chats(3))
        assert began.wait(60)
        server.client().batches.cancel(made.id)
        assert server.see(made.id).status == "cancelled"
    assert place.store.jobs() == []


def test_a_store_that_was_full_is_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [True]
    real = Shelf.put_piece

    def put_piece(self: Shelf, *given: Any) -> None:
        if full[0]:
            raise StoreFull("no room")
        real(self, *given)

    with serving(place.store) as server:
        made = server.create(chats(5))
        server.see(made.id, "in_progress")
        monkeypatch.setattr(Shelf, "put_piece", put_piece)
        server.answer(server.claim())
        server.see(made.id, "finalizing")
        time.sleep(0.5)
        assert server.client().batches.retrieve(made.id).status == "finalizing"
        assert Contents(server.api.shelf).list("", purpose="batch_output") == ([], False)
        full[0] = False
        done = server.see(made.id)
        assert done.status == "completed" and len(server.lines(done.output_file_id)) == 5


def test_what_nobody_foresaw_is_tried_again_and_tells_nothing_of_the_rows(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(*given: Any) -> Any:
        raise ZeroDivisionError(prompt)

    prompt = "nobody's business"

    with serving(place.store) as server:
        with monkeypatch.context() as patched:
            patched.setattr(intake, "check", check)
            made = server.create(chats(3))
            until(lambda: "ZeroDivisionError" in caplog.text)
            assert server.client().batches.retrieve(made.id).status == "validating"
        assert server.work(made.id).status == "completed"
    assert made.id in caplog.text and prompt not in caplog.text


def test_results_that_are_gone_end_a_batch(place: Place) -> None:
    with serving(place.store) as server:
        batch = put(server, 3)
        until_status(server, batch.id, JobStatus.IN_PROGRESS)
    with serving(place.store, minds=False) as server:
        server.answer(server.claim())
        place.store.purge(batch.id)
    with serving(place.store) as server:
        failed = server.see(batch.id)
        assert failed.errors is not None and failed.errors.data is not None
        assert failed.errors.data[0].code == "results_lost"


def test_outputs_go_when_they_were_to(place: Place) -> None:
    with serving(place.store) as server:
        made = server.create(chats(2), output_expires_after={"anchor": "created_at", "seconds": 3600})
        done = server.work(made.id)
        file = Contents(server.api.shelf).find("", done.output_file_id or "")
        assert file.expires_at is not None and abs(file.expires_at - file.created_at - 3600) <= 2


def test_a_server_that_ends_lets_go_of_what_it_was_at(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()

    def check(source: Any, served: Any, ask: Any, invalid: Any, on_progress: Callable[[int], None]) -> Any:
        began.set()
        return until(lambda: on_progress(1))

    with monkeypatch.context() as patched, serving(place.store) as server:
        patched.setattr(intake, "check", check)
        made = server.create(chats(3))
        assert began.wait(60)
    with serving(place.store, name="heir", pace=replace(FAST, lock_s=3600.0)) as server:
        assert server.work(made.id).status == "completed"


@pytest.fixture(autouse=True)
def _no_threads_stay() -> Iterator[None]:
    yield
    until(lambda: not [one for one in threading.enumerate() if one.name.startswith("minder")])
