"""What operators want loaded beside what workers were started with: records in a store, which every worker reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loramill.schemas.adapter_objects import AdapterWish
from loramill.store.shelf import Record, RecordChanged, RecordExists, RecordNotFound, Shelf

KIND = "adapter"
_PAGE = 1000


@dataclass(slots=True, frozen=True)
class Wish:
    """The latest word on one adapter."""

    name: str
    wanted: bool
    source: str | None
    scale: float | None
    stamp: str
    """Another one each time that it was said, be it the same: files may have changed."""


def wishes(shelf: Shelf) -> Iterator[Wish]:
    """All of them, the oldest first. Raises StoreError."""
    after = None
    while page := shelf.records(KIND, after=after, limit=_PAGE, oldest_first=True):
        yield from map(_wish, page)
        if len(page) < _PAGE:
            return
        after = page[-1].id


def find_wish(shelf: Shelf, name: str) -> Wish | None:
    """The one about this adapter. Raises StoreError."""
    try:
        return _wish(shelf.get(KIND, name))
    except RecordNotFound:
        return None


def say(shelf: Shelf, name: str, wish: AdapterWish) -> Wish:
    """Says what is wanted from now on. Raises StoreError."""
    data = wish.model_dump_json().encode()
    while True:
        try:
            return _wish(shelf.replace(shelf.get(KIND, name), data))
        except RecordNotFound:
            try:
                return _wish(shelf.put(KIND, name, "", data))
            except RecordExists:
                continue
        except RecordChanged:
            continue


def take_back(shelf: Shelf, wish: Wish, former: Wish | None) -> None:
    """As if it had not been said, unless more was said since. Raises StoreError."""
    if (now := find_wish(shelf, wish.name)) is None or now.stamp != wish.stamp:
        return
    if former is None:
        shelf.remove(KIND, wish.name)
    else:
        say(shelf, wish.name, AdapterWish(wanted=former.wanted, source=former.source, scale=former.scale))


def _wish(record: Record) -> Wish:
    said = AdapterWish.model_validate_json(record.data)
    stamp = f"{record.created_ms}.{record.version}"
    return Wish(record.id, said.wanted, said.source, said.scale, stamp)
