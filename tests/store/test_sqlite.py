"""What is the embedded store's own: its file, its processes, what goes wrong with them, and how long a claim takes."""

import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from loramill.schemas.job import JobStatus
from loramill.store import sqlite_queue
from loramill.store.errors import Fenced, StoreError, StoreFull, StoreLost, StoreRefused, StoreUnreachable
from loramill.store.sqlite_file import WAL_SAFE
from loramill.store.sqlite_store import SqliteStore
from tests.contract.building import a_chunk, a_manifest, a_shard, a_spec, claimed, rows_of, submitted
from tests.store.unprivileged import as_nobody, folder_that_cannot_be_written, open_folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


def test_a_store_that_was_never_written_to_is_lost(path: Path) -> None:
    for _ in range(2):
        with pytest.raises(StoreLost, match=r"nothing was ever submitted to .*jobs\.db"):
            SqliteStore(path, create=False)
        assert not path.exists()
    path.touch()
    with pytest.raises(StoreLost, match="nothing was ever submitted"):
        SqliteStore(path, create=False)
    sqlite3.connect(path).execute("VACUUM").connection.close()  # an empty database, made by a kill at its birth
    with pytest.raises(StoreLost, match="nothing was ever submitted"):
        SqliteStore(path, create=False)
    SqliteStore(path).close()
    SqliteStore(path, create=False).close()


def test_a_folder_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(StoreRefused, match=r"there is no folder .*/nowhere"):
        SqliteStore(path.parent / "nowhere" / "jobs.db")
    with pytest.raises(StoreRefused, match="it is a folder"):
        SqliteStore(path.parent)


def test_a_folder_without_rights_is_refused() -> None:
    with folder_that_cannot_be_written() as folder, pytest.raises(StoreRefused, match="check the rights on its folder"):
        SqliteStore(folder / "jobs.db")


def test_a_file_without_rights_can_be_read_and_not_written() -> None:
    with open_folder() as folder:
        path = folder / "jobs.db"
        with SqliteStore(path) as store:
            submitted(store, "j", a_shard())
        path.chmod(0o444)
        with as_nobody():
            with pytest.raises(StoreRefused, match="readonly"):
                SqliteStore(path)
            with SqliteStore(path, create=False) as store:
                assert store.job("j").total == 4
                with pytest.raises(StoreRefused, match="readonly"):
                    store.cancel("j")


def test_what_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"something else entirely" * 100)
    for create in (True, False):
        with pytest.raises(StoreRefused, match="it is not a database"):
            SqliteStore(path, create=create)


def test_another_applications_database_is_refused_and_left_alone(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs (x)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreRefused, match="another application's"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_another_format_is_refused(path: Path) -> None:
    SqliteStore(path).close()
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version = 7")
    other.close()
    with pytest.raises(StoreRefused, match="its format is 7, and this loramill has 2"):
        SqliteStore(path)


@pytest.mark.skipif(sqlite3.sqlite_version_info >= WAL_SAFE, reason="this SQLite can be trusted with a WAL")
def test_a_log_that_this_sqlite_could_damage_is_refused(path: Path) -> None:
    SqliteStore(path).close()
    other = sqlite3.connect(path)
    other.execute("PRAGMA journal_mode = WAL")
    other.close()
    with pytest.raises(StoreRefused, match=r"use 3\.51\.3 or later"):
        SqliteStore(path)


def test_a_damaged_file_is_refused(path: Path) -> None:
    with SqliteStore(path) as store:
        for number in range(20):
            submitted(store, f"j{number}", a_shard(0, 50))
    raw = bytearray(path.read_bytes())
    raw[4096:-4096] = b"\xff" * (len(raw) - 8192)
    path.write_bytes(raw)
    with pytest.raises(StoreRefused, match="it is damaged"), SqliteStore(path) as store:
        store.jobs()


def test_a_file_that_is_removed_or_replaced_is_noticed(path: Path) -> None:
    with SqliteStore(path) as store:
        submitted(store, "j", a_shard())
        path.rename(path.with_name("old.db"))
        with pytest.raises(StoreLost, match="was removed or replaced"):
            store.job("j")
        SqliteStore(path).close()
        with pytest.raises(StoreLost, match="was removed or replaced"):
            store.stage(a_spec("k"))


def test_a_lock_that_outlasts_the_patience_is_unreachable_and_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramill.store.sqlite_file.BUSY_S", 0.2)
    with SqliteStore(path) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnreachable, match="locked by others"):
            store.stage(a_spec("j"))
        assert store.jobs() == [], "others can read meanwhile"
        other.execute("ROLLBACK")
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM jobs").fetchall()
        with pytest.raises(StoreUnreachable, match="locked by others"):
            store.stage(a_spec("j"))
        reader.execute("ROLLBACK")
        store.stage(a_spec("j"))
        other.close()
        reader.close()


