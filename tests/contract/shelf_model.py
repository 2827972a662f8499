"""The shelf's contract in dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from loramill.store.errors import StoreError
from loramill.store.shelf import Record, RecordChanged, RecordExists, RecordNotFound, Shelf, Usage


class ShelfModel(Shelf):
    """A shelf that lives as long as the object."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        super().__init__(None)
        self._now_ms = now_ms
        self._records: dict[tuple[str, str], Record] = {}
        self._versions = 0
        self._pieces: dict[tuple[str, int], bytes] = {}
        self._locks: dict[str, tuple[str, int]] = {}
        self._said: dict[str, list[bytes]] = {}

    def put(self, kind: str, id: str, owner: str, data: bytes, *, size: int = 0, ttl_s: float | None = None) -> Record:
        if (kind, id) in self._records:
            raise RecordExists(f"{kind} {id}")
        return self._keep(Record(kind, id, owner, data, size, 0, self._now_ms(), self._until(ttl_s)))

    def get(self, kind: str, id: str) -> Record:
        record = self._records.get((kind, id))
        if record is None or not self._there(record):
            raise RecordNotFound(f"{kind} {id}")
        return record

    def replace(self, record: Record, data: bytes, *, size: int | None = None, ttl_s: float | None = None) -> Record:
        had = self.get(record.kind, record.id)
        if had.version != record.version:
            raise RecordChanged(f"{record.kind} {record.id}")
        changed = replace(had, data=data, expires_ms=self._until(ttl_s))
        return self._keep(changed if size is None else replace(changed, size=size))

    def remove(self, kind: str, id: str) -> bool:
        return self._records.pop((kind, id), None) is not None

    def records(
        self,
        kind: str,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        oldest_first: bool = False,
    ) -> list[Record]:
        found = [one for one in self._all(kind) if self._there(one) and owner in (None, one.owner)]
        if not oldest_first:
            found.reverse()
        if after is not None:
            if after not in (ids := [one.id for one in found]):
                raise RecordNotFound(after)
            found = found[ids.index(after) + 1 :]
        return found[:limit]

    def overdue(self, kind: str, limit: int = 100) -> list[Record]:
        late = [(one.expires_ms, one.id, one) for one in self._all(kind) if not self._there(one)]
        return [one for *_, one in sorted(late)[:limit]]

    def usage(self, kind: str, owner: str) -> Usage:
        found = [one for one in self._all(kind) if self._there(one) and one.owner == owner]
        return Usage(len(found), sum(one.size for one in found))

    def lock(self, name: str, holder: str, seconds: float) -> bool:
        had, until_ms = self._locks.get(name, (holder, 0))
        if had != holder and until_ms > self._now_ms():
            return False
        self._locks[name] = holder, self._now_ms() + round(seconds * 1000)
        return True

    def unlock(self, name: str, holder: str) -> None:
        if name in self._locks and self._locks[name][0] == holder:
            del self._locks[name]

    def say(self, channel: str, data: bytes) -> None:
        self._said.setdefault(channel, []).append(data)

    def heard(self, channel: str, start: int = 0) -> list[bytes]:
        return self._said.get(channel, [])[start:]

    def _put_piece(self, content: str, number: int, kept: bytes) -> None:
        self._pieces[content, number] = kept

    def _piece(self, content: str, number: int) -> bytes:
        if (content, number) not in self._pieces:
            raise StoreError(content)
        return self._pieces[content, number]

    def _remove_pieces(self, content: str) -> None:
        self._pieces = {place: kept for place, kept in self._pieces.items() if place[0] != content}

    def _all(self, kind: str) -> list[Record]:
        """Those of a kind, whether their time is up or not, in the order of their creation."""
        return [record for (its, _), record in self._records.items() if its == kind]

    def _keep(self, record: Record) -> Record:
        self._versions += 1
        kept = replace(record, version=self._versions)
        self._records[record.kind, record.id] = kept
        return kept

    def _there(self, record: Record) -> bool:
        return record.expires_ms is None or record.expires_ms > self._now_ms()

    def _until(self, ttl_s: float | None) -> int | None:
        return None if ttl_s is None else self._now_ms() + round(ttl_s * 1000)
