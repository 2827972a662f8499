"""A job's rows as they were committed, each once."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.producer.api import feed
from loramill.producer.api.feed import Feeds
from loramill.store.records import Job
from loramill.store.sqlite_store import SqliteStore
from tests.producer.queued import Queue


@pytest.fixture
def queue(tmp_path: Path, tiny_base: Path) -> Iterator[Queue]:
    with SqliteStore(tmp_path / "jobs.db") as store:
        yield Queue(tmp_path, tiny_base, store)


def run_twice_over(queue: Queue, job_id: str) -> Job:
    """A job many of whose rows are in two chunks: what is committed twice counts once, and is stored again."""
    queue.submit(job_id, rows=60, shard_rows=20)
    dice = random.Random(5)
    while claim := queue.claim():
        for _ in range(6):
            queue.commit(claim, sorted(dice.sample(range(claim.rows), 7)))
        queue.commit(claim, range(claim.rows))
    return queue.store.job(job_id)


def ids(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["custom_id"] for line in lines]


def test_every_row_comes_once_from_any_point(queue: Queue) -> None:
    job = run_twice_over(queue, "job")
    stored = [row.row for chunk in queue.store.results("job", 0, 99) for row in chunk.rows()]
    assert len(stored) > 60
    every = ids(Feeds(queue.store).read(job, 0, 1000).lines)
    assert every == [f"r{row}" for row in dict.fromkeys(stored)] and len(every) == 60
    one = Feeds(queue.store)
    for after in random.Random(7).sample(range(61), 61):
        page = one.read(job, after, 7)
        assert ids(page.lines) == every[after : after + 7] and page.next == after + len(page.lines)
        # A server that is asked first from somewhere in the middle.
        assert Feeds(queue.store).read(job, after, 7) == page
    assert one.read(job, 1000, 5).lines == []


def test_readers_at_once(queue: Queue) -> None:
    job, feeds, wrong = run_twice_over(queue, "job"), Feeds(queue.store), list[str]()
    every = ids(feeds.read(job, 0, 1000).lines)
    feeds = Feeds(queue.store)

    def read(step: int) -> None:
        got, after = list[str](), 0
        while lines := feeds.read(job, after, step).lines:
            got, after = got + ids(lines), after + len(lines)
        if got != every:
            wrong.append(f"by {step}: {got}")

    threads = [threading.Thread(target=read, args=(step,)) for step in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_is_not_kept_is_read_anew(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_KEPT", 2)
    feeds, jobs = Feeds(queue.store), [run_twice_over(queue, f"job{at}") for at in range(4)]
    for after in (0, 25, 10):
        for job in jobs:
            assert len(feeds.read(job, after, 20).lines) == 20


def test_a_page_is_bounded_in_bytes(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job = run_twice_over(queue, "job")
    line = len(Feeds(queue.store).read(job, 0, 1).lines[0])
    monkeypatch.setattr(feed, "MAX_BYTES", 3 * line + line // 2)
    assert len(Feeds(queue.store).read(job, 0, 50).lines) == 3
    monkeypatch.setattr(feed, "MAX_BYTES", 1)
    assert len(Feeds(queue.store).read(job, 0, 50).lines) == 1
