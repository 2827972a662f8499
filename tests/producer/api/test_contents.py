"""Files in a store: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.producer.api import contents, writing
from loramill.producer.api.contents import Contents, ContentTooLong
from loramill.store.errors import StoreFull, StoreUnreachable
from loramill.store.opening import open_store
from loramill.store.part_files import Files
from loramill.store.shelf import PIECE_BYTES, RecordChanged, RecordNotFound
from loramill.store.sqlite_store import SqliteStore
from tests.servers import RedisServer


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["inside", "files"])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[SqliteStore]:
    files = Files(str(tmp_path / "files")) if request.param == "files" else None
    store = SqliteStore(tmp_path / "q.db", files=files, clock=clock)
    yield store
    store.close()


def left(store: SqliteStore, tmp_path: Path) -> tuple[int, int]:
    """How many pieces there are, in the database and in files."""
    with store._database.read() as db:
        [(inside,)] = db.execute("SELECT count(*) FROM pieces")
    folder = tmp_path / "files"
    return inside, len([path for path in folder.rglob("*") if path.is_file()]) if folder.exists() else 0


def write(contents: Contents, data: bytes, owner: str = "ann", name: str = "in.jsonl", **more: object) -> str:
    with contents.begin(owner, name, "batch", **more) as new:  # type: ignore[arg-type]
        new.write(data)
        return new.finish().id


BIG = bytes(range(256)) * (PIECE_BYTES // 100)


def test_what_was_written_is_read(store: SqliteStore, tmp_path: Path, clock: Clock) -> None:
    files = Contents(store.shelf)
    with files.begin("ann", "in.jsonl", "batch") as new:
        for start in range(0, len(BIG), 70_001):
            new.write(BIG[start : start + 70_001])
        file = new.finish()
    assert file == files.find("ann", file.id)
    assert (file.bytes, file.sha256) == (len(BIG), hashlib.sha256(BIG).hexdigest())
    assert (file.created_at, file.expires_at, file.filename, file.purpose) == (1_000_000, None, "in.jsonl", "batch")
    assert b"".join(files.read(file)) == BIG
    files.save(file, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == BIG
    assert store.shelf.usage("file", "ann").size == len(BIG)
    assert file.object().model_dump()["object"] == "file"


@pytest.mark.parametrize("start, stop", [(0, 1), (PIECE_BYTES - 1, PIECE_BYTES + 1), (PIECE_BYTES, None), (5, 5)])
def test_any_bytes_of_it(store: SqliteStore, start: int, stop: int | None) -> None:
    files = Contents(store.shelf)
    file = files.find("ann", write(files, BIG))
    assert b"".join(files.read(file, start, stop)) == BIG[start:stop]


def test_an_empty_file(store: SqliteStore) -> None:
    files = Contents(store.shelf)
    file = files.find("ann", write(files, b""))
    assert (file.bytes, list(files.read(file))) == (0, [])


def test_it_is_there_once_it_is_finished(store: SqliteStore, tmp_path: Path) -> None:
    files = Contents(store.shelf)
    with files.begin("ann", "in.jsonl", "batch") as new:
        new.write(BIG)
        with pytest.raises(RecordNotFound):
            files.find("ann", new.id)
        with pytest.raises(RecordNotFound):
            files.remove("ann", new.id)
        assert files.list("ann") == ([], False)
    assert left(store, tmp_path) == (0, 0)
    assert store.shelf.usage("file", "ann").count == 0


def test_what_a_crash_leaves_is_found(store: SqliteStore, tmp_path: Path, clock: Clock) -> None:
    files = Contents(store.shelf)
    files.begin("ann", "in.jsonl", "batch").write(BIG)
    assert files.tidy() == 0
    clock.now += writing.UNFINISHED_S + 1
    assert files.tidy() == 1
    assert left(store, tmp_path) == (0, 0)


def test_who_writes_slowly_keeps_it(store: SqliteStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "RENEW_S", 0)
    files = Contents(store.shelf)
    with files.begin("ann", "in.jsonl", "batch") as new:
        for _ in range(3):
            clock.now += writing.UNFINISHED_S - 1
            new.write(b"{}\n")
            assert files.tidy() == 0
        assert store.shelf.usage("file", "ann").size == 9
        new.finish()


def test_whose_time_is_up(store: SqliteStore, tmp_path: Path, clock: Clock) -> None:
    files = Contents(store.shelf)
    file_id = write(files, b"{}\n", ttl_s=7200.0)
    assert (files.find("ann", file_id).expires_at or 0) - 1_000_000 == pytest.approx(7200, abs=60)
    clock.now += 7201
    with pytest.raises(RecordNotFound):
        files.find("ann", file_id)
    assert files.tidy() == 1
    assert left(store, tmp_path) == (0, 0)


def test_another_owner_has_no_part_in_it(store: SqliteStore) -> None:
    files = Contents(store.shelf)
    file_id = write(files, b"{}\n")
    for refused in (
        lambda: files.find("bob", file_id),
        lambda: files.remove("bob", file_id),
        lambda: files.list("bob", after=file_id),
    ):
        with pytest.raises(RecordNotFound):
            refused()
    assert files.list("bob") == ([], False)


def test_removed_with_its_pieces(store: SqliteStore, tmp_path: Path) -> None:
    files = Contents(store.shelf)
    file_id = write(files, BIG)
    files.remove("ann", file_id)
    assert left(store, tmp_path) == (0, 0)
    with pytest.raises(RecordNotFound):
        files.remove("ann", file_id)


def test_too_long(store: SqliteStore, tmp_path: Path) -> None:
    files = Contents(store.shelf)
    write(files, b"12345", max_bytes=5)
    with pytest.raises(ContentTooLong):
        write(files, b"123456", max_bytes=5)
    assert len(files.list("ann")[0]) == 1


def test_written_anew_under_its_id(store: SqliteStore, tmp_path: Path) -> None:
    files = Contents(store.shelf)
    write(files, BIG, id="file-1")
    assert write(files, b"short", id="file-1") == "file-1"
    assert b"".join(files.read(files.find("ann", "file-1"))) == b"short"
    assert sum(left(store, tmp_path)) <= 2  # one piece, and its file


def test_only_the_last_of_two_writers_finishes(store: SqliteStore, tmp_path: Path, clock: Clock) -> None:
    files = Contents(store.shelf)
    stalled = files.begin("ann", "in.jsonl", "batch", id="file-1")
    stalled.write(BIG)
    second = files.begin("ann", "in.jsonl", "batch", id="file-1")
    second.write(b"second")
    with pytest.raises(RecordChanged), stalled:
        stalled.finish()
    with second:
        second.finish()
    assert b"".join(files.read(files.find("ann", "file-1"))) == b"second"
    files.begin("ann", "in.jsonl", "batch", id="file-2").write(BIG)
    clock.now += writing.UNFINISHED_S + 1
    write(files, b"third", id="file-2")  # in place of one that is overdue
    assert b"".join(files.read(files.find("ann", "file-2"))) == b"third"
    assert left(store, tmp_path)[0] == 2


def test_pages_of_what_is_finished(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_PAGE", 3)
    files = Contents(store.shelf)
    ids = []
    for number in range(10):
        ids.append(write(files, b"{}\n", name=f"{number}.jsonl"))
        files.begin("ann", "unfinished.jsonl", "batch")
        write(files, b"{}\n", owner="bob")
    with files.begin("ann", "out.jsonl", "batch_output") as new:
        output = new.finish().id
    page, more = files.list("ann", limit=4, oldest_first=True)
    assert ([file.id for file in page], more) == (ids[:4], True)
    page, more = files.list("ann", limit=7, after=ids[3], oldest_first=True)
    assert ([file.id for file in page], more) == ([*ids[4:], output], False)
    page, more = files.list("ann", limit=10, purpose="batch")
    assert ([file.id for file in page], more) == (ids[::-1], False)
    assert [file.id for file in files.list("ann", purpose="batch_output")[0]] == [output]


@settings(max_examples=30)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 700, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1]), max_size=4),
    cut=st.tuples(st.integers(0, 4 * PIECE_BYTES), st.integers(0, 4 * PIECE_BYTES)),
)
def test_made_of_others(sizes: list[int], cut: tuple[int, int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "q.db")
        parts, files = Contents(store.shelf, "part"), Contents(store.shelf)
        data = [bytes([65 + number]) * size for number, size in enumerate(sizes)]
        made = [parts.find("ann", write(parts, one)) for one in data]
        file = files.join(made, "ann", "whole.jsonl", "batch", id="file-1", sha256="-")
        assert file == files.join(made, "ann", "whole.jsonl", "batch", id="file-1", sha256="-")
        assert b"".join(files.read(file)) == b"".join(data)
        assert b"".join(files.read(file, *cut)) == b"".join(data)[cut[0] : cut[1]]
        files.remove("ann", "file-1")
        assert left(store, Path(folder)) == (0, 0)
        store.close()


def test_on_redis(redis_server: RedisServer, tmp_path: Path) -> None:
    store = open_store(redis_server.url, prefix="contents")
    files = Contents(store.shelf)
    for name in ("a.jsonl", "b.jsonl"):
        file = files.find("ann", write(files, BIG, name=name))
        assert b"".join(files.read(file, 5, PIECE_BYTES + 7)) == BIG[5 : PIECE_BYTES + 7]
    with files.begin("ann", "c.jsonl", "batch") as new:
        new.write(BIG)
    page, more = files.list("ann", limit=1)
    assert ([one.filename for one in page], more) == (["b.jsonl"], True)
    assert store.shelf.usage("file", "ann").size == 2 * len(BIG)
    for one in files.list("ann")[0]:
        files.remove("ann", one.id)
    assert store.shelf.usage("file", "ann").count == 0
    assert [key for key in redis_server.client().keys("*contents*") if b"content:" in key] == []
    store.close()


def test_a_store_that_did_it_and_did_not_say_so(store: SqliteStore, tmp_path: Path) -> None:
    """`finish` fails after it was done: the caller was told that there is no file, and so it is."""
    files = Contents(store.shelf)
    with pytest.raises(StoreUnreachable), files.begin("ann", "in.jsonl", "batch") as new:
        new.write(BIG)
        had = new._record
        new.finish()
        new._record, new._finished = had, False  # what it knows when the answer is lost
        raise StoreUnreachable("no answer")
    assert files.list("ann") == ([], False)
    assert left(store, tmp_path) == (0, 0)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "q.db")
    files = Contents(store.shelf)
    kept = write(files, b"{}\n")
    [(pages,)] = store._database._db.execute("PRAGMA page_count")
    store._database._db.execute(f"PRAGMA max_page_count = {pages + 300}")
    noise = hashlib.shake_128(b"noise").digest(3 * PIECE_BYTES)
    with pytest.raises(StoreFull):
        write(files, noise)
    assert [file.id for file in files.list("ann")[0]] == [kept]
    assert left(store, tmp_path) == (1, 0)
    assert write(files, noise[:PIECE_BYTES])
    store.close()
