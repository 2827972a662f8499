"""Adapter slots under random use, held against what must always be true."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.worker.slots import Load, Slots


def test_an_idle_adapter_goes_before_a_wanted_one_and_a_running_one_never() -> None:
    slots = Slots(2)
    assert slots.place("a", ()) == Load("a", 0, None)
    assert slots.place("b", ()) == Load("b", 1, None)
    slots.acquire("a")
    assert slots.place("c", {"b"}) is None, "a runs and rows wait for b"
    assert slots.place("c", ()) == Load("c", 1, "b")
    slots.acquire("c")
    assert slots.place("d", ()) is None
    slots.release("a")
    assert slots.place("d", ()) == Load("d", 0, "a")


def test_the_least_recently_used_goes_first() -> None:
    slots = Slots(3)
    for name in "abc":
        slots.place(name, ())
    slots.acquire("a")
    slots.release("a")
    load = slots.place("d", ())
    assert load is not None
    assert load.evicted == "b"


def test_no_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="max_loras_per_batch"):
        Slots(0)


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=60))
def test_the_limit_holds_and_running_adapters_stay(capacity: int, uses: list[tuple[str, bool]]) -> None:
    slots = Slots(capacity)
    running: list[str] = []
    where: dict[str, int] = {}
    for name, finishes in uses:
        if finishes and running:
            slots.release(running.pop(0))
        if slots.slot(name) is None:
            load = slots.place(name, ())
            if load is None:
                assert len(set(running)) == capacity
                continue
            assert load.evicted not in running
            where.pop(load.evicted or "", None)
            assert load.slot not in where.values(), "a slot given twice"
            where[name] = load.slot
        assert slots.acquire(name) == where[name]
        running.append(name)
        assert slots.resident == set(where)
        assert len(slots.resident) <= capacity
