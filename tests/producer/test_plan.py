"""The plan: rules that every plan keeps, and a model of the engine that shows that it fills its batches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loramill.producer.plan import WINDOW_BATCHES, Plan, plan
from loramill.producer.waves import Limits, MixFacts, Mode, Wave

Ints = NDArray[np.int64]


@dataclass
class Job:
    mix: list[int]
    prompt: list[int]
    answer: list[int]
    facts: list[MixFacts]
    limits: Limits

    def plan(self, **options: Any) -> Plan:
        columns = np.asarray(self.mix, np.int32), np.asarray(self.prompt, np.int64), np.asarray(self.answer, np.int64)
        return plan(*columns, self.facts, self.limits, **options)

    def needed(self, wave: Wave) -> set[int]:
        """The adapters of a wave that need a free slot."""
        return {one for mix in wave.mixes if mix >= 0 for one in self.limits.needed(self.facts[mix])}


@st.composite
def jobs(draw: st.DrawFn, *, single: bool = False, rows: int = 0) -> Job:
    """Jobs of at least so many rows that can be served; `single`: every mix is one adapter, of its own."""
    slots = draw(st.integers(1, 6))
    pinned = frozenset(draw(st.sets(st.integers(0, 9), max_size=slots - 1)))
    limits = Limits(slots, draw(st.integers(1, 4 if rows else 12)), 4096, pinned, draw(st.sampled_from([None, 1, 4])))
    count = draw(st.integers(0, 10))
    widest = st.integers(1, 1 if single else limits.free)
    facts = [
        MixFacts(
            (number,) if single else tuple(draw(st.permutations(range(10)))[: draw(widest)]),
            draw(st.sampled_from([4, 8, 9, 16, 64])),
            draw(st.integers(0, 5)) == 0,
        )
        for number in range(count)
    ]
    tokens = st.integers(1, 30)
    lines = draw(st.lists(st.tuples(st.integers(-1, count - 1), tokens, tokens), min_size=rows, max_size=rows + 80))
    return Job(*([line[column] for line in lines] for column in range(3)), facts, limits)


modes: st.SearchStrategy[Any] = st.sampled_from(["auto", "dynamic", "static"])
orders: st.SearchStrategy[Any] = st.sampled_from(["throughput", "input"])


@given(jobs(), modes, orders)
def test_any_plan(job: Job, mode: Literal["auto"], order: Literal["input"]) -> None:
    made = job.plan(mode=mode, order=order)
    assert made.rows.dtype == np.int64
    assert sorted(made.rows) == list(range(len(job.mix)))
    assert made.rows.tolist() == [row for wave in made.waves for row in wave.rows]
    assert set(made.decisions) == set(job.mix) - {-1}
    for wave in made.waves:
        assert set(wave.mixes) == {job.mix[row] for row in wave.rows}
        if wave.mode is Mode.DYNAMIC:
            assert len(job.needed(wave) | job.limits.pinned) <= job.limits.slots
        else:
            assert len(wave.mixes) == 1 and wave.mixes[0] >= 0
        assert all(made.decisions[mix].mode is wave.mode for mix in wave.mixes if mix >= 0)
    for mix, decision in made.decisions.items():
        static = job.facts[mix].static_only or mode == "static"
        assert decision.mode is (Mode.STATIC if static else Mode.DYNAMIC)
        assert decision.why.startswith(f"{decision.mode}: ")
    again = job.plan(mode=mode, order=order)
    assert made.rows.tolist() == again.rows.tolist() and made.predicted == again.predicted


@given(jobs(single=True, rows=20))
def test_an_adapter_is_needed_in_consecutive_waves(job: Job) -> None:
    made = job.plan()
    dynamic = [wave for wave in made.waves if wave.mode is Mode.DYNAMIC]
    for adapter in range(10):
        waves = [number for number, wave in enumerate(dynamic) if adapter in job.needed(wave)]
        assert waves == list(range(waves[0], waves[-1] + 1)) if waves else True
    served = {one for wave in dynamic for one in job.needed(wave)}
    assert made.predicted.adapter_loads == len(served | job.limits.pinned)


@given(jobs(single=True, rows=20))
def test_adapters_of_several_rank_classes_begin_together_only_where_a_class_has_run_out(job: Job) -> None:
    waves = [job.needed(wave) for wave in job.plan().waves if wave.mode is Mode.DYNAMIC]
    begins = [sorted(wave - set().union(*waves[:number])) for number, wave in enumerate(waves)]
    classes = [{(job.facts[adapter].rank - 1).bit_length() for adapter in begun} for begun in begins]
    for number, together in enumerate(classes):
        later = set().union(*classes[number + 1 :])
        assert len(together & later) <= 1 if len(together) > 1 else True


@given(jobs())
def test_rows_of_a_set_of_adapters_go_longest_first(job: Job) -> None:
    made = job.plan()
    static = {mix for mix, one in made.decisions.items() if one.mode is Mode.STATIC}
    keys = [mix if mix in static else job.limits.needed(job.facts[mix]) if mix >= 0 else frozenset() for mix in job.mix]
    for key in set(keys):
        own = [int(row) for row in made.rows if keys[row] == key]
        assert own == sorted(own, key=lambda row: (-job.answer[row], -job.prompt[row], job.mix[row], row))


@given(jobs())
def test_static_waves_come_last_and_the_most_tokens_first(job: Job) -> None:
    waves = job.plan(mode="static").waves
    is_static = [wave.mode is Mode.STATIC for wave in waves]
    assert is_static == sorted(is_static)
    cost = np.add(job.prompt, job.answer)
    tokens = [int(cost[wave.rows].sum()) for wave in waves if wave.mode is Mode.STATIC]
    assert tokens == sorted(tokens, reverse=True)
    assert len({wave.mixes for wave in waves}) == len(waves)


@given(jobs(), modes)
def test_input_order_lets_no_row_overtake_an_earlier_window(job: Job, mode: Literal["auto"]) -> None:
    made = job.plan(order="input", mode=mode)
    window = made.rows // (WINDOW_BATCHES * job.limits.max_num_seqs)
    assert (np.diff(window) >= 0).all()
    for wave in made.waves:
        if wave.mode is Mode.DYNAMIC:
            assert (np.diff(wave.rows) > 0).all()


def test_input_order_is_the_input_where_all_adapters_have_a_slot() -> None:
    job = Job([0, 1, -1, 0, 2, 1] * 20, [5] * 120, [3, 9, 4, 7, 1, 2] * 20, one_each(3), Limits(3, 4, 99))
    made = job.plan(order="input")
    assert made.rows.tolist() == list(range(120))
    assert len(made.waves) == 2  # windows of 64 rows


def test_a_static_mix_keeps_its_place_by_windows_of_the_input() -> None:
    facts = [MixFacts((0,), 8, static_only=True), MixFacts((1,), 8)]
    job = Job([0, 1] * 64, [5] * 128, [5] * 128, facts, Limits(2, 4, 99))
    made = job.plan(order="input")
    assert [wave.mode.value for wave in made.waves] == ["dynamic", "static"] * 2
    assert (made.predicted.merges, made.predicted.restores) == (2, 1)
    assert made.rows[:64].max() < 64 <= made.rows[64:].min()


@given(jobs(), modes, st.data())
def test_earlier_decisions_are_kept(job: Job, mode: Literal["auto"], data: st.DataObject) -> None:
    open_ = [mix for mix in set(job.mix) - {-1} if not job.facts[mix].static_only]
    decided = {mix: data.draw(st.sampled_from(Mode)) for mix in open_ if data.draw(st.booleans())}
    made = job.plan(mode=mode, decided=decided)
    assert {mix: made.decisions[mix].mode for mix in decided} == decided


def test_what_cannot_be_planned_is_refused() -> None:
    wide = Job([0], [1], [1], [MixFacts((0, 1, 2), 8)], Limits(2, 4, 99))
    with pytest.raises(ValueError, match="3 adapters cannot be served dynamically: 2 slots are free"):
        wide.plan(mode="dynamic")
    assert wide.plan().decisions[0].mode is Mode.STATIC
    pinned = Job([0], [1], [1], [MixFacts((0, 1), 8)], Limits(2, 4, 99, pinned=frozenset({5})))
    with pytest.raises(ValueError, match="1 slots are free"):
        pinned.plan(mode="dynamic")
    beside = Job([0], [1], [1], [MixFacts((0, 5), 8)], Limits(2, 4, 99, pinned=frozenset({5})))
    assert beside.plan(mode="dynamic").predicted.adapter_loads == 2
    static = Job([0], [1], [1], [MixFacts((0,), 8, static_only=True)], Limits(2, 4, 99))
    with pytest.raises(ValueError, match="can only be served merged"):
        static.plan(decided={0: Mode.DYNAMIC})
    with pytest.raises(ValueError, match="2 adapters are pinned and there are 1 slots"):
        Limits(1, 4, 99, pinned=frozenset({1, 2}))
    with pytest.raises(ValueError, match="at least 1"):
        Limits(0, 4, 99)


def test_an_empty_job() -> None:
    made = Job([], [], [], one_each(2), Limits(2, 4, 99)).plan()
    assert (made.waves, made.decisions, len(made.rows), made.predicted.passes) == ([], {}, 0, 0)


def one_each(count: int) -> list[MixFacts]:
    return [MixFacts((number,), 8) for number in range(count)]


@pytest.mark.parametrize("hubs", [1, 2, 3])
def test_mixes_that_share_an_adapter_keep_it_resident(hubs: int) -> None:
    """Forty adapters, each beside one adapter that all share, or beside each of some."""
    facts = [MixFacts((40 + hub, own), 8) for hub in range(hubs) for own in range(40)]
    job = Job(list(range(len(facts))) * 3, [5] * 3 * len(facts), [5] * 3 * len(facts), facts, Limits(hubs + 2, 8, 999))
    assert job.plan().predicted.adapter_loads == 40 + hubs


def test_overlapping_mixes_that_fit_are_served_together() -> None:
    facts = [MixFacts((0,), 8), MixFacts((0,), 8), MixFacts((0, 1), 16), *(MixFacts((n,), 8) for n in range(2, 9))]
    job = Job([*[0, 1, 2] * 4, *range(3, 10)] * 4, [5] * 76, [5] * 76, facts, Limits(3, 4, 999))
    made = job.plan()
    assert made.predicted.adapter_loads == 9
    assert all({0, 1, 2} <= set(wave.mixes) or not {0, 1, 2} & set(wave.mixes) for wave in made.waves)


def test_rows_of_one_prompt_are_side_by_side_and_others_stay_in_input_order() -> None:
    mix, tokens = np.array([0] * 8 + [-1] * 4, np.int32), np.array([9, 9, 5, 9, 9, 5, 9, 9] + [9] * 4)
    prompts = np.array([70, 10, 30, 10, 70, 30, 20, 10, 1, 2, 1, 2])
    facts, limits = [MixFacts((0,), 1)], Limits(1, 4, 999)
    assert plan(mix, tokens, tokens, facts, limits, prompt_hash=prompts, mode="static").rows.tolist() == [
        8, 10, 9, 11, 0, 4, 1, 3, 7, 6, 2, 5
    ]  # fmt: skip
    distinct = plan(mix, tokens, tokens, facts, limits, prompt_hash=np.arange(12)[::-1]).rows
    assert distinct.tolist() == plan(mix, tokens, tokens, facts, limits).rows.tolist()
    in_turn = plan(mix, tokens, tokens, facts, limits, prompt_hash=prompts, order="input").rows
    assert in_turn.tolist() == plan(mix, tokens, tokens, facts, limits, order="input").rows.tolist()


def order_of(adapter: list[int] | Ints, cost: list[int] | Ints, slots: int, max_num_seqs: int) -> Ints:
    mix, tokens = np.asarray(adapter, np.int32), np.asarray(cost, np.int64)
    facts = [MixFacts((number,), 1) for number in range(int(mix.max(initial=-1)) + 1)]
    return plan(mix, tokens, np.zeros_like(tokens), facts, Limits(slots, max_num_seqs, 10**9)).rows


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


plain_rows = st.lists(st.tuples(st.integers(-1, 12), st.integers(1, 50)), max_size=120)


@given(plain_rows, st.integers(1, 9), st.integers(1, 24))
def test_the_engine_loads_every_adapter_once(job: list[tuple[int, int]], slots: int, max_num_seqs: int) -> None:
    adapter, cost = [name for name, _ in job], [work for _, work in job]
    order = order_of(adapter, cost, slots, max_num_seqs)
    _, loads = simulate(np.asarray(adapter)[order], np.asarray(cost)[order], slots, max_num_seqs)
    assert loads == len(set(adapter) - {-1})


def test_a_small_job_goes_heaviest_adapter_first() -> None:
    assert order_of([0, 1, 1, -1, 0], [5, 9, 9, 50, 3], slots=1, max_num_seqs=4).tolist() == [1, 2, 0, 4, 3]


def test_where_all_adapters_have_slots_the_shortest_rows_keep_the_batch_full_to_the_end() -> None:
    rng = np.random.default_rng(2)
    weights = 1 / np.arange(1, 17)
    for rows in (256, 4000):
        mix = rng.choice(16, rows, p=weights / weights.sum()).astype(np.int32)
        answer = rng.integers(4, 129, rows)
        job = Job(mix.tolist(), [9] * rows, answer.tolist(), one_each(16), Limits(16, 128, 1 << 20))
        made = job.plan()
        steps, _ = simulate(mix[made.rows], answer[made.rows], 16, 128)
        grouped = np.lexsort((-answer, mix))
        by_adapter, _ = simulate(mix[grouped], answer[grouped], 16, 128)
        ideal = max(answer.max(), answer.sum() / 128)
        assert steps <= 1.03 * ideal
        assert by_adapter - steps > 25
        assert len(made.waves) == 1
    # Most of a large job still goes adapter by adapter.
    begins = made.rows[:3000]
    assert (np.diff(mix[begins]) != 0).sum() <= 15 < (np.diff(mix[made.rows]) != 0).sum()
    # What is cut in shards keeps the rows of an adapter together to the end.
    assert (np.diff(mix[job.plan(to_cut=True).rows]) != 0).sum() == 15


def test_light_adapters_come_first_with_the_base_filling_up() -> None:
    adapter = [0, 1, 2, 3] + [-1] * 20
    planned = [adapter[at] for at in order_of(adapter, [1] * 24, slots=3, max_num_seqs=6)]
    assert planned == [0, 1, -1, -1, -1, -1, 2, 3, *[-1] * 16]


def test_the_heaviest_adapter_fills_up_when_there_are_no_base_rows() -> None:
    adapter = [0, 1, 2, 3] + [9] * 20
    planned = [adapter[at] for at in order_of(adapter, [1] * 24, slots=3, max_num_seqs=6)]
    assert planned == [9, 9, 9, 9, 0, 1, 2, 3, *[9] * 16]


def test_a_filler_is_of_the_rank_class_that_it_fills() -> None:
    ranks = [8] * 6 + [64] * 6
    facts = [MixFacts((number,), rank) for number, rank in enumerate(ranks)]
    rows = [1, 1, 1, 1, 1, 31, 1, 1, 1, 1, 1, 60]
    mix = [number for number, count in enumerate(rows) for _ in range(count)]
    job = Job(mix, [5] * len(mix), [5] * len(mix), facts, Limits(3, 12, 999))
    for wave in job.plan().waves:
        assert len({ranks[number] for number in wave.mixes}) == 1


@pytest.mark.parametrize("base_rows", [0, 600])
def test_many_light_adapters_do_not_leave_the_batch_empty(base_rows: int) -> None:
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 65) ** 1.2
    adapter = np.r_[rng.choice(64, 2000, p=weights / weights.sum()), np.full(base_rows, -1)].astype(np.int32)
    rng.shuffle(adapter)
    cost = rng.integers(5, 60, len(adapter))
    slots, seqs = 8, 64
    order = order_of(adapter, cost, slots, seqs)
    steps, loads = simulate(adapter[order], cost[order], slots, seqs)
    ideal = cost.sum() / seqs
    grouped = np.lexsort((-cost, adapter))
    grouped_steps, _ = simulate(adapter[grouped], cost[grouped], slots, seqs)
    unplanned_steps, unplanned_loads = simulate(adapter, cost, slots, seqs)
    assert loads == len(set(adapter.tolist()) - {-1})
    assert steps <= 1.1 * ideal
    assert steps < grouped_steps and steps < unplanned_steps
    assert loads < unplanned_loads


def test_the_passes_are_foreseen() -> None:
    """Against the model of the engine, which knows slots, lengths and tails."""
    rng = np.random.default_rng(1)
    for adapters, exponent, base, slots in [(64, 1.2, 0, 8), (300, 0.0, 0, 8), (40, 1.0, 600, 2), (8, 1.0, 0, 8)]:
        weights = 1 / np.arange(1, adapters + 1) ** exponent
        mix = np.r_[rng.choice(adapters, 1200, p=weights / weights.sum()), np.full(base, -1)].astype(np.int32)
        answer = rng.integers(5, 60, len(mix))
        made = plan(mix, answer * 0 + 1, answer, one_each(adapters), Limits(slots, 64, 1 << 20))
        steps, loads = simulate(mix[made.rows], answer[made.rows], slots, 64)
        assert loads == made.predicted.adapter_loads
        assert steps / 1.2 <= made.predicted.passes <= steps


@pytest.mark.parametrize("order", ["throughput", "input"])
def test_a_million_rows_over_ten_thousand_adapters_plan_in_seconds(order: Literal["throughput", "input"]) -> None:
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 10_001)
    mix = rng.choice(10_000, 1_000_000, p=weights / weights.sum()).astype(np.int32)
    tokens = rng.integers(1, 1000, len(mix))
    began = time.perf_counter()
    made = plan(mix, tokens, tokens, one_each(10_000), Limits(8, 256, 8192), order=order)
    assert time.perf_counter() - began < 20  # 0.7 and 3 s on two idle cores
    assert len(np.unique(made.rows)) == 1_000_000
    if order == "throughput":
        assert made.predicted.adapter_loads == len(np.unique(mix))
