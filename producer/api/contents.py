"""Files in a store: written piece by piece, there once they are whole, read from any byte."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import orjson

from loramill.schemas.file_objects import FileObject
from loramill.store.errors import StoreError
from loramill.store.shelf import PIECE_BYTES, Record, RecordChanged, RecordExists, RecordNotFound, Shelf

Purpose = Literal["batch", "batch_output"]

KIND = "file"
UNFINISHED_S = 3600.0
"""How long a file that nobody writes any more is kept: its server is gone."""
RENEW_S = 60.0

_PROCESSED, _UPLOADING = "processed", "uploading"
_PAGE = 200


class ContentTooLong(Exception):
    """More was written than the file may have."""


@dataclass(slots=True, frozen=True)
class StoredFile:
    """A file that is there as a whole. Times are in seconds since 1970."""

    id: str
    owner: str
    filename: str
    purpose: Purpose
    bytes: int
    sha256: str
    created_at: int
    expires_at: int | None
    contents: tuple[tuple[str, int], ...]
    """What it is made of, one after another: contents of the shelf, and their bytes."""

    def object(self) -> FileObject:
        """As OpenAI's clients see it."""
        return FileObject(
            id=self.id, bytes=self.bytes, created_at=self.created_at, expires_at=self.expires_at,
            filename=self.filename, purpose=self.purpose,
        )  # fmt: skip


