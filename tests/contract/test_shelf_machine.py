"""The same for what is kept beside jobs: one list of commands, run by the model's shelf and by a real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from loramill.store.contract import JobStore
from loramill.store.shelf import Record
from tests.contract.model import Model
from tests.contract.places import Place
from tests.contract.test_machine import answer

which = st.integers(0, 10**6)
"""Chosen among those that there are."""
kinds = st.sampled_from(("file", "batch"))
# Few, so that they meet; and such as a key could be torn at.
names = st.sampled_from(("a", "b", "b:", "c"))
owners = st.sampled_from(("", "me", "me:b"))
sizes = st.sampled_from((0, 1, 2**33))
lives = st.sampled_from((None, None, 1.0, 20.0))


class ShelfMachine(RuleBasedStateMachine):
    """Drives a shelf and its model side by side."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.model = Model(place.clock).shelf
        self.store: JobStore = place.open()
        self.read: list[tuple[Record, Record]] = []
        """What somebody holds in his hands: the model's, the store's."""

    def both(self, method: str, *args: Any, **named: Any) -> tuple[Any, Any]:
        """Runs one command on both; the answers, or the kinds of error, which must be the same."""
        expected = answer(lambda: getattr(self.model, method)(*args, **named))
        found = answer(lambda: getattr(self.store.shelf, method)(*args, **named))
        assert same(found) == same(expected), f"{method}{args}{named}"
        return expected, found

    def keep(self, expected: Any, found: Any) -> None:
        if isinstance(expected, Record):
            assert all(found.version != held.version or found == held for _, held in self.read), "never given twice"
            self.read.append((expected, found))

    @rule(kind=kinds, name=names, owner=owners, size=sizes, ttl_s=lives)
    def put(self, kind: str, name: str, owner: str, size: int, ttl_s: float | None) -> None:
        self.keep(*self.both("put", kind, name, owner, b"0", size=size, ttl_s=ttl_s))

    @rule(kind=kinds, name=names)
    def get(self, kind: str, name: str) -> None:
        self.keep(*self.both("get", kind, name))

    @precondition(lambda self: self.read)
    @rule(at=which, data=st.binary(max_size=3), size=st.none() | sizes, ttl_s=lives)
    def replace(self, at: int, data: bytes, size: int | None, ttl_s: float | None) -> None:
        mine, theirs = self.read[at % len(self.read)]
        expected = answer(lambda: self.model.replace(mine, data, size=size, ttl_s=ttl_s))
        found = answer(lambda: self.store.shelf.replace(theirs, data, size=size, ttl_s=ttl_s))
        assert same(found) == same(expected)
        self.keep(expected, found)

    @rule(kind=kinds, name=names)
    def remove(self, kind: str, name: str) -> None:
        self.both("remove", kind, name)

    @rule(kind=kinds, owner=st.none() | owners, after=st.none() | names, limit=st.integers(1, 3), old=st.booleans())
    def page(self, kind: str, owner: str | None, after: str | None, limit: int, old: bool) -> None:
        self.both("records", kind, owner, after=after, limit=limit, oldest_first=old)

    @rule(content=names, number=st.integers(0, 2), data=st.binary(max_size=3))
    def put_piece(self, content: str, number: int, data: bytes) -> None:
        self.both("put_piece", content, number, data)

    @rule(content=names, number=st.integers(0, 2))
    def piece(self, content: str, number: int) -> None:
        self.both("piece", content, number)

    @rule(content=names)
    def remove_content(self, content: str) -> None:
        self.both("remove_content", content)

    @rule(name=names, holder=owners, seconds=st.sampled_from((1.0, 20.0)))
    def lock(self, name: str, holder: str, seconds: float) -> None:
        self.both("lock", name, holder, seconds)

    @rule(name=names, holder=owners)
    def unlock(self, name: str, holder: str) -> None:
        self.both("unlock", name, holder)

    @rule(seconds=st.sampled_from((0.001, 0.999, 1.0, 19.0, 20.0)))
    def time_passes(self, seconds: float) -> None:
        self.place.clock.advance(seconds)

    @rule()
    def crash(self) -> None:
        """The handle is dropped as it is, and another process goes on."""
        self.store = self.place.open()

    @invariant()
    def alike(self) -> None:
        for kind in ("file", "batch"):
            self.both("records", kind)
            self.both("overdue", kind)
            for owner in ("", "me", "me:b"):
                self.both("records", kind, owner, oldest_first=True)
                self.both("usage", kind, owner)

    def teardown(self) -> None:
        self.store.close()


def same(found: Any) -> Any:
    """An answer without versions, which each counts as it likes."""
    if isinstance(found, Record):
        return replace(found, version=0)
    return [same(one) for one in found] if isinstance(found, list) else found


def test_the_shelf_machine_sees_no_difference(new_place: Callable[[], Place]) -> None:
    run_state_machine_as_test(
        lambda: ShelfMachine(new_place()), settings=settings(max_examples=30, stateful_step_count=40)
    )