def test_a_full_disk_refuses_the_whole_step_and_nothing_before_it(path: Path) -> None:
    with SqliteStore(path) as store:
        submitted(store, "j", a_shard(0, 4))
    size = path.stat().st_size
    code = f"""
        import os
        from loramill.store.errors import StoreFull
        from loramill.store.records import NewShard
        from loramill.store.sqlite_store import SqliteStore
        from tests.contract.building import a_spec
        with SqliteStore({str(path)!r}) as store:
            store.stage(a_spec("big"))
            try:
                for number in range(100):
                    store.add_shard("big", NewShard(number, [(number, os.urandom(20_000))]))
            except StoreFull as error:
                print(error)
            store.abandon("big")
            print(store.cancel("j").status)
    """
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 200_000}, {size + 200_000}))\n"
    done = subprocess.run([sys.executable, "-c", limit + textwrap.dedent(code)], capture_output=True, text=True)
    said = f"cannot write the store {path}: its disk, or what it may use of it, is full"
    assert done.stdout.splitlines() == [said, "cancelled"], done.stderr
    with SqliteStore(path, create=False) as store:
        assert [job.id for job in store.jobs()] == ["j"]


def test_the_reason_of_a_full_disk_is_store_full(path: Path) -> None:
    with SqliteStore(path) as store:
        with store._database.write() as db:
            [(pages,)] = db.execute("PRAGMA page_count")
            db.execute(f"PRAGMA max_page_count = {pages}")
        store.stage(a_spec("j"))
        with pytest.raises(StoreFull):
            store.add_shard("j", a_shard(0, 100_000))
        assert store.job("j").total == 0


def test_many_processes_may_create_the_same_store(path: Path) -> None:
    code = f"from loramill.store.sqlite_store import SqliteStore; print(SqliteStore({str(path)!r}).info().id)"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate()[0] for process in started}
    assert len(said) == 1 and len(said.pop().strip()) == 32


WORK = """
    import sys
    from loramill.store.sqlite_store import SqliteStore
    from tests.contract.building import a_chunk, a_manifest
    store = SqliteStore(sys.argv[1], create=False)
    while claim := store.claim(sys.argv[2], a_manifest().id):
        for position in range(claim.rows):
            if not claim.is_done(position):
                store.commit(claim.lease, a_chunk(claim.lease.shard, [position], by=sys.argv[2]))
                print(claim.lease.shard, position, flush=True)
"""


def start(path: Path, worker: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORK), str(path), worker], stdout=subprocess.PIPE, text=True
    )


def test_what_a_killed_worker_committed_stays_and_the_rest_is_done_by_others(path: Path) -> None:
    with SqliteStore(path, lease_s=1.0) as store:
        store.publish(a_manifest())
        submitted(store, "j", *(a_shard(number, 50) for number in range(6)))
        said: Counter[str] = Counter()
        for round_ in range(3):
            with start(path, f"killed-{round_}") as worker:
                assert worker.stdout is not None
                said.update(worker.stdout.readline().strip() for _ in range(7 + round_))
                worker.send_signal(signal.SIGKILL)
                said.update(line.strip() for line in worker.stdout if line.endswith("\n"))
        assert store.job("j").completed >= len(said) > 0
        assert set(said.values()) == {1}, "no row that was acknowledged ran again"
        with store._database.write() as db:
            db.execute("UPDATE shards SET deadline_ms = 0")  # its lease was the default 30 s
        assert store.reap().leases >= 1
        workers = [start(path, f"w-{number}") for number in range(2)]
        for worker in workers:
            said.update(line.strip() for line in worker.communicate()[0].splitlines())
        assert store.job("j").status is JobStatus.COMPLETED
        assert len(rows_of(store, "j")) == store.job("j").completed == 300
        assert set(said.values()) == {1}


def test_every_lease_can_be_taken_back_at_once(path: Path) -> None:
    with SqliteStore(path) as store:
        submitted(store, "j", a_shard(0), a_shard(1))
        before = claimed(store)
        store.commit(before.lease, a_chunk(0, [0]))
        assert store.take_back() == 1
        assert store.take_back() == 0
        with pytest.raises(Fenced):
            store.commit(before.lease, a_chunk(0, [1]))
        assert [(shard.state, shard.done, shard.attempts) for shard in store.shards("j")] == [
            ("ready", 1, 1),
            ("ready", 0, 0),
        ]


