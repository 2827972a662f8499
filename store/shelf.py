"""What the HTTP API keeps in a store beside jobs: records, files' contents, locks, and answers as they are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from loramill.store.errors import StoreError
from loramill.store.packing import compress, decompress
from loramill.store.part_files import Files
from loramill.store.parts import fetch, keep

PIECE_BYTES = 2**20
"""Of a content, uncompressed: all pieces but the last are so long, so that a byte's piece is known without a search."""
SAID_TTL_S = 600.0
"""How long what was said on a channel is kept after the last of it."""


class RecordExists(StoreError):
    """A record of that kind has that id."""


class RecordNotFound(StoreError):
    """No record of that kind has that id, or its time is up."""


class RecordChanged(StoreError):
    """Somebody else has changed the record since it was read."""


@dataclass(slots=True, frozen=True)
class Record:
    """Something that was created and may change: a file, an upload, a batch. Times are the store's, in milliseconds."""

    kind: str
    id: str
    owner: str
    data: bytes
    """JSON, which the store does not read."""
    size: int
    """What it counts for in `usage`."""
    version: int
    """Grows with every change."""
    created_ms: int
    expires_ms: int | None


@dataclass(slots=True, frozen=True)
class Usage:
    """What an owner has of one kind."""

    count: int = 0
    size: int = 0


class Shelf(ABC):
    """A part of a store. Every method is one atomic step, durable when it returns; any thread may call it. Every method
    may raise StoreUnreachable, StoreFull, StoreRefused, StoreLost."""

    def __init__(self, files: Files | None) -> None:
        self._files = files

    # Records.

    @abstractmethod
    def put(self, kind: str, id: str, owner: str, data: bytes, *, size: int = 0, ttl_s: float | None = None) -> Record:
        """A new one; with `ttl_s` it is there for so long. Raises RecordExists, also for one whose time is up, until it
        was removed."""

    @abstractmethod
    def get(self, kind: str, id: str) -> Record:
        """Raises RecordNotFound."""

    @abstractmethod
    def replace(self, record: Record, data: bytes, *, size: int | None = None, ttl_s: float | None = None) -> Record:
        """Other data, and a size if one is given; with `ttl_s` it is there for so long from now, without it for ever.

        Raises RecordChanged if `record` is not its present version, RecordNotFound."""

    @abstractmethod
    def remove(self, kind: str, id: str) -> bool:
        """Whether it was there, be its time up or not. What belongs to it is to be removed before."""

    @abstractmethod
    def records(
        self,
        kind: str,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        oldest_first: bool = False,
    ) -> list[Record]:
        """In the order of their creation, the newest first or the oldest; of one owner, or of all; those that come
        after the record with the id `after`. Raises RecordNotFound for that one if it is not there, or is another
        owner's."""

    @abstractmethod
    def overdue(self, kind: str, limit: int = 100) -> list[Record]:
        """Those whose time is up, the longest overdue first: to be removed, with what belongs to them."""

    @abstractmethod
    def usage(self, kind: str, owner: str) -> Usage:
        """Of those that are there."""

    # Contents: bytes in pieces, under a name that is never used again.

    def put_piece(self, content: str, number: int, data: bytes) -> None:
        """Piece `number`, from 0, of at most PIECE_BYTES. The same again replaces it."""
        kept = keep(self._files, f"{content}/piece-{number:06}.zst", compress(data))
        self._put_piece(content, number, kept)

    def piece(self, content: str, number: int) -> bytes:
        """Raises StoreError if it is not there."""
        return decompress(fetch(self._files, self._piece(content, number)))

    def remove_content(self, content: str) -> None:
        """With all of its pieces; nothing if there is none."""
        self._remove_pieces(content)
        if self._files is not None:
            self._files.remove(content)

    # Locks: what several servers of one store must not do at once.

    @abstractmethod
    def lock(self, name: str, holder: str, seconds: float) -> bool:
        """Whether `holder` has it, for so long from now: it was free, had run out, or was his already."""

    @abstractmethod
    def unlock(self, name: str, holder: str) -> None:
        """Nothing if it is not his."""

    # Channels: an answer while it is written.

    @abstractmethod
    def say(self, channel: str, data: bytes) -> None:
        """Adds to what was said. Not durable: what a crash takes is in the result."""

    @abstractmethod
    def heard(self, channel: str, start: int = 0) -> list[bytes]:
        """What was said from number `start` on; nothing if nobody speaks there."""

    # What a store implements for the methods above.

    @abstractmethod
    def _put_piece(self, content: str, number: int, kept: bytes) -> None: ...
    @abstractmethod
    def _piece(self, content: str, number: int) -> bytes: ...
    @abstractmethod
    def _remove_pieces(self, content: str) -> None: ...
