"""Continuous batching, without a model: limits, order, and that every row gets to its end."""

from __future__ import annotations

from collections.abc import Callable, Container

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.worker import scheduler as scheduler_module
from loramill.worker.request import Mix, Request, Sampling, plain
from loramill.worker.room import Room
from loramill.worker.scheduler import Scheduler
from loramill.worker.sequence import Sequence, Step
from loramill.worker.slots import Eviction, Load, Slots


def sequence(key: int, prompt: int, answer: int, adapter: str | None = None) -> Sequence:
    return mixed(key, prompt, answer, plain(adapter))


def mixed(key: int, prompt: int, answer: int, mix: Mix, *, merged: bool = False, urgent: bool = False) -> Sequence:
    request = Request(key, [7] * prompt, Sampling(max_tokens=answer), mix, merged, urgent=urgent)
    return Sequence(request, 0, [7] * prompt)


def scheduler(
    *, slots: int = 2, pages: int = 32, seqs: int = 4, budget: int = 16, eviction: Eviction = Eviction.PLAN
) -> Scheduler:
    room = Room(pages, 16, rows=seqs, longest=16 * pages)
    return Scheduler(Slots(slots, eviction), room, max_num_seqs=seqs, max_num_batched_tokens=budget)


def run(plan: Scheduler, before_each: Callable[[int], None] = lambda number: None) -> list[list[tuple[int, int, int]]]:
    """Play the engine's part; (key, start, size) of each pass."""
    passes = []
    while plan.waiting or plan.running:
        before_each(len(passes))
        step = plan.schedule()
        assert step.chunks, "work left and nothing scheduled"
        assert sum(chunk.size for chunk in step.chunks) <= plan.max_num_batched_tokens
        assert len(plan.running) <= plan.max_num_seqs
        mixes = [chunk.sequence.slots for chunk in step.chunks]
        assert mixes == sorted(mixes)
        assert len({slot for mix in mixes for slot, _ in mix}) <= plan.slots.capacity
        assert all(chunk.sequence.weights == step.weights for chunk in step.chunks)
        assert all(len(c.sequence.slots) == (0 if step.weights else len(c.sequence.request.mix)) for c in step.chunks)
        for one, start, size, samples in step.chunks:
            assert start == one.computed
            assert len(one.tokens) <= 16 * len(one.pages)
            one.computed += size
            assert samples == (one.computed == len(one.tokens))
            if samples:
                one.tokens.append(9)
                if one.generated == one.request.sampling.max_tokens:
                    plan.finish(one)
        passes.append([(c.sequence.request.key, c.start, c.size) for c in step.chunks])
    return passes


def test_prompts_are_cut_into_chunks_beside_decodes() -> None:
    plan = scheduler(budget=16)
    plan.add(sequence(0, 10, 3))
    plan.add(sequence(1, 20, 1))
    assert run(plan) == [[(0, 0, 10), (1, 0, 6)], [(0, 10, 1), (1, 6, 14)], [(0, 11, 1)]]


def test_a_finished_place_is_filled_in_the_next_pass() -> None:
    plan = scheduler(seqs=1)
    plan.add(sequence(0, 3, 1))
    plan.add(sequence(1, 3, 1))
    assert run(plan) == [[(0, 0, 3)], [(1, 0, 3)]]


def test_a_row_without_a_slot_is_passed_over_not_waited_for() -> None:
    plan = scheduler(slots=1)
    plan.add(sequence(0, 2, 2, "a"))
    plan.add(sequence(1, 2, 1, "b"))
    plan.add(sequence(2, 2, 1, "a"))
    plan.add(sequence(3, 2, 1))
    assert [[key for key, _, _ in chunks] for chunks in run(plan)] == [[3, 0, 2], [0], [1]]


def test_rows_grow_and_the_youngest_gives_way_when_the_cache_is_full() -> None:
    plan = scheduler(pages=128, seqs=4, budget=2048)
    rows = [sequence(key, 4, 900) for key in range(4)]
    for one in rows:
        plan.add(one)
    run(plan)
    assert plan.preemptions > 0
    assert all(one.generated == 900 for one in rows)


def test_a_row_of_which_only_the_last_token_is_to_be_learnt_needs_nothing_more() -> None:
    plan = scheduler(pages=1)
    one = sequence(0, 8, 9)  # its last token would be the first of another page, and is never computed
    plan.add(one)
    for drawn in range(9):
        [(_, _, size, samples)] = plan.schedule().chunks
        assert samples
        one.computed += size
        one.ahead += 1
        if drawn:  # what the pass before drew is known now
            one.ahead -= 1
            one.tokens.append(9)
    assert one.ends
    assert plan.schedule().chunks == []
    assert plan.running == [one]
    assert plan.preemptions == 0


