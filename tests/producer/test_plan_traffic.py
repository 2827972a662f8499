"""The loads of slot policies, against the definition."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.producer.traffic import Policy, Traffic, traffic

one_at_a_time = st.lists(st.integers(0, 6), max_size=12)
policies: st.SearchStrategy[Policy] = st.sampled_from(["plan", "lru", "fifo"])


def least_loads(needs: Sequence[int], slots: int) -> int:
    """By trying every eviction."""

    @cache
    def after(place: int, held: frozenset[int]) -> int:
        if place == len(needs):
            return 0
        adapter = needs[place]
        if adapter in held:
            return after(place + 1, held)
        if len(held) < slots:
            return 1 + after(place + 1, held | {adapter})
        return 1 + min(after(place + 1, held - {gone} | {adapter}) for gone in held)

    return after(0, frozenset())


@given(one_at_a_time, st.integers(1, 4))
def test_the_plan_policy_loads_the_least(needs: list[int], slots: int) -> None:
    assert traffic([[one] for one in needs], slots=slots).loads == least_loads(needs, slots)


@given(st.lists(st.sets(st.integers(0, 8), max_size=3), max_size=30), policies, st.integers(4, 6), st.integers(1, 9))
def test_any_traffic(needs: list[set[int]], policy: Policy, slots: int, host: int) -> None:
    every = len(set().union({0}, *needs))
    found = traffic(needs, slots=slots, policy=policy, host=host, pinned=[0])
    assert every <= found.loads
    assert found.loads - found.evictions == min(slots, every) or found.evictions < found.loads
    assert every <= found.reads <= found.loads
    assert traffic(needs, slots=slots, policy=policy, pinned=[0]) == Traffic(found.loads, found.evictions, every)
    assert traffic(needs, slots=9, policy=policy, pinned=[0]) == Traffic(every, 0, every)


@pytest.mark.parametrize(("policy", "loads"), [("plan", (3, 4)), ("lru", (4, 4)), ("fifo", (3, 5))])
def test_the_policies_differ(policy: Policy, loads: tuple[int, int]) -> None:
    """Two slots, counted by hand: the first is bad for lru, the second for fifo."""
    for needs, expected in zip([[0, 1, 0, 2, 1], [0, 1, 0, 2, 0, 1]], loads, strict=True):
        assert traffic([[one] for one in needs], slots=2, policy=policy).loads == expected


def test_host_memory_saves_reads() -> None:
    needs = [[0], [1], [2]] * 3
    assert traffic(needs, slots=1, policy="lru", host=3) == Traffic(9, 8, 3)
    assert traffic(needs, slots=1, policy="lru", host=2) == Traffic(9, 8, 9)
    assert traffic(needs, slots=1, policy="plan", host=2).reads < 9


def test_a_set_beyond_the_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="3 adapters at once do not fit 2 slots"):
        traffic([[0, 1]], slots=2, pinned=[2])
