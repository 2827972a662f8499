"""The shelf of the embedded store: tables beside those of the jobs, and what is said in files beside the database."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

from loramill.store.errors import StoreError
from loramill.store.part_files import Files
from loramill.store.said_files import SaidFiles
from loramill.store.shelf import SAID_TTL_S, Record, RecordChanged, RecordExists, RecordNotFound, Shelf, Usage
from loramill.store.sqlite_file import Database, next_number

_COLUMNS = "kind, id, owner, data, size, version, created_ms, expires_ms"
_THERE = "(expires_ms IS NULL OR expires_ms > ?)"


class SqliteShelf(Shelf):
    """See `sqlite_file.py` for the tables."""

    def __init__(self, database: Database, files: Files | None, now_ms: Callable[[], int]) -> None:
        super().__init__(files)
        self._database, self._now_ms = database, now_ms
        self._said = SaidFiles(database.path.with_name(f"{database.path.name}-said"), SAID_TTL_S)

    def put(self, kind: str, id: str, owner: str, data: bytes, *, size: int = 0, ttl_s: float | None = None) -> Record:
        with self._database.write() as db:
            if db.execute("SELECT 1 FROM records WHERE kind = ? AND id = ?", (kind, id)).fetchone():
                raise RecordExists(f"there is a {kind} {id} already")
            number = next_number(db, "records")
            record = Record(kind, id, owner, data, size, number, self._now_ms(), self._until_ms(ttl_s))
            row = (number, *astuple(record))
            db.execute(f"INSERT INTO records (sequence, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            return record

    def get(self, kind: str, id: str) -> Record:
        with self._database.read() as db:
            return self._get(db, kind, id)

    def replace(self, record: Record, data: bytes, *, size: int | None = None, ttl_s: float | None = None) -> Record:
        with self._database.write() as db:
            had = self._get(db, record.kind, record.id)
            if had.version != record.version:
                raise RecordChanged(f"the {record.kind} {record.id} was changed meanwhile")
            changed = replace(
                had, data=data, size=had.size if size is None else size, version=next_number(db, "records"),
                expires_ms=self._until_ms(ttl_s),
            )  # fmt: skip
            db.execute(
                "UPDATE records SET data = ?, size = ?, version = ?, expires_ms = ? WHERE kind = ? AND id = ?",
                (data, changed.size, changed.version, changed.expires_ms, had.kind, had.id),
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
        query = f"SELECT {_COLUMNS} FROM records WHERE kind = ? AND {_THERE}"
        values: list[Any] = [kind, self._now_ms()]
        if owner is not None:
            query += " AND owner = ?"
            values.append(owner)
        with self._database.read() as db:
            if after is not None:
                if owner not in (None, self._get(db, kind, after).owner):
                    raise _not_found(kind, after)
                compared = ">" if oldest_first else "<"
                query += f" AND sequence {compared} (SELECT sequence FROM records WHERE kind = ? AND id = ?)"
                values += [kind, after]
            query += f" ORDER BY sequence {'ASC' if oldest_first else 'DESC'} LIMIT ?"
            return [Record(*row) for row in db.execute(query, (*values, limit))]

    def overdue(self, kind: str, limit: int = 100) -> list[Record]:
        with self._database.read() as db:
            query = f"SELECT {_COLUMNS} FROM records WHERE kind = ? AND expires_ms <= ? ORDER BY expires_ms, id LIMIT ?"
            return [Record(*row) for row in db.execute(query, (kind, self._now_ms(), limit))]

    def usage(self, kind: str, owner: str) -> Usage:
        with self._database.read() as db:
            query = f"SELECT count(*), coalesce(sum(size), 0) FROM records WHERE kind = ? AND owner = ? AND {_THERE}"
            return Usage(*db.execute(query, (kind, owner, self._now_ms())).fetchone())

    def lock(self, name: str, holder: str, seconds: float) -> bool:
        with self._database.write() as db:
            now_ms = self._now_ms()
            db.execute("DELETE FROM locks WHERE until_ms <= ?", (now_ms,))
            return db.execute(
                "INSERT INTO locks VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET until_ms = excluded.until_ms"
                " WHERE locks.holder = excluded.holder",
                (name, holder, now_ms + round(seconds * 1000)),
            ).rowcount > 0  # fmt: skip

    def unlock(self, name: str, holder: str) -> None:
        with self._database.write() as db:
            db.execute("DELETE FROM locks WHERE name = ? AND holder = ?", (name, holder))

    def say(self, channel: str, data: bytes) -> None:
        self._said.say(channel, data)

    def heard(self, channel: str, start: int = 0) -> list[bytes]:
        return self._said.heard(channel, start)

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

    def _until_ms(self, ttl_s: float | None) -> int | None:
        return None if ttl_s is None else self._now_ms() + round(ttl_s * 1000)


def _not_found(kind: str, id: str) -> RecordNotFound:
    return RecordNotFound(f"there is no {kind} {id}")
