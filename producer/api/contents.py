"""Files in a store: written piece by piece, there once they are whole, read from any byte."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from loramill.producer.api.writing import (
    UNFINISHED_S,
    ContentTooLong,
    State,
    StoredFile,
    Writing,
    clear,
    contents_of,
    data_of,
    stored,
)
from loramill.store.errors import StoreError
from loramill.store.shelf import PIECE_BYTES, Record, RecordExists, RecordNotFound, Shelf

__all__ = ["KIND", "PART_KIND", "ContentTooLong", "Contents", "StoredFile", "Writing", "new_id"]

KIND, PART_KIND = "file", "part"

_PAGE = 200


class Contents:
    """Every file is a record, which says what contents belong to it, and those contents. A record that is not finished
    has a time by which it is removed, so nothing that a crash leaves stays. Any thread may call any method; each may
    raise StoreError."""

    def __init__(self, shelf: Shelf, kind: str = KIND, prefix: str = "file-") -> None:
        """`prefix`: of new ids."""
        self._shelf, self._kind, self._prefix = shelf, kind, prefix

    def begin(
        self,
        owner: str,
        filename: str,
        purpose: str,
        *,
        ttl_s: float | None = None,
        max_bytes: int | None = None,
        id: str | None = None,
    ) -> Writing:
        """A new file. `ttl_s`: how long it is kept, for ever if None. With an `id` that is there already it is written
        anew: the old one is gone from now on."""
        file_id = id or new_id(self._prefix)
        content = f"{file_id}-{secrets.token_hex(4)}"
        if id is not None:
            self.tidy()  # one that is overdue would be in the way
        try:
            data = data_of(State.UPLOADING, filename, purpose, [(content, 0)])
            record = self._shelf.put(self._kind, file_id, owner, data, ttl_s=UNFINISHED_S)
        except RecordExists:
            record = self._take_over(file_id, filename, purpose, content)
        return Writing(self._shelf, record, filename, purpose, content, ttl_s, max_bytes)

    def find(self, owner: str, file_id: str) -> StoredFile:
        """Raises RecordNotFound, also for another's and for one that is not finished."""
        record = self._shelf.get(self._kind, file_id)
        file = stored(record)
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
            records = self._shelf.records(self._kind, owner, after=after, limit=_PAGE, oldest_first=oldest_first)
            for record in records:
                file = stored(record)
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
        record = self._shelf.get(self._kind, file_id)
        # Gone at once; what a crash leaves of it is overdue.
        self._clear(self._shelf.replace(record, record.data, ttl_s=0))

    def join(
        self, parts: Sequence[StoredFile], owner: str, filename: str, purpose: str, *, id: str, sha256: str,
        ttl_s: float | None = None,
    ) -> StoredFile:  # fmt: skip
        """A file made of what others consist of, which is its own from now on: `id` says which file it is, if somebody
        died who had begun to do so. Nothing is copied."""
        contents = tuple(content for part in parts for content in part.contents)
        size = sum(part.bytes for part in parts)
        data = data_of(State.PROCESSED, filename, purpose, contents, bytes=size, sha256=sha256)
        with suppress(RecordExists):
            self._shelf.put(self._kind, id, owner, data, size=size, ttl_s=ttl_s)
        return self.find(owner, id)

    def tidy(self) -> int:
        """Removes the files whose time is up, contents first; how many."""
        removed = 0
        while records := self._shelf.overdue(self._kind):
            for record in records:
                self._clear(record)
            removed += len(records)
        return removed

    def _take_over(self, file_id: str, filename: str, purpose: str, content: str) -> Record:
        had = self._shelf.get(self._kind, file_id)
        old = contents_of(had)
        data = data_of(State.UPLOADING, filename, purpose, [*old, (content, 0)])
        # Replaced rather than removed: whoever still writes the old one finds another version at its end.
        record = self._shelf.replace(had, data, size=0, ttl_s=UNFINISHED_S)
        for name, _ in old:
            self._shelf.remove_content(name)
        return record

    def _clear(self, record: Record) -> None:
        clear(self._shelf, record)


def new_id(prefix: str) -> str:
    """Nobody can guess it."""
    return prefix + secrets.token_hex(12)
