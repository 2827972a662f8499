"""Adapter slots under random use, held against what must always be true."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.worker.slots import Eviction, Load, Slots


def test_an_idle_adapter_goes_before_a_wanted_one_and_a_running_one_never() -> None:
    slots = Slots(2)
    assert slots.place(["a"]) == [Load("a", 0, None)]
    assert slots.place(["b"]) == [Load("b", 1, None)]
    slots.acquire("a")
    assert slots.place(["c"], {"b"}) is None, "a runs and rows wait for b"
    assert slots.place(["c"]) == [Load("c", 1, "b")]
    slots.acquire("c")
    assert slots.place(["d"]) is None
    slots.release("a")
    assert slots.place(["d"]) == [Load("d", 0, "a")]


def filled(eviction: Eviction, **coming: float) -> Slots:
    """Slots with a, b and c, of which a was used last."""
    slots = Slots(3, eviction, next_use=lambda adapter: coming.get(adapter, inf))
    slots.place(["a", "b", "c"])
    slots.acquire("a")
    slots.release("a")
    return slots


@pytest.mark.parametrize(
    ("eviction", "coming", "evicted"),
    [
        (Eviction.PLAN, {}, "b"),
        (Eviction.PLAN, {"a": 3, "b": 9, "c": 5}, "b"),
        (Eviction.PLAN, {"b": 3, "c": 5}, "a"),
        (Eviction.LRU, {"b": 0}, "b"),
        (Eviction.FIFO, {"a": 0}, "a"),
    ],
)
def test_who_goes_first(eviction: Eviction, coming: dict[str, float], evicted: str) -> None:
    assert [load.evicted for load in filled(eviction, **coming).place(["d"]) or ()] == [evicted]


def test_a_mix_gets_all_of_its_slots_or_none() -> None:
    slots = Slots(3)
    slots.place(["a", "b"])
    slots.acquire("b")
    assert slots.place(["b", "c", "d"]) == [Load("c", 0, "a"), Load("d", 2, None)]
    slots.acquire("c")
    assert slots.place(["e", "f"]) is None
    assert slots.resident == {"b", "c", "d"}
    assert not slots.fits("abcd")


def test_a_pinned_adapter_keeps_its_slot_from_the_start() -> None:
    slots = Slots(2, pinned=["p"])
    assert slots.place(["a"]) == [Load("a", 0, None)]
    assert slots.place(["b"]) == [Load("b", 0, "a")]
    slots.acquire("b")
    assert slots.place(["c"]) is None, "the other slot is kept"
    assert slots.place(["p"]) == [Load("p", 1, None)]
    slots.release("b")
    assert slots.place(["c"]) == [Load("c", 0, "b")]
    assert slots.place(["c", "d"]) is None
    assert not slots.fits(["c", "d"])
    slots.drop("c")
    assert slots.place(["d"]) == [Load("d", 0, None)]


def test_no_slots_and_too_many_pins_are_refused() -> None:
    with pytest.raises(ValueError, match="max_loras_per_batch"):
        Slots(0)
    with pytest.raises(ValueError, match="2 adapters are pinned, and there are 1 slots"):
        Slots(1, pinned=["a", "b"])


mixes = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3, unique=True)


@given(
    st.integers(1, 4),
    st.sampled_from(Eviction),
    st.sets(st.sampled_from("abcdef"), max_size=2),
    st.lists(st.tuples(mixes, st.booleans(), st.sets(st.sampled_from("abcdef"))), max_size=60),
)
def test_the_limit_holds_and_running_adapters_stay(
    capacity: int, eviction: Eviction, pinned: set[str], uses: list[tuple[list[str], bool, set[str]]]
) -> None:
    slots = Slots(capacity, eviction, pinned=list(pinned)[:capacity])
    running: list[list[str]] = []
    where: dict[str, int] = {}
    for mix, finishes, wanted in uses:
        if finishes and running:
            for name in running.pop(0):
                slots.release(name)
        loads = slots.place(mix, wanted)
        if loads is None:
            in_use = {name for names in running for name in names}
            assert len(in_use.union(mix, slots.pinned)) > capacity or wanted, "there was room"
            continue
        for load in loads:
            assert not any(load.evicted in names for names in running)
            assert load.evicted not in slots.pinned
            where.pop(load.evicted or "", None)
            assert load.slot not in where.values(), "a slot given twice"
            where[load.adapter] = load.slot
        assert [slots.acquire(name) for name in mix] == [where[name] for name in mix]
        running.append(mix)
        assert slots.resident == set(where)
        assert len(slots.resident | slots.pinned) <= capacity