def test_cancelling_keeps_rows_that_began() -> None:
    plan = scheduler(seqs=1)
    plan.add(sequence(0, 2, 2))
    plan.add(sequence(1, 2, 2))
    plan.schedule()
    assert [one.request.key for one in plan.cancel_waiting()] == [1]
    assert [one.request.key for one in plan.running] == [0]


def test_a_budget_below_one_token_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        scheduler(seqs=8, budget=4)


def test_the_weights_change_once_for_each_merged_mix_and_only_when_nothing_runs() -> None:
    plan = scheduler(seqs=2)
    a, b = (("a", 1.0),), (("b", 0.5),)
    for key, (mix, merged) in enumerate([(a, True), ((), False), (b, True), (a, True), (a, False), (b, True)]):
        plan.add(mixed(key, 2, 2, mix, merged=merged))
    weights = []
    schedule = plan.schedule

    def noted() -> Step:
        step = schedule()
        if not weights or weights[-1] != step.weights:
            weights.append(step.weights)
        return step

    plan.schedule = noted  # type: ignore[method-assign]
    assert [sorted({key for key, _, _ in chunks}) for chunks in run(plan)] == [[1, 4]] * 2 + [[0, 3]] * 2 + [[2, 5]] * 2
    assert weights == [(), a, b]


