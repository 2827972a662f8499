from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loramill.producer.plan import plan_order

Ints = NDArray[np.int64]


def plan(adapter: list[int] | Ints, cost: list[int] | Ints, slots: int, max_num_seqs: int) -> Ints:
    return plan_order(np.asarray(adapter, np.int32), np.asarray(cost, np.int64), slots=slots, max_num_seqs=max_num_seqs)


def most_open(adapters: list[int]) -> int:
    """The most adapters that are begun and not finished at any point of an order (the base, -1, needs no slot)."""
    first = {name: adapters.index(name) for name in set(adapters) - {-1}}
    last = {name: len(adapters) - 1 - adapters[::-1].index(name) for name in first}
    return max((sum(first[n] <= at <= last[n] for n in first) for at in range(len(adapters))), default=0)


def simulate(adapters: Ints, cost: Ints, slots: int, max_num_seqs: int) -> tuple[int, int]:
    """(steps, adapter loads) of an engine that starts rows in order, looking past those whose adapter has no slot.

    An adapter leaves its slot only for another, and only when the rows in sight need it no more.
    """
    waiting = [(int(name), int(steps)) for name, steps in zip(adapters, cost, strict=True)]
    running: list[list[int]] = []
    resident: set[int] = set()
    steps = loads = 0
    while waiting or running:
        window, later = waiting[: 4 * max_num_seqs], waiting[4 * max_num_seqs :]
        held: list[tuple[int, int]] = []
        for name, length in window:
            if len(running) < max_num_seqs and name != -1 and name not in resident:
                idle = resident - {one for one, _ in running} - {one for one, _ in window}
                if len(resident) == slots and idle:
                    resident.discard(min(idle))
                if len(resident) < slots:
                    resident.add(name)
                    loads += 1
            if len(running) < max_num_seqs and (name == -1 or name in resident):
                running.append([name, length])
            else:
                held.append((name, length))
        waiting = held + later
        steps += 1
        for row in running:
            row[1] -= 1
        running = [row for row in running if row[1]]
    return steps, loads


jobs = st.lists(st.tuples(st.integers(-1, 12), st.integers(1, 50)), max_size=120)


@given(jobs, st.integers(1, 9), st.integers(1, 24))
def test_any_job(job: list[tuple[int, int]], slots: int, max_num_seqs: int) -> None:
    adapter, cost = [name for name, _ in job], [work for _, work in job]
    order = plan(adapter, cost, slots, max_num_seqs)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(job)))
    assert order.tolist() == plan(adapter, cost, slots, max_num_seqs).tolist()
    planned = [adapter[at] for at in order]
    if len(job) > 2 * max_num_seqs:
        assert most_open(planned) <= slots
    for name in set(adapter):
        own = [int(at) for at in order if adapter[at] == name]
        assert own == sorted(own, key=lambda at: (-cost[at], at))


@given(jobs, st.integers(1, 9), st.integers(1, 24))
def test_every_adapter_is_loaded_once(job: list[tuple[int, int]], slots: int, max_num_seqs: int) -> None:
    adapter, cost = [name for name, _ in job], [work for _, work in job]
    order = plan(adapter, cost, slots, max_num_seqs)
    _, loads = simulate(np.asarray(adapter)[order], np.asarray(cost)[order], slots, max_num_seqs)
    assert loads == len(set(adapter) - {-1})


def test_a_small_job_goes_heaviest_adapter_first() -> None:
    assert plan([0, 1, 1, -1, 0], [5, 9, 9, 50, 3], slots=1, max_num_seqs=4).tolist() == [1, 2, 0, 4, 3]


def test_light_adapters_come_first_with_the_base_filling_up() -> None:
    adapter = [0, 1, 2, 3] + [-1] * 20
    order = plan(adapter, [1] * 24, slots=3, max_num_seqs=6)
    planned = [adapter[at] for at in order]
    assert planned == [0, 1, -1, -1, -1, -1, 2, 3, *[-1] * 16]


def test_the_heaviest_adapter_fills_up_when_there_are_no_base_rows() -> None:
    adapter = [0, 1, 2, 3] + [9] * 20
    planned = [adapter[at] for at in plan(adapter, [1] * 24, slots=3, max_num_seqs=6)]
    assert planned == [0, 1, 9, 9, 9, 9, 2, 3, *[9] * 16]


@pytest.mark.parametrize("base_rows", [0, 600])
def test_many_light_adapters_do_not_leave_the_batch_empty(base_rows: int) -> None:
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 65) ** 1.2
    adapter = np.r_[rng.choice(64, 2000, p=weights / weights.sum()), np.full(base_rows, -1)].astype(np.int32)
    rng.shuffle(adapter)
    cost = rng.integers(5, 60, len(adapter))
    slots, seqs = 8, 64
    order = plan(adapter, cost, slots, seqs)
    steps, loads = simulate(adapter[order], cost[order], slots, seqs)
    ideal = cost.sum() / seqs
    grouped = np.lexsort((-cost, adapter))
    grouped_steps, _ = simulate(adapter[grouped], cost[grouped], slots, seqs)
    unplanned_steps, unplanned_loads = simulate(adapter, cost, slots, seqs)
    print(steps / ideal, loads, grouped_steps / ideal, unplanned_steps / ideal, unplanned_loads)
    assert loads == len(set(adapter.tolist()) - {-1})
    assert steps <= 1.1 * ideal
    assert steps < grouped_steps and steps < unplanned_steps
    assert loads < unplanned_loads


def test_a_million_rows_plan_in_a_second() -> None:
    import time

    rng = np.random.default_rng(0)
    adapter = rng.integers(-1, 1000, 1_000_000).astype(np.int32)
    cost = rng.integers(1, 1000, 1_000_000)
    began = time.perf_counter()
    order = plan_order(adapter, cost, slots=8, max_num_seqs=256)
    assert time.perf_counter() - began < 3
    assert len(np.unique(order)) == 1_000_000
