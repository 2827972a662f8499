"""Costs from a few timings, and what is merged because of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.producer.costs import Costs, Timing, fit
from loramill.producer.plan import Plan, plan
from loramill.producer.waves import Limits, MixFacts, Mode

COSTS = Costs(5e-4, 0.015, 7e-4, 5e-5, 0.004, 1e-4, 5e-4, merge_s=1.0, restore_s=0.5, load_s=0.02, read_s=0.02)
PASSES = [(512, 0, 0), (512, 0, 1), (0, 8, 0), (0, 64, 0), (0, 8, 1), (0, 64, 1), (0, 64, 8)]
"""(prompt tokens, decoding rows, adapters): what `fit` says is enough."""


def seconds(costs: Costs, tokens: int, rows: int, adapters: int) -> float:
    base = costs.prefill_s_per_token * tokens + costs.decode_s_per_pass * (rows > 0) + costs.decode_s_per_row * rows
    if not adapters:
        return base
    decode = costs.lora_s_per_pass + costs.lora_s_per_row * rows + costs.lora_s_per_adapter * adapters
    return base + costs.lora_s_per_token * tokens + decode * (rows > 0)


def timings(costs: Costs, noise: np.random.Generator | None = None, repeats: int = 1) -> list[Timing]:
    def one(shape: tuple[int, int, int]) -> Timing:
        return Timing(seconds(costs, *shape) * (1 + (noise.exponential(0.05) if noise else 0)), *shape)

    return [one(shape) for shape in PASSES for _ in range(repeats)]


part = st.floats(1e-6, 1e-2)


@given(st.tuples(*[part] * 7), st.tuples(*[st.floats(0, 2)] * 4))
def test_fit_finds_the_costs_of_exact_timings(parts: tuple[float, ...], moves: tuple[float, ...]) -> None:
    costs = Costs(*parts, *moves)
    merge, restore, load, read = moves
    found = fit(timings(costs), merge_s=merge, restore_s=restore, load_s=load, read_s=read)
    assert (found.merge_s, found.restore_s, found.load_s, found.read_s) == moves
    for tokens, rows, adapters in [*PASSES, (4096, 0, 1), (0, 32, 4), (0, 128, 8)]:
        assert seconds(found, tokens, rows, adapters) == pytest.approx(seconds(costs, tokens, rows, adapters), rel=1e-3)


@given(st.lists(st.tuples(st.sampled_from(PASSES), st.floats(0, 10)), max_size=12))
def test_no_fitted_cost_is_negative(extra: list[tuple[tuple[int, int, int], float]]) -> None:
    needed = [Timing(0.2, 512), Timing(0.01, rows=8)]
    found = fit([*needed, *(Timing(took, *shape) for shape, took in extra)])
    parts = [getattr(found, name) for name in Costs.__slots__]
    assert all(part >= 0 and np.isfinite(part) for part in parts)


def test_fit_bears_noise() -> None:
    found = fit(timings(COSTS, np.random.default_rng(0), repeats=3))
    for shape in PASSES:
        assert seconds(found, *shape) == pytest.approx(seconds(COSTS, *shape), rel=0.1)


def test_lora_that_seemed_faster_than_none_costs_nothing() -> None:
    found = fit(
        [Timing(0.2, 512), Timing(0.19, 512, adapters=1), Timing(0.1, rows=8), Timing(0.09, rows=8, adapters=1)]
    )
    assert (found.lora_s_per_token, found.lora_s_per_pass, found.lora_s_per_row, found.lora_s_per_adapter) == (0,) * 4


def test_fit_needs_passes_without_lora() -> None:
    with pytest.raises(ValueError, match="without LoRA"):
        fit([Timing(0.2, 512), Timing(0.1, rows=8, adapters=1)])


def planned(rows: list[int], costs: Costs | None, *, slots: int = 4, order: str = "throughput", base: int = 0) -> Plan:
    """`rows` of each adapter, each of 100 prompt and 50 answer tokens."""
    mix = np.r_[np.repeat(np.arange(len(rows)), rows), np.full(base, -1)].astype(np.int32)
    mix = np.random.default_rng(0).permutation(mix)
    facts = [MixFacts((number,), 16) for number in range(len(rows))]
    limits = Limits(slots, 64, 8192)
    return plan(mix, mix * 0 + 100, mix * 0 + 50, facts, limits, order=order, costs=costs)  # type: ignore[arg-type]


def modes(made: Plan) -> dict[int, str]:
    return {mix: one.mode.value for mix, one in sorted(made.decisions.items())}


def test_many_rows_are_worth_a_merge_and_few_are_not() -> None:
    made = planned([6400, 3200, 6, 5, 4, 3], COSTS)
    assert modes(made) == {0: "static", 1: "static", **dict.fromkeys(range(2, 6), "dynamic")}
    assert made.decisions[0].why.startswith("static: 6,400 rows; merged saves ")
    assert made.decisions[0].why.endswith("a merge costs 1.0 s")
    assert made.decisions[5].why.startswith("dynamic: 3 rows; merged takes ")
    assert made.predicted.merges == 2


def test_without_costs_nothing_is_merged() -> None:
    made = planned([6400, 3200, 6], None)
    assert set(modes(made).values()) == {"dynamic"}
    assert made.decisions[0].why == "dynamic: too little work to measure what merging would save"
    assert made.predicted.seconds is None


def test_small_gains_stay_dynamic() -> None:
    slight = Costs(5e-4, 0.015, 7e-4, lora_s_per_row=5e-6)
    made = planned([6400, 3200], slight)
    assert set(modes(made).values()) == {"dynamic"}
    assert "merged would save" in made.decisions[0].why and "too little to be sure of" in made.decisions[0].why


def test_merging_that_costs_more_than_lora_is_left() -> None:
    assert set(modes(planned([6400, 3200, 6], replace(COSTS, merge_s=1e4))).values()) == {"dynamic"}


def test_windows_of_the_input_merge_again_and_again() -> None:
    """6,400 rows save some 80 s; in 9 windows of 1,024 rows that buys 9 merges of a second, but not of ten."""
    dear = replace(COSTS, merge_s=10.0)
    rows = [6400, 2400]
    assert modes(planned(rows, COSTS, order="input"))[0] == "static"
    assert modes(planned(rows, dear))[0] == "static"
    assert modes(planned(rows, dear, order="input"))[0] == "dynamic"


costs_strategy = st.builds(
    Costs, *[st.floats(0, 1e-3)] * 2, st.floats(0, 0.1), *[st.floats(0, 1e-3)] * 4, merge_s=st.floats(0, 20)
)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), costs_strategy, st.integers(0, 100))
def test_no_choice_of_the_heaviest_is_predicted_to_be_faster(rows: list[int], costs: Costs, base: int) -> None:
    """Beyond the gain that is asked for, against every k; and `predicted` is what was chosen by."""
    auto = planned(rows, costs, base=base)
    assert auto.predicted.seconds is not None
    mix = np.r_[np.repeat(np.arange(len(rows)), rows), np.full(base, -1)].astype(np.int32)
    heaviest = sorted(
        (number for number in range(len(rows)) if rows[number]), key=lambda number: (-rows[number], number)
    )
    facts = [MixFacts((number,), 16) for number in range(len(rows))]
    found = []
    for count in range(len(heaviest) + 1):
        decided = {number: Mode.STATIC if place < count else Mode.DYNAMIC for place, number in enumerate(heaviest)}
        other = plan(mix, mix * 0 + 100, mix * 0 + 50, facts, Limits(4, 64, 8192), costs=costs, decided=decided)
        assert other.predicted.seconds is not None
        found.append(other.predicted.seconds)
    dynamic = found[0]
    assert auto.predicted.seconds <= dynamic + 1e-9
    assert auto.predicted.seconds <= min(found) + 0.021 * dynamic + 1e-9
    assert auto.predicted.seconds == pytest.approx(dynamic) or auto.predicted.seconds <= 0.98 * dynamic + 1e-9


def test_a_reason_says_what_flipping_the_mix_alone_would_change() -> None:
    rows, costs = [3000, 900, 60, 8], replace(COSTS, read_s=0)  # reading is the same either way
    made = planned(rows, costs)
    assert made.predicted.seconds is not None
    mix = np.repeat(np.arange(4), rows).astype(np.int32)
    facts = [MixFacts((number,), 16) for number in range(4)]
    for number, one in made.decisions.items():
        decided = {other: kept.mode for other, kept in made.decisions.items()}
        decided[number] = Mode.DYNAMIC if one.mode is Mode.STATIC else Mode.STATIC
        flipped = plan(mix, mix * 0 + 100, mix * 0 + 50, facts, Limits(4, 64, 8192), costs=costs, decided=decided)
        assert flipped.predicted.seconds is not None
        change = flipped.predicted.seconds - made.predicted.seconds
        said = f"{change:,.1f} s" if change >= 1 else f"{change:.2g} s"
        assert (f"saves {said}" if one.mode is Mode.STATIC else f"takes {said}") in one.why


@pytest.mark.parametrize("order", ["throughput", "input"])
@pytest.mark.parametrize("slots", [1, 4])
def test_static_time_is_the_time_of_its_passes(slots: int, order: str) -> None:
    """One adapter of 130 rows of 50 answer tokens, 64 at once: three rounds, by hand."""
    costs = Costs(5e-4, 0.015, 7e-4, lora_s_per_pass=10, merge_s=2.0)
    made = planned([130], costs, slots=slots, order=order)
    assert made.predicted.passes == 150
    by_hand = 2.0 + 130 * 100 * 5e-4 + 150 * 0.015 + 130 * 50 * 7e-4
    assert made.predicted.seconds == pytest.approx(by_hand)
