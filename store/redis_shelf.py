"""The shelf on a Redis server: what the scripts in `lua/shelf` keep there."""

from __future__ import annotations

from collections.abc import Sequence

from loramill.store.errors import StoreError
from loramill.store.part_files import Files
from loramill.store.redis_link import Link
from loramill.store.shelf import SAID_TTL_S, Record, Shelf, Usage


class RedisShelf(Shelf):
    """See `lua/shelf/lib.lua` for the keys."""

    def __init__(self, link: Link, files: Files | None) -> None:
        super().__init__(files)
        self._link = link

    def put(self, kind: str, id: str, owner: str, data: bytes, *, size: int = 0, ttl_s: float | None = None) -> Record:
        given = (kind, id, owner, data, size, _ttl_ms(ttl_s))
        return _record(kind, self._link.call("shelf/put", *given, about=f"{kind} {id}"))

    def get(self, kind: str, id: str) -> Record:
        return _record(kind, self._link.call("shelf/get", kind, id, about=f"{kind} {id}"))

    def replace(self, record: Record, data: bytes, *, size: int | None = None, ttl_s: float | None = None) -> Record:
        given = (record.version, data, "" if size is None else size, _ttl_ms(ttl_s))
        about = f"{record.kind} {record.id}"
        return _record(record.kind, self._link.call("shelf/replace", record.kind, record.id, *given, about=about))

    def remove(self, kind: str, id: str) -> bool:
        return bool(self._link.call("shelf/remove", kind, id))

    def records(
        self,
        kind: str,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        oldest_first: bool = False,
    ) -> list[Record]:
        whose = "" if owner is None else f":{owner}"
        given = (kind, whose, after or "", limit, int(not oldest_first))
        return [_record(kind, said) for said in self._link.call("shelf/records", *given, about=f"{kind} {after}")]

    def overdue(self, kind: str, limit: int = 100) -> list[Record]:
        return [_record(kind, said) for said in self._link.call("shelf/overdue", kind, limit)]

    def usage(self, kind: str, owner: str) -> Usage:
        return Usage(*self._link.call("shelf/usage", kind, owner))

    def lock(self, name: str, holder: str, seconds: float) -> bool:
        return bool(self._link.call("shelf/lock", name, holder, round(seconds * 1000)))

    def unlock(self, name: str, holder: str) -> None:
        self._link.call("shelf/unlock", name, holder)

    def say(self, channel: str, data: bytes) -> None:
        self._link.call("shelf/say", channel, data, round(SAID_TTL_S * 1000))

    def heard(self, channel: str, start: int = 0) -> list[bytes]:
        (said,) = self._link.read(("LRANGE", f"said:{channel}", start, -1))
        return list(said)

    def _put_piece(self, content: str, number: int, kept: bytes) -> None:
        self._link.call("shelf/put_piece", content, number, kept)

    def _piece(self, content: str, number: int) -> bytes:
        (kept,) = self._link.read(("HGET", f"content:{content}", number))
        if kept is None:
            raise StoreError(f"{self._link.url} has no piece {number} of {content}")
        return bytes(kept)

    def _remove_pieces(self, content: str) -> None:
        self._link.call("shelf/remove_pieces", content)


def _record(kind: str, said: Sequence[bytes | None]) -> Record:
    id, owner, data, size, version, created, expires = said
    assert id is not None and owner is not None and data is not None
    return Record(
        kind, id.decode(), owner.decode(), data, int(size or 0), int(version or 0), int(created or 0),
        None if expires is None else int(expires),
    )  # fmt: skip


def _ttl_ms(ttl_s: float | None) -> int | str:
    return "" if ttl_s is None else round(ttl_s * 1000)
