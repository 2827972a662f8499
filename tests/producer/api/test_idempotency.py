"""Creates that come twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from loramill.producer.api import idempotency
from loramill.producer.api.errors import ApiError
from loramill.producer.api.idempotency import Once
from loramill.store.shelf import Shelf
from loramill.store.sqlite_store import SqliteStore
from tests.producer.api.batch_server import Served, chats, serving, until
from tests.producer.served_by_stub import MANIFEST, Place


class Clock:
    """Moves when it is told to."""

    now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shelf(tmp_path: Path, clock: Clock) -> Iterator[Shelf]:
    with SqliteStore(tmp_path / "jobs.db", clock=clock) as store:
        yield store.shelf


def once(shelf: Shelf, body: bytes = b"{}", key: str | None = None, owner: str = "", what: str = "batch") -> Once:
    return Once(shelf, owner, what, body, key)


@pytest.mark.parametrize(("key", "kept_s"), [(None, 60), ("k", 86400)])
def test_the_same_is_the_same_for_so_long(shelf: Shelf, clock: Clock, key: str | None, kept_s: int) -> None:
    assert once(shelf, key=key).known() is None
    assert once(shelf, key=key).claim("first") == "first"
    clock.now_s += kept_s - 1
    assert once(shelf, key=key).known() == "first"
    assert once(shelf, key=key).claim("second") == "first"
    clock.now_s += 2
    assert once(shelf, key=key).known() is None
    assert once(shelf, key=key).claim("third") == "third"


def test_what_differs_is_another(shelf: Shelf) -> None:
    assert once(shelf).claim("a") == "a"
    assert once(shelf, b"{1}").claim("b") == "b"
    assert once(shelf, owner="ann").claim("c") == "c"
    assert once(shelf, what="retry").claim("d") == "d"
    assert once(shelf, key="k").claim("e") == "e"
    assert once(shelf, owner="ann", key="k").claim("f") == "f"


def test_a_key_is_for_one_body(shelf: Shelf) -> None:
    once(shelf, b"1", key="k").claim("a")
    for ask in (lambda: once(shelf, b"2", key="k").known(), lambda: once(shelf, b"2", key="k").claim("b")):
        with pytest.raises(ApiError) as refused:
            ask()
        assert (refused.value.status, refused.value.code) == (409, "idempotency_key_reused")
        assert refused.value.headers == {"x-should-retry": "false"}
    for bad in ("", "k" * 256):
        with pytest.raises(ApiError) as refused:
            once(shelf, key=bad)
        assert refused.value.status == 400


def test_what_has_run_out_is_removed(shelf: Shelf, clock: Clock) -> None:
    once(shelf).claim("a")
    once(shelf, key="k").claim("b")
    clock.now_s += 61
    idempotency.tidy(shelf)
    assert shelf.overdue("idempotency") == []
    assert once(shelf, key="k").known() == "b"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(Place(tmp_path, MANIFEST).store) as one:
        yield one


def test_creates_that_come_twice_make_one_batch(served: Served) -> None:
    file = served.upload(chats(3))
    made, threads = list[str](), list[threading.Thread]()
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: made.append(served.create(file).id)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len(set(made)) == 1
    assert served.create(file, metadata={"another": "one"}).id != made[0]
    assert len(served.client().batches.list().data) == 2
    assert served.work(made[0]).status == "completed"
    assert served.create(file).id == made[0]


def test_a_key_says_what_is_the_same(served: Served) -> None:
    file = served.upload(chats(3))

    def create(key: str, **more: Any) -> str:
        return served.create(file, extra_headers={"idempotency-key": key}, **more).id

    one, other = create("one"), create("other")
    assert one != other and create("one") == one
    with pytest.raises(openai.ConflictError) as refused:
        create("one", metadata={"k": "v"})
    assert refused.value.code == "idempotency_key_reused"


def test_what_was_cancelled_or_failed_can_be_asked_for_again(served: Served) -> None:
    file, broken = served.upload(chats(3)), served.upload(["{"])
    made = served.create(file)
    served.client().batches.cancel(made.id)
    assert served.create(file).id == made.id or served.see(made.id).status == "cancelled"
    served.see(made.id)
    assert served.create(file).id != made.id
    failed = served.see(served.create(broken).id)
    assert failed.status == "failed"
    assert until(lambda: served.create(broken).id, lambda id: id != failed.id)