class Contents:
    """Every file is a record, which says what contents belong to it, and those contents. A record that is not finished
    has a time by which it is removed, so nothing that a crash leaves stays. Any thread may call any method; each may
    raise StoreError."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def begin(
        self,
        owner: str,
        filename: str,
        purpose: Purpose,
        *,
        ttl_s: float | None = None,
        max_bytes: int | None = None,
        id: str | None = None,
        expected: int = 0,
    ) -> Writing:
        """A new file. `ttl_s`: how long it is kept, for ever if None; `expected`: bytes that count as the owner's while
        it is written. With an `id` that is there already it is written anew: the old one is gone from now on."""
        file_id = id or new_id("file")
        content = f"{file_id}-{secrets.token_hex(4)}"
        data = _data(_UPLOADING, filename, purpose, ((content, 0),))
        try:
            record = self._shelf.put(KIND, file_id, owner, data, size=expected, ttl_s=UNFINISHED_S)
        except RecordExists:
            record = self._take_over(file_id, owner, content, data, expected)
        return Writing(self._shelf, record, filename, purpose, content, ttl_s, max_bytes, expected)

    def find(self, owner: str, file_id: str) -> StoredFile:
        """Raises RecordNotFound, also for another's and for one that is not finished."""
        record = self._shelf.get(KIND, file_id)
        file = _stored(record)
        if record.owner != owner or file is None:
            raise RecordNotFound(f"there is no file {file_id}")
        return file

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        limit: int = 10_000,
        oldest_first: bool = False,
        purpose: str | None = None,
    ) -> tuple[list[StoredFile], bool]:
        """A page, and whether there are more. Raises RecordNotFound for an `after` that is not there."""
        if after is not None:
            self.find(owner, after)
        found: list[StoredFile] = []
        while True:
            records = self._shelf.records(KIND, owner, after=after, limit=_PAGE, oldest_first=oldest_first)
            for record in records:
                file = _stored(record)
                if file is not None and purpose in (None, file.purpose):
                    if len(found) == limit:
                        return found, True
                    found.append(file)
            if len(records) < _PAGE:
                return found, False
            after = records[-1].id

    def read(self, file: StoredFile, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Its bytes from `start` to before `stop`, a piece at a time."""
        stop = file.bytes if stop is None else min(stop, file.bytes)
        for content, size in file.contents:
            at, end = max(start, 0), min(stop, size)
            while at < end:
                number, offset = divmod(at, PIECE_BYTES)
                data = self._shelf.piece(content, number)[offset : offset + end - at]
                if not data:
                    raise StoreError(f"the file {file.id} is shorter than it should be")
                yield data
                at += len(data)
            start, stop = start - size, stop - size

    def save(self, file: StoredFile, path: Path) -> None:
        """To a local file, for reading it twice. Raises OSError too."""
        with path.open("wb") as target:
            for data in self.read(file):
                target.write(data)

    def remove(self, owner: str, file_id: str) -> None:
        """Raises RecordNotFound like `find`."""
        self.find(owner, file_id)
        record = self._shelf.get(KIND, file_id)
        # Gone at once; what a crash leaves of it is overdue.
        _clear(self._shelf, self._shelf.replace(record, record.data, ttl_s=0))

    def tidy(self) -> int:
        """Removes the files whose time is up, contents first; how many."""
        removed = 0
        while records := self._shelf.overdue(KIND):
            for record in records:
                _clear(self._shelf, record)
            removed += len(records)
        return removed

    def _take_over(self, file_id: str, owner: str, content: str, data: bytes, size: int) -> Record:
        try:
            had = self._shelf.get(KIND, file_id)
        except RecordNotFound:  # its time is up, and it was not removed yet
            self.tidy()
            return self._shelf.put(KIND, file_id, owner, data, size=size, ttl_s=UNFINISHED_S)
        old = orjson.loads(had.data)
        # Replaced rather than removed: whoever still writes the old one finds another version at its end.
        said = orjson.loads(data)
        both = orjson.dumps(said | {"contents": [*old["contents"], *said["contents"]]})
        record = self._shelf.replace(had, both, size=size, ttl_s=UNFINISHED_S)
        for name, _ in old["contents"]:
            self._shelf.remove_content(name)
        return record


class Writing:
    """A file while it is written, by one thread at a time. Left without `finish`, it is abandoned."""

    def __init__(
        self,
        shelf: Shelf,
        record: Record,
        filename: str,
        purpose: Purpose,
        content: str,
        ttl_s: float | None,
        max_bytes: int | None,
        expected: int,
    ) -> None:
        self.id, self.filename, self.purpose, self.ttl_s = record.id, filename, purpose, ttl_s
        """All but the id may change until `finish`."""
        self.bytes = 0
        self._shelf, self._record, self._content = shelf, record, content
        self._max_bytes, self._expected = max_bytes, expected
        self._pieces = 0
        self._held = bytearray()
        self._sha256 = hashlib.sha256()
        self._finished = False
        self._began = self._renewed = time.monotonic()

    def write(self, data: bytes) -> None:
        """Adds to it. Raises ContentTooLong."""
        self.bytes += len(data)
        if self._max_bytes is not None and self.bytes > self._max_bytes:
            raise ContentTooLong(f"the file is longer than {self._max_bytes} bytes")
        self._sha256.update(data)
        self._held += data
        while len(self._held) >= PIECE_BYTES:
            self._put(PIECE_BYTES)
        if time.monotonic() - self._renewed > RENEW_S:
            self.renew()

    def renew(self) -> None:
        """It is still written, and counts for what it has by now. Called by `write` now and then."""
        size = max(self.bytes, self._expected)
        self._record = self._shelf.replace(self._record, self._record.data, size=size, ttl_s=UNFINISHED_S)
        self._renewed = time.monotonic()

    def finish(self) -> StoredFile:
        """From now on it is there. Raises RecordNotFound, RecordChanged if it was taken away meanwhile."""
        if self._held:
            self._put(len(self._held))
        said = {"bytes": self.bytes, "sha256": self._sha256.hexdigest()}
        data = _data(_PROCESSED, self.filename, self.purpose, ((self._content, self.bytes),), **said)
        ttl_s = None if self.ttl_s is None else max(1.0, self.ttl_s - (time.monotonic() - self._began))
        self._record = self._shelf.replace(self._record, data, size=self.bytes, ttl_s=ttl_s)
        self._finished = True
        file = _stored(self._record)
        assert file is not None
        return file

    def abandon(self) -> None:
        """Removes what was written; nothing once it is finished."""
        if self._finished:
            return
        self._finished = True
        try:
            gone = self._shelf.replace(self._record, self._record.data, ttl_s=0)
        except (RecordChanged, RecordNotFound):  # the record is another's by now, or was removed
            self._shelf.remove_content(self._content)
        else:
            _clear(self._shelf, gone)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(StoreError):  # its time will be up
            self.abandon()

    def _put(self, size: int) -> None:
        self._shelf.put_piece(self._content, self._pieces, bytes(self._held[:size]))
        del self._held[:size]
        self._pieces += 1


def new_id(kind: str, join: str = "-") -> str:
    """Nobody can guess it."""
    return f"{kind}{join}{secrets.token_hex(12)}"


def _clear(shelf: Shelf, record: Record) -> None:
    for content, _ in orjson.loads(record.data)["contents"]:
        shelf.remove_content(content)
    shelf.remove(record.kind, record.id)


def _data(status: str, filename: str, purpose: str, contents: tuple[tuple[str, int], ...], **more: Any) -> bytes:
    said = {"status": status, "filename": filename, "purpose": purpose, "contents": contents}
    return orjson.dumps(said | more)


def _stored(record: Record) -> StoredFile | None:
    said = orjson.loads(record.data)
    if said["status"] != _PROCESSED:
        return None
    return StoredFile(
        id=record.id,
        owner=record.owner,
        filename=said["filename"],
        purpose=said["purpose"],
        bytes=said["bytes"],
        sha256=said["sha256"],
        created_at=record.created_ms // 1000,
        expires_at=None if record.expires_ms is None else record.expires_ms // 1000,
        contents=tuple((content, size) for content, size in said["contents"]),
    )
