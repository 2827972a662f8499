"""A job store's database file: made or opened, one transaction at a time, and what goes wrong with it in words."""

from __future__ import annotations

import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramill.store.errors import StoreError, StoreFull, StoreLost, StoreRefused, StoreUnreachable
from loramill.store.files import fsync_folder

APPLICATION_ID = 0x6C6D716A  # "lmqj"
FORMAT = 2
BUSY_S = 5.0
WAL_SAFE = (3, 51, 3)
"""Before it, two connections that checkpoint at once can corrupt a WAL database."""

_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_TRUNCATE)
_UNUSABLE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)
_WHY = {
    sqlite3.SQLITE_CANTOPEN: "it, or a file beside it, cannot be opened: check the rights on its folder",
    sqlite3.SQLITE_NOTADB: "it is not a database",
    sqlite3.SQLITE_CORRUPT: "it is damaged: bring back a copy of it",
}

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE jobs (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, status TEXT NOT NULL,
    created_ms INTEGER NOT NULL, touched_ms INTEGER NOT NULL, lane TEXT NOT NULL, accepted_ms INTEGER,
    expires_ms INTEGER, ended_ms INTEGER, cancelled_ms INTEGER,
    errors TEXT NOT NULL DEFAULT '[]', total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0, prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0, shards INTEGER NOT NULL DEFAULT 0,
    shards_done INTEGER NOT NULL DEFAULT 0, chunks INTEGER NOT NULL DEFAULT 0, events INTEGER NOT NULL DEFAULT 0);
CREATE INDEX jobs_ended ON jobs (ended_ms);
CREATE INDEX jobs_in ON jobs (lane, sequence);
CREATE INDEX jobs_answered ON jobs (ended_ms) WHERE lane = 'ask';
CREATE TABLE needs (id INTEGER PRIMARY KEY, adapters TEXT NOT NULL UNIQUE);
CREATE TABLE shards (
    job TEXT NOT NULL, number INTEGER NOT NULL, base_id TEXT NOT NULL, need INTEGER NOT NULL, rank REAL,
    state TEXT NOT NULL, rows INTEGER NOT NULL, rows_done INTEGER NOT NULL DEFAULT 0, done BLOB NOT NULL,
    suspects TEXT NOT NULL DEFAULT '[]', attempts INTEGER NOT NULL DEFAULT 0, worker TEXT,
    counter INTEGER, deadline_ms INTEGER, PRIMARY KEY (job, number)) WITHOUT ROWID;
CREATE INDEX shards_ready ON shards (base_id, rank, job, number, need, state, rows, rows_done) WHERE state = 'ready';
CREATE INDEX shards_leased ON shards (job, number) WHERE state = 'leased';
CREATE TABLE wants (
    base_id TEXT, adapter TEXT, rank REAL, job TEXT, number INTEGER, need INTEGER NOT NULL,
    PRIMARY KEY (base_id, adapter, rank, job, number)) WITHOUT ROWID;
CREATE TRIGGER now_ready AFTER UPDATE OF state ON shards WHEN new.state = 'ready' AND old.state <> 'ready' BEGIN
    INSERT INTO wants SELECT new.base_id, value, new.rank, new.job, new.number, new.need
        FROM json_each((SELECT adapters FROM needs WHERE id = new.need));
END;
CREATE TRIGGER not_ready AFTER UPDATE OF state ON shards WHEN old.state = 'ready' AND new.state <> 'ready' BEGIN
    DELETE FROM wants WHERE base_id = old.base_id AND rank = old.rank AND job = old.job AND number = old.number
        AND adapter IN (SELECT value FROM json_each((SELECT adapters FROM needs WHERE id = old.need)));
END;
CREATE TABLE inputs (job TEXT, number INTEGER, kept BLOB NOT NULL, PRIMARY KEY (job, number));
CREATE TABLE chunks (job TEXT, number INTEGER, entry BLOB NOT NULL, PRIMARY KEY (job, number));
CREATE TABLE events (job TEXT, number INTEGER, at_ms INTEGER NOT NULL, what TEXT NOT NULL,
    PRIMARY KEY (job, number)) WITHOUT ROWID;
