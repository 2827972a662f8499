"""The embedded store's first form: the results of one job, in one SQLite file, committed as rows finish."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import zstandard

from loramill.store.errors import JournalBusy, JournalDamaged, JournalMismatch, StoreError
from loramill.store.files import fsync_folder
from loramill.store.records import DoneRow as DoneRow

FORMAT = "1"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_COMPRESS_FROM = 512  # bytes; below it, zstd saves less than SQLite's own overhead for a row

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (part TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS decisions (name TEXT PRIMARY KEY, decision TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (
    row INTEGER PRIMARY KEY, failed INTEGER NOT NULL, line BLOB NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL);
"""


@dataclass(slots=True, frozen=True)
class Totals:
    """What a journal holds."""

    done: int
    failed: int
    prompt_tokens: int
    completion_tokens: int


class Journal:
    """One job's finished rows. A commit is durable when it returns; a row that was committed once stays as it is.

    One process at a time: the file is held locked until `close` (or the end of the process, however it ends).
    Raises JournalBusy, JournalMismatch, JournalDamaged, or another StoreError (disk full, read-only folder).
    """

    def __init__(
        self, path: Path, identity: Mapping[str, str], *, kept_elsewhere: Callable[[], bool] = lambda: False
    ) -> None:
        """Opens the journal at `path`, or creates it. `identity` maps each part of the job that decides its answers
        (as a person calls it: "input", "adapter `sql`", "--seed") to a value that changes when the part does.
        `kept_elsewhere` says whether there are finished rows of the job that the journal does not hold."""
        self.path = path
        self.identity_sha256 = sha256(json.dumps(sorted(identity.items())).encode()).hexdigest()
        """Names the job: the same in every process that works on it."""
        self._compress = zstandard.ZstdCompressor(level=1).compress
        self._decompress = zstandard.ZstdDecompressor().decompress
        with self._failures("open"):
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            with self._failures("open"):
                self._open(identity, kept_elsewhere)
        except BaseException:
            self._db.close()
            raise

    def _open(self, identity: Mapping[str, str], kept_elsewhere: Callable[[], bool]) -> None:
        # One connection in one process: exclusive locking is the run's lock, and keeps the WAL index out of a file.
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        with self._transaction():
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._db.execute(statement)
            wanted = {"journal format": FORMAT, **identity}
            found = dict(self._db.execute("SELECT part, value FROM meta"))
            changed = _differences(found, wanted)
            # Without a row it is nobody's: a run that ended before its first one must not bind the next.
            begun = self._db.execute("SELECT 1 FROM rows LIMIT 1").fetchone() is not None
            if found and changed and (begun or kept_elsewhere()):
                raise JournalMismatch(str(self.path), changed)
            if changed:
                self._db.execute("DELETE FROM meta")
                self._db.execute("DELETE FROM decisions")
                self._db.executemany("INSERT INTO meta VALUES (?, ?)", wanted.items())
        fsync_folder(self.path.parent)

    def decisions(self) -> dict[str, str]:
        """What an earlier process decided for this job, and this one is to decide alike."""
        with self._failures("read"):
            return dict(self._db.execute("SELECT name, decision FROM decisions"))

    def decide(self, decisions: Mapping[str, str]) -> None:
        """Keeps decisions, all or none; what was decided before stays as it is."""
        with self._failures("write"), self._transaction():
            self._db.executemany("INSERT INTO decisions VALUES (?, ?) ON CONFLICT DO NOTHING", decisions.items())

    def commit(self, rows: Iterable[DoneRow]) -> None:
        """Makes `rows` durable, all or none. Rows that are there already are left alone."""
        with self._failures("write"), self._transaction():
            self._db.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                ((r.row, r.failed, self._packed(r.line), r.prompt_tokens, r.completion_tokens) for r in rows),
            )

    def done(self, rows: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """(rows,) whether each row of the job is finished."""
        mask = np.zeros(rows, dtype=np.bool_)
        with self._failures("read"):
            cursor = self._db.execute("SELECT row FROM rows WHERE row < ?", (rows,))
            while some := cursor.fetchmany(65536):
                mask[[row for (row,) in some]] = True
        return mask

    def totals(self) -> Totals:
        """Counts over all finished rows."""
        with self._failures("read"):
            query = "SELECT count(*), sum(failed), sum(prompt_tokens), sum(completion_tokens) FROM rows"
            return Totals(*(value or 0 for value in self._db.execute(query).fetchone()))

    def lines(self, *, failed: bool) -> Iterator[bytes]:
        """The lines of the failed or of the other rows, in row order, read as they are taken."""
        with self._failures("read"):
            for (line,) in self._db.execute("SELECT line FROM rows WHERE failed = ? ORDER BY row", (failed,)):
                yield self._decompress(line) if line.startswith(_ZSTD_MAGIC) else line

    def close(self) -> None:
        """Releases the file; what was committed stays."""
        self._db.close()

    def delete(self) -> None:
        """Closes the journal and removes it."""
        self.close()
        remove_journal(self.path)

    def _packed(self, line: bytes) -> bytes:
        if len(line) < _COMPRESS_FROM:
            return line
        packed = self._compress(line)
        return packed if len(packed) < len(line) else line

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise JournalBusy(f"another process is at this job: it holds {self.path}") from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise JournalDamaged(f"{self.path} is damaged: {error}") from error
            raise StoreError(f"cannot {doing} the journal {self.path}: {error}") from error
        except zstandard.ZstdError as error:
            raise JournalDamaged(f"{self.path} is damaged: {error}") from error


def remove_journal(path: Path) -> None:
    """Removes a journal that nobody holds, with what SQLite keeps beside it."""
    # The database goes last: killed in between, the next run still finds a journal, not a log that belongs to nothing.
    for name in (f"{path.name}-wal", f"{path.name}-shm", path.name):
        path.with_name(name).unlink(missing_ok=True)


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    parts = list(dict.fromkeys([*wanted, *found]))
    return [
        f"{part} changed since" if part in found and part in wanted
        else f"{part} is new" if part in wanted
        else f"{part} is gone"
        for part in parts
        if found.get(part) != wanted.get(part)
    ]  # fmt: skip