def test_threads_share_one_handle(path: Path) -> None:
    with SqliteStore(path) as store:
        store.publish(a_manifest())
        submitted(store, "j", *(a_shard(number, 2) for number in range(40)))
        seen: list[int] = []

        def work() -> None:
            while claim := store.claim("w", a_manifest().id):
                store.commit(claim.lease, a_chunk(claim.lease.shard, [0, 1]))
                seen.append(claim.lease.shard)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(seen) == list(range(40))
        assert store.job("j").status is JobStatus.COMPLETED


def test_a_failed_step_leaves_the_handle_usable(path: Path) -> None:
    with SqliteStore(path) as store:
        submitted(store, "j", a_shard(0, 3))
        claim = claimed(store)
        with pytest.raises(IndexError):
            store.commit(claim.lease, a_chunk(0, [0, 77]))
        assert store.job("j").completed == 0
        assert store.commit(claim.lease, a_chunk(0, [0, 1, 2])).shard_done


def test_only_the_latest_events_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramill.store.sqlite_jobs.EVENTS_KEPT", 10)
    with SqliteStore(path) as store:
        submitted(store, "j", a_shard(0, 3))
        for _ in range(20):
            store.release(claimed(store).lease)
        numbers = [event.number for event in store.events("j")]
        assert numbers == list(range(numbers[-1] - 9, numbers[-1] + 1))
        assert [event.number for event in store.events("j", after=numbers[-3])] == numbers[-2:]


def test_info_says_what_and_how_much(path: Path) -> None:
    with SqliteStore(path) as store:
        submitted(store, "j", a_shard(0, 3))
        info = store.info()
        assert info.url == f"sqlite:///{path}"
        assert info.server == f"sqlite {sqlite3.sqlite_version}"
        assert info.durable and info.pending_rows == 3
        assert info.used_bytes == path.stat().st_size
        assert info.limit_bytes is not None and info.limit_bytes > info.used_bytes


def test_a_closed_store_says_so(path: Path) -> None:
    store = SqliteStore(path)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.jobs()


def fill(store: SqliteStore, job: str, adapters: list[str], shards: int) -> None:
    """In one transaction: a real submit of so many takes minutes of syncing, and is not what is measured."""
    store.stage(a_spec(job))
    store.add_shard(job, a_shard(0, 1, "z"))
    with store._database.write() as db:
        said = [f'["{adapter}"]' for adapter in adapters]
        db.executemany("INSERT INTO needs (adapters) VALUES (?) ON CONFLICT DO NOTHING", ((one,) for one in said))
        ids = dict(db.execute("SELECT adapters, id FROM needs"))
        db.executemany(
            "INSERT INTO shards (job, number, base_id, need, state, rows, done)"
            " SELECT job, ?, base_id, ?, 'staged', 512, zeroblob(64) FROM shards WHERE job = ? AND number = 0",
            ((number, ids[said[number % len(said)]], job) for number in range(1, shards)),
        )
        db.execute("UPDATE jobs SET shards = ? WHERE id = ?", (shards, job))
    store.accept(job)


@pytest.mark.parametrize("foreign", [0, 10_000], ids=["all suit", "half do not"])
def test_a_claim_among_twenty_thousand_shards_is_quick(path: Path, foreign: int) -> None:
    """About 1 ms where all suit, 3 ms past ten thousand that do not; the bound is for slower machines."""
    adapters = [f"k{number}" for number in range(1000)]
    with SqliteStore(path) as store:
        if foreign:
            fill(store, "first", ["nobody's"], foreign)
        fill(store, "second", adapters, 20_000 - foreign)
        offers = a_manifest("ab").adapters[:1]
        manifest = a_manifest("").model_copy(
            update={"adapters": tuple(offers[0].model_copy(update={"key": key, "name": key}) for key in adapters)}
        )
        store.publish(manifest)
        resident = adapters[100:108]
        assert store.claim("w", manifest.id, resident) is not None  # reads the sets of adapters for the first time
        took = []
        for _ in range(50):
            started = time.thread_time()  # not the disk's time, and not what others do here
            claim = store.claim("w", manifest.id, resident)
            took.append(time.thread_time() - started)
            assert claim is not None and claim.adapters[0] in resident
        print(f"\nclaim among {sum(store.ready().values())}: {1e3 * min(took):.2f} to {1e3 * max(took):.2f} ms")
        assert min(took) < 0.010


def test_a_claim_walks_indexes_only(path: Path) -> None:
    with SqliteStore(path) as store, store._database.read() as db:
        for query, given in ((sqlite_queue._HEAD, 3), (sqlite_queue._FOR_ADAPTER, 4)):
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", ("x",) * given)]
            assert all(step.startswith("SEARCH") for step in plan), "no scan, no sorting"
            assert "(manifest=? AND need=?)" in plan[1]