CREATE TABLE manifests (sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, manifest TEXT NOT NULL);
CREATE TABLE workers (id TEXT PRIMARY KEY, heard_ms INTEGER NOT NULL, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE blobs (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE records (
    sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, id TEXT NOT NULL, owner TEXT NOT NULL,
    data BLOB NOT NULL, size INTEGER NOT NULL, version INTEGER NOT NULL, created_ms INTEGER NOT NULL,
    expires_ms INTEGER, UNIQUE (kind, id));
CREATE INDEX records_in ON records (kind, sequence);
CREATE INDEX records_of ON records (kind, owner, sequence, size, expires_ms);
CREATE INDEX records_due ON records (kind, expires_ms, id) WHERE expires_ms IS NOT NULL;
CREATE TABLE pieces (content TEXT, number INTEGER, kept BLOB NOT NULL, PRIMARY KEY (content, number));
CREATE TABLE locks (name TEXT PRIMARY KEY, holder TEXT NOT NULL, until_ms INTEGER NOT NULL) WITHOUT ROWID;
"""
# Typed as the columns that it is joined with: SQLite would not use its key otherwise.
_JUDGED = """
CREATE TEMP TABLE judged (manifest TEXT, need INTEGER, suits INTEGER, PRIMARY KEY (manifest, need)) WITHOUT ROWID
"""


class Database:
    """One connection, used by one thread at a time. Any number of processes may have the same file open."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """Raises StoreLost if the file is not there and not to be made, StoreRefused if it cannot be used."""
        self.path = path
        self._lock = threading.RLock()
        self._check_place(create)
        with self.failures():
            mode = "rwc" if create else "rw"
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False,
            )  # fmt: skip
        try:
            with self.failures():
                self._open(create)
        except BaseException:
            self._db.close()
            raise

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One atomic step, durable once it is left; nothing of it happened if it raises."""
        with self._step("BEGIN IMMEDIATE") as db:
            yield db

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """All that is read in it is of one moment."""
        with self._step("BEGIN") as db:
            yield db

    def close(self) -> None:
        """Lets go of the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turns what SQLite and the system say into store errors."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._said(error) from error
        except OSError as error:
            raise StoreRefused(f"cannot use the store {self.path}: {error.strerror or error}") from error

    def _check_place(self, create: bool) -> None:
        with self.failures():
            if not self.path.parent.is_dir():
                raise StoreRefused(f"cannot use the store {self.path}: there is no folder {self.path.parent}")
            if self.path.is_dir():
                raise StoreRefused(f"cannot use the store {self.path}: it is a folder; name a file in it")
            if not create and not (self.path.exists() and self.path.stat().st_size):
                raise StoreLost(self._never())

    def _open(self, create: bool) -> None:
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA temp_store = MEMORY")
        [(mode,)] = self._db.execute("PRAGMA journal_mode")
        if mode == "wal" and sqlite3.sqlite_version_info < WAL_SAFE:
            raise StoreRefused(
                f"cannot use the store {self.path}: a newer SQLite made it with a log that SQLite "
                f"{sqlite3.sqlite_version} can damage; use {'.'.join(map(str, WAL_SAFE))} or later"
            )
        if mode != "wal":
            # A truncated journal is synced, a deleted one's folder is not: a commit must outlive a loss of power.
            self._db.execute("PRAGMA journal_mode = TRUNCATE")
        if self._is_new():
            if not create:
                raise StoreLost(self._never())
            self._make()
        [(application,)] = self._db.execute("PRAGMA application_id")
        [(version,)] = self._db.execute("PRAGMA user_version")
        if application != APPLICATION_ID:
            raise StoreRefused(f"cannot use the store {self.path}: it is another application's database")
        if version != FORMAT:
            raise StoreRefused(
                f"cannot use the store {self.path}: its format is {version}, and this loramill has {FORMAT}; "
                "finish its jobs with the version that made it"
            )
        self._file = self._identity()
        if create:
            # Refused now, not in the midst of a submit, if it cannot be written.
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute("UPDATE meta SET value = value")
            finally:
                self._db.execute("ROLLBACK")
        self._db.execute(_JUDGED)
        [(self.id,)] = self._db.execute("SELECT value FROM meta WHERE name = 'id'")

    def _is_new(self) -> bool:
        [(application,)] = self._db.execute("PRAGMA application_id")
        return application == 0 and self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None

    def _make(self) -> None:
        if sqlite3.sqlite_version_info >= WAL_SAFE:
            self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self._is_new():  # and no other process was quicker
                for statement in _statements(_SCHEMA):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {FORMAT}")
                self._db.execute("INSERT INTO meta VALUES ('id', ?)", (uuid.uuid4().hex,))
                self._db.execute("INSERT INTO meta VALUES ('leases', 0), ('expired', 0), ('records', 0)")
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        fsync_folder(self.path.parent)

    @contextmanager
    def _step(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, self.failures():
            if self._identity() != self._file:
                # SQLite would go on writing to a file that has no name any more.
                raise StoreLost(f"the store {self.path} was removed or replaced while it was in use")
            self._db.execute(begin)
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _never(self) -> str:
        return f"nothing was ever submitted to {self.path}: check the path, or submit a job first"

    def _said(self, error: sqlite3.Error) -> StoreError:
        extended = getattr(error, "sqlite_errorcode", 0)
        code = extended & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreUnreachable(f"the store {self.path} was locked by others for {BUSY_S:g} s: try again")
        if code in _FULL or extended in _FULL:
            return StoreFull(f"cannot write the store {self.path}: its disk, or what it may use of it, is full")
        if code in _WHY or code in _UNUSABLE:
            return StoreRefused(f"cannot use the store {self.path}: {_WHY.get(code, error)}")
        return StoreError(f"the store {self.path} failed: {error}")


def next_number(db: sqlite3.Connection, name: str) -> int:
    """Of a count in `meta`: never given twice."""
    db.execute("UPDATE meta SET value = value + 1 WHERE name = ?", (name,))
    [(number,)] = db.execute("SELECT value FROM meta WHERE name = ?", (name,))
    return int(number)


def _statements(script: str) -> Iterator[str]:
    """One at a time, since a script would end the transaction; a trigger has semicolons inside."""
    statement = ""
    for line in script.strip().splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