@pytest.mark.parametrize("late", [mixed(1, 2, 1, (("a", 1.0),), merged=True), mixed(1, 2, 1, (("c", 1.0),))])
def test_a_row_is_not_passed_over_for_ever(late: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others keep coming that could run before it."""
    monkeypatch.setattr(scheduler_module, "PATIENCE", 10)
    monkeypatch.setattr(scheduler_module, "WEIGHTS_PATIENCE", 5)
    plan = scheduler(slots=2)
    plan.add(sequence(0, 2, 3, "b"))
    plan.add(late)
    for key in range(2, 100):
        plan.add(sequence(key, 2, 3, "ab"[key % 2]))
        step = plan.schedule()
        for chunk in step.chunks:
            one = chunk.sequence
            one.computed += chunk.size
            one.tokens += [9] * chunk.samples
            if one.generated == one.request.sampling.max_tokens:
                plan.finish(one)
        if late.generated:
            return
    pytest.fail("it never ran")


rows = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.sampled_from([None, *"abcd"])), max_size=25)


@given(rows, st.integers(1, 3), st.integers(8, 32), st.integers(1, 6), st.integers(6, 40))
def test_every_row_is_computed_whole_within_all_limits(
    mix: list[tuple[int, int, str | None]], slots: int, pages: int, seqs: int, budget: int
) -> None:
    plan = scheduler(slots=slots, pages=pages, seqs=seqs, budget=budget)
    added = [sequence(key, prompt, answer, adapter) for key, (prompt, answer, adapter) in enumerate(mix)]
    for one in added:
        plan.add(one)
    run(plan)
    assert all(one.generated == one.request.sampling.max_tokens for one in added)
    assert not plan.slots._running


weighted = st.tuples(st.sampled_from("abcd"), st.sampled_from([1.0, 0.5]))
mixes = st.lists(weighted, max_size=3, unique_by=lambda member: member[0]).map(tuple)
wants = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), mixes, st.booleans()), max_size=25)


@given(wants, st.sampled_from(Eviction), st.integers(3, 4), st.integers(1, 4), st.sampled_from([2, 4096]))
def test_every_mix_is_computed_whole_merged_or_not(
    wanted: list[tuple[int, int, Mix, bool]], eviction: Eviction, slots: int, seqs: int, patience: int
) -> None:
    plan = scheduler(slots=slots, pages=24, seqs=seqs, eviction=eviction)
    added = [mixed(k, prompt, answer, mix, merged=merged) for k, (prompt, answer, mix, merged) in enumerate(wanted)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scheduler_module, "PATIENCE", patience)
        patched.setattr(scheduler_module, "WEIGHTS_PATIENCE", min(patience, 64))
        for one in added:
            plan.add(one)
        run(plan)
    assert all(one.generated == one.request.sampling.max_tokens for one in added)
    assert not plan.slots._running


@given(rows, st.integers(1, 3))
def test_a_job_sorted_by_adapter_loads_each_adapter_once(mix: list[tuple[int, int, str | None]], slots: int) -> None:
    plan = scheduler(slots=slots, pages=64)
    mix.sort(key=lambda row: row[2] or "")
    for key, (prompt, answer, adapter) in enumerate(mix):
        plan.add(sequence(key, prompt, answer, adapter))
    loaded: list[str] = []
    place = plan.slots.place

    def noted(adapters: list[str], wanted: Container[str] = ()) -> list[Load] | None:
        loads = place(adapters, wanted)
        loaded.extend(load.adapter for load in loads or ())
        return loads

    plan.slots.place = noted  # type: ignore[method-assign]
    run(plan)
    assert sorted(loaded) == sorted({adapter for _, _, adapter in mix if adapter})


def first_pass(passes: list[list[tuple[int, int, int]]], key: int) -> int:
    return next(number for number, chunks in enumerate(passes) if any(key == one for one, _, _ in chunks))


@pytest.mark.parametrize(("adapter", "merged"), [(None, False), ("c", False), ("c", True)])
def test_an_urgent_row_waits_for_no_more_than_what_runs(adapter: str | None, merged: bool) -> None:
    """Before hundreds that wait, with all places and slots taken, or other weights merged."""
    plan = scheduler(slots=2, seqs=4)
    for key in range(200):
        plan.add(sequence(key, 2, 4 + key % 7, "ab"[key // 5 % 2]))

    def ask(number: int) -> None:
        if number == 20:
            plan.add(mixed(1000, 2, 3, plain(adapter), merged=merged, urgent=True))

    passes = run(plan, ask)
    assert 20 <= first_pass(passes, 1000) <= 20 + (11 if adapter else 0)
    if not merged:  # what runs beside it goes on, and places that come free meanwhile are filled
        assert all(len(chunks) >= 3 for chunks in passes[20:100])


@pytest.mark.parametrize(("adapter", "merged"), [(None, False), ("c", False), ("c", True)])
def test_urgent_rows_do_not_keep_the_others_waiting_for_ever(adapter: str | None, merged: bool) -> None:
    plan = scheduler(slots=2, seqs=2)

    def ask(number: int) -> None:
        if number < 1000:
            plan.add(mixed(1000 + number, 2, 3, plain("a"), urgent=True))
        if number == 10:
            plan.add(mixed(1, 2, 3, plain(adapter), merged=merged))

    plan.add(mixed(0, 2, 3, plain("a"), urgent=True))
    assert first_pass(run(plan, ask), 1) < 200


asked = st.tuples(st.integers(1, 30), st.integers(1, 30), mixes, st.booleans(), st.booleans(), st.integers(0, 60))


@given(st.lists(asked, max_size=25), st.sampled_from(Eviction), st.integers(1, 4), st.sampled_from([2, 10**6]))
def test_urgent_rows_come_first_and_every_row_is_computed_whole(
    wanted: list[tuple[int, int, Mix, bool, bool, int]], eviction: Eviction, seqs: int, patience: int
) -> None:
    plan = scheduler(slots=3, pages=24, seqs=seqs, eviction=eviction)
    added = [
        mixed(key, prompt, answer, mix, merged=merged, urgent=urgent)
        for key, (prompt, answer, mix, merged, urgent, _) in enumerate(wanted)
    ]
    late = sorted(zip((when for *_, when in wanted), added, strict=True), key=lambda one: one[0])
    waited: list[Sequence] = []

    def check(number: int) -> None:
        while late and (late[0][0] <= number or not (plan.waiting or plan.running)):
            plan.add(late.pop(0)[1])
        if patience == 10**6:
            still = {(one.request.mix, one.request.merged) for one in waited if one.request.urgent and not one.started}
            begun = [one for one in waited if one.started and not one.request.urgent]
            assert not [one for one in begun if (one.request.mix, one.request.merged) in still]
        waited[:] = [one for one in plan.waiting if not one.started]

    while late or plan.waiting or plan.running:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(scheduler_module, "WEIGHTS_PATIENCE", patience)
            check(0)
            run(plan, check)
    assert all(one.generated == one.request.sampling.max_tokens for one in added)
    assert not plan.slots._running


def test_rows_of_one_pass_share_what_one_of_them_computes() -> None:
    plan = scheduler(seqs=3, budget=100)
    for key, prompt in enumerate([40, 40, 33]):
        plan.add(sequence(key, prompt, 1))
    plan.add(sequence(3, 40, 1, "a"))
    assert run(plan) == [[(0, 0, 40), (1, 32, 8), (2, 32, 1)], [(3, 0, 40)]]


def test_an_evicted_prefix_is_computed_again() -> None:
    plan = scheduler(pages=4, seqs=1, budget=100)
    for key, (prompt, adapter) in enumerate([(40, None), (40, None), (60, "a"), (40, None)]):
        plan.add(sequence(key, prompt, 1, adapter))
    assert run(plan) == [[(0, 0, 40)], [(1, 32, 8)], [(2, 0, 60)], [(3, 0, 40)]]
