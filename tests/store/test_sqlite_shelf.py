"""What is the embedded store's own about the shelf: who waits for whom, and what is walked to find things."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.schemas.job import Lane
from loramill.store.errors import StoreFull
from loramill.store.shelf import Usage
from loramill.store.sqlite_store import SqliteStore
from tests.contract.building import a_manifest, a_shard, claimed, submitted

RECORDS = 20_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "jobs.db") as store:
        yield store


def test_asking_for_nothing_and_speaking_wait_for_no_writer(store: SqliteStore, tmp_path: Path) -> None:
    """A worker asks for questions 20 times a second, and says tokens as often: not at the price of a commit."""
    manifest = a_manifest()
    store.publish(manifest)
    submitted(store, "j", a_shard(0, 1))
    other = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert store.claim("w", manifest.id, lane=Lane.ASK) is None
    store.shelf.say("c", b"x")
    assert store.shelf.heard("c") == [b"x"]
    other.execute("ROLLBACK")
    other.close()
    assert claimed(store).lease.job == "j"


def test_nothing_is_beside_the_database_until_somebody_speaks(store: SqliteStore, tmp_path: Path) -> None:
    store.shelf.put("file", "f", "me", b"")
    assert store.shelf.heard("c") == []
    assert not (tmp_path / "jobs.db-said").exists()
    store.shelf.say("c", b"x")
    assert (tmp_path / "jobs.db-said").is_dir()


def fill(store: SqliteStore) -> None:
    """In one transaction: so many puts take minutes of syncing, and are not what is measured."""
    owners = ("me", "you")
    rows = ((n, f"f{n}", owners[n % 2], b"x" * 300, 5, n, None if n % 3 else 2**50) for n in range(1, RECORDS + 1))
    with store._database.write() as db:
        db.executemany(
            "INSERT INTO records (kind, sequence, id, owner, data, size, version, created_ms, expires_ms)"
            " VALUES ('file', ?, ?, ?, ?, ?, ?, 0, ?)",
            rows,
        )
        db.execute("UPDATE meta SET value = ? WHERE name = 'records'", (RECORDS,))


def test_pages_among_many_records_are_found_and_not_searched_for(store: SqliteStore) -> None:
    """0.1 ms, 1 ms for the usage of 10,000; the bounds are for slower machines."""
    fill(store)
    shelf = store.shelf
    calls = {
        "all": (lambda: shelf.records("file"), 0.005),
        "an owner's": (lambda: shelf.records("file", "me"), 0.005),
        "after": (lambda: shelf.records("file", "you", after="f10001"), 0.005),
        "nobody's": (lambda: shelf.records("file", "nobody"), 0.005),
        "overdue": (lambda: shelf.overdue("file"), 0.005),
        "usage": (lambda: shelf.usage("file", "me"), 0.02),
    }
    for name, (call, bound_s) in calls.items():
        took = []
        for _ in range(20):
            started = time.thread_time()
            call()
            took.append(time.thread_time() - started)
        print(f"\n{name} of {RECORDS}: {1e3 * min(took):.2f} ms")
        assert min(took) < bound_s, name
    assert shelf.usage("file", "me") == Usage(RECORDS // 2, 5 * RECORDS // 2)
    assert shelf.put("file", "new", "me", b"").version == RECORDS + 1


def test_a_full_disk_stores_no_record_and_counts_none(store: SqliteStore) -> None:
    store.shelf.put("file", "f", "me", b"", size=3)
    with store._database.write() as db:
        [(pages,)] = db.execute("PRAGMA page_count")
        db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFull):
        store.shelf.put("file", "g", "me", b"x" * 1_000_000, size=9)
    with pytest.raises(StoreFull):
        store.shelf.put_piece("c", 0, bytes(range(256)) * 4000 + b"".join(n.to_bytes(4, "big") for n in range(50_000)))
    assert store.shelf.usage("file", "me") == Usage(1, 3)
    assert [record.id for record in store.shelf.records("file")] == ["f"]
    assert store.shelf.remove("file", "f")
