"""The shelf of the embedded store: tables beside those of the jobs."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from loramill.store.errors import StoreError
from loramill.store.part_files import Files
from loramill.store.shelf import SAID_TTL_S, Record, RecordChanged, RecordExists, RecordNotFound, Shelf, Usage
from loramill.store.sqlite_file import Database

_COLUMNS = "kind, id, owner, data, size, version, created_ms, expires_ms"
_THERE = "(expires_ms IS NULL OR expires_ms > ?)"


class SqliteShelf(Shelf):
    """See `sqlite_file.py` for the tables."""

    def __init__(self, database: Database, files: Files | None, now_ms: Callable[[], int]) -> None:
        super().__init__(files)
        self._database, self._now_ms = database, now_ms

    def put(self, kind: str, id: str, owner: str, data: bytes, *, size: int = 0, ttl_s: float | None = None) -> Record:
        with self._database.write() as db:
            if db.execute("SELECT 1 FROM records WHERE kind = ? AND id = ?", (kind, id)).fetchone():
                raise RecordExists(f"there is a {kind} {id} already")
            now_ms = self._now_ms()
            record = Record(kind, id, owner, data, size, 1, now_ms, _until_ms(now_ms, ttl_s))
            db.execute(f"INSERT INTO records ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _row(record))
            return record

    def get(self, kind: str, id: str) -> Record:
        with self._database.read() as db:
            return self._get(db, kind, id)

    def replace(self, record: Record, data: bytes, *, size: int | None = None, ttl_s: float | None = None) -> Record:
        with self._database.write() as db:
            had = self._get(db, record.kind, record.id)
            if had.version != record.version:
                raise RecordChanged(f"the {record.kind} {record.id} was changed meanwhile")
            size, until_ms = had.size if size is None else size, _until_ms(self._now_ms(), ttl_s)
            changed = Record(
                had.kind, had.id, had.owner, data, size, had.version + 1, had.created_ms, until_ms
            )  # fmt: skip
            db.execute(
                "UPDATE records SET data = ?, size = ?, version = ?, expires_ms = ? WHERE kind = ? AND id = ?",
                (data, size, changed.version, until_ms, had.kind, had.id),
            )
            return changed

    def remove(self, kind: str, id: str) -> bool:
        with self._database.write() as db:
            return db.execute("DELETE FROM records WHERE kind = ? AND id = ?", (kind, id)).rowcount > 0

    def records(
        self,
        kind: str,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        oldest_first: bool = False,
    ) -> list[Record]:
        with self._database.read() as db:
            query = f"SELECT {_COLUMNS} FROM records WHERE kind = ? AND (? IS NULL OR owner = ?) AND {_THERE}"
            values: list[Any] = [kind, owner, owner, self._now_ms()]
            if after is not None:
                if owner not in (None, self._get(db, kind, after).owner):
                    raise _not_found(kind, after)
                [(sequence,)] = db.execute("SELECT sequence FROM records WHERE kind = ? AND id = ?", (kind, after))
                query += f" AND sequence {'>' if oldest_first else '<'} ?"
                values.append(sequence)
            query += f" ORDER BY sequence {'ASC' if oldest_first else 'DESC'} LIMIT ?"
            return [Record(*row) for row in db.execute(query, (*values, limit))]

    def overdue(self, kind: str, limit: int = 100) -> list[Record]:
        with self._database.read() as db:
            query = f"SELECT {_COLUMNS} FROM records WHERE kind = ? AND expires_ms <= ? ORDER BY expires_ms LIMIT ?"
            return [Record(*row) for row in db.execute(query, (kind, self._now_ms(), limit))]

    def usage(self, kind: str, owner: str) -> Usage:
        with self._database.read() as db:
            query = f"SELECT count(*), coalesce(sum(size), 0) FROM records WHERE kind = ? AND owner = ? AND {_THERE}"
            return Usage(*db.execute(query, (kind, owner, self._now_ms())).fetchone())

    def lock(self, name: str, holder: str, seconds: float) -> bool:
        with self._database.write() as db:
            now_ms = self._now_ms()
            return db.execute(
                "INSERT INTO locks VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE"
                " SET holder = excluded.holder, until_ms = excluded.until_ms"
                " WHERE locks.holder = excluded.holder OR locks.until_ms <= ?",
                (name, holder, now_ms + round(seconds * 1000), now_ms),
            ).rowcount > 0  # fmt: skip

    def unlock(self, name: str, holder: str) -> None:
        with self._database.write() as db:
            db.execute("DELETE FROM locks WHERE name = ? AND holder = ?", (name, holder))

    def say(self, channel: str, data: bytes) -> None:
        with self._database.write() as db:
            now_ms = self._now_ms()
            db.execute("DELETE FROM said WHERE at_ms < ?", (now_ms - round(SAID_TTL_S * 1000),))
            db.execute(
                "INSERT INTO said SELECT ?, count(*), ?, ? FROM said WHERE channel = ?",
                (channel, now_ms, data, channel),
            )

    def heard(self, channel: str, start: int = 0) -> list[bytes]:
        with self._database.read() as db:
            query = "SELECT data FROM said WHERE channel = ? AND number >= ? ORDER BY number"
            return [data for (data,) in db.execute(query, (channel, start))]

    def _put_piece(self, content: str, number: int, kept: bytes) -> None:
        with self._database.write() as db:
            db.execute("INSERT OR REPLACE INTO pieces VALUES (?, ?, ?)", (content, number, kept))

    def _piece(self, content: str, number: int) -> bytes:
        with self._database.read() as db:
            query = "SELECT kept FROM pieces WHERE content = ? AND number = ?"
            found = db.execute(query, (content, number)).fetchone()
        if found is None:
            raise StoreError(f"the store {self._database.path} has no piece {number} of {content}")
        return bytes(found[0])

    def _remove_pieces(self, content: str) -> None:
        with self._database.write() as db:
            db.execute("DELETE FROM pieces WHERE content = ?", (content,))

    def _get(self, db: sqlite3.Connection, kind: str, id: str) -> Record:
        query = f"SELECT {_COLUMNS} FROM records WHERE kind = ? AND id = ? AND {_THERE}"
        found = db.execute(query, (kind, id, self._now_ms())).fetchone()
        if found is None:
            raise _not_found(kind, id)
        return Record(*found)


def _row(record: Record) -> tuple[Any, ...]:
    return (
        record.kind, record.id, record.owner, record.data, record.size, record.version, record.created_ms,
        record.expires_ms,
    )  # fmt: skip


def _until_ms(now_ms: int, ttl_s: float | None) -> int | None:
    return None if ttl_s is None else now_ms + round(ttl_s * 1000)


def _not_found(kind: str, id: str) -> RecordNotFound:
    return RecordNotFound(f"there is no {kind} {id}")
