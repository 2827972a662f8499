"""A file while it is written, and what its record says of it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import orjson

from loramill.schemas.file_objects import FileObject
from loramill.store.errors import StoreError
from loramill.store.shelf import PIECE_BYTES, Record, RecordChanged, RecordNotFound, Shelf

UNFINISHED_S = 3600.0
"""How long a file that nobody writes any more is kept: its server is gone."""
RENEW_S = 60.0


class State(StrEnum):
    """Of a record of a file."""

    UPLOADING = "uploading"
    PROCESSED = "processed"


class ContentTooLong(Exception):
    """More was written than the file may have."""


@dataclass(slots=True, frozen=True)
class StoredFile:
    """A file that is there as a whole. Times are in seconds since 1970."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: int
    expires_at: int | None
    contents: tuple[tuple[str, int], ...]
    """What it is made of, one after another: contents of the shelf, and their bytes."""

    def object(self) -> FileObject:
        """As OpenAI's clients see it."""
        said = {
            name: getattr(self, name) for name in ("id", "bytes", "created_at", "expires_at", "filename", "purpose")
        }
        return FileObject.model_validate(said)


class Writing:
    """A file while it is written, by one thread. Left without `finish`, it is abandoned."""

    def __init__(
        self,
        shelf: Shelf,
        record: Record,
        filename: str,
        purpose: str,
        content: str,
        ttl_s: float | None,
        max_bytes: int | None,
    ) -> None:
        self.id, self.bytes = record.id, 0
        self.ttl_s = ttl_s
        """May be set until `finish`."""
        self._shelf, self._record, self._content = shelf, record, content
        self._filename, self._purpose, self._max_bytes = filename, purpose, max_bytes
        self._pieces = 0
        self._held = bytearray()
        self._sha256 = hashlib.sha256()
        self._finished = False
        self._lock = threading.Lock()
        self._began = self._renewed = time.monotonic()

    def write(self, data: bytes) -> None:
        """Adds to it. Raises ContentTooLong."""
        with self._lock:
            if self._finished:
                raise StoreError(f"the file {self.id} was abandoned")
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
        self._record = self._shelf.replace(self._record, self._record.data, size=self.bytes, ttl_s=UNFINISHED_S)
        self._renewed = time.monotonic()

    def finish(self) -> StoredFile:
        """From now on it is there. Raises RecordNotFound, RecordChanged if it was taken away meanwhile."""
        if self._held:
            self._put(len(self._held))
        said = {"bytes": self.bytes, "sha256": self._sha256.hexdigest()}
        data = data_of(State.PROCESSED, self._filename, self._purpose, ((self._content, self.bytes),), **said)
        ttl_s = None if self.ttl_s is None else max(1.0, self.ttl_s - (time.monotonic() - self._began))
        self._record = self._shelf.replace(self._record, data, size=self.bytes, ttl_s=ttl_s)
        self._finished = True
        file = stored(self._record)
        assert file is not None
        return file

    def abandon(self) -> None:
        """Removes what was written; nothing once it is finished. Any thread may call it."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
        try:
            record = self._shelf.get(self._record.kind, self.id)
            # Looked at rather than known: a store that did not answer `finish` may have done it.
            if contents_of(record)[-1][0] == self._content:
                clear(self._shelf, self._shelf.replace(record, record.data, ttl_s=0))
                return
        except (RecordChanged, RecordNotFound):
            pass
        self._shelf.remove_content(self._content)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(StoreError):  # its time will be up
            self.abandon()

    def _put(self, size: int) -> None:
        self._shelf.put_piece(self._content, self._pieces, bytes(self._held[:size]))
        del self._held[:size]
        self._pieces += 1


def data_of(state: State, filename: str, purpose: str, contents: Sequence[tuple[str, int]], **more: Any) -> bytes:
    """What a record of a file says."""
    return orjson.dumps({"status": state, "filename": filename, "purpose": purpose, "contents": contents} | more)


def contents_of(record: Record) -> list[tuple[str, int]]:
    """The contents that belong to it, with their bytes."""
    return [(content, size) for content, size in orjson.loads(record.data)["contents"]]


def stored(record: Record) -> StoredFile | None:
    """The file that a record speaks of; None while it is not finished."""
    said = orjson.loads(record.data)
    if said.pop("status") != State.PROCESSED:
        return None
    created_at = record.created_ms // 1000
    expires_at = None if record.expires_ms is None else record.expires_ms // 1000
    contents = tuple(contents_of(record))
    return StoredFile(
        **said | {"contents": contents}, id=record.id, owner=record.owner, created_at=created_at, expires_at=expires_at
    )


def clear(shelf: Shelf, record: Record) -> None:
    """Removes it with its contents. Its time must be up: a crash in between leaves it without some of them."""
    for content, _ in contents_of(record):
        shelf.remove_content(content)
    shelf.remove(record.kind, record.id)
