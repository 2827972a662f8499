"""The simulated cluster, by hand where it is small, and by what must hold where it is not."""

from __future__ import annotations

from dataclasses import asdict
from xml.etree import ElementTree

import numpy as np
import pytest

from bench import simulation_report
from bench.cluster import Outcome, Rows, Setting, Strategy, simulate
from bench.plot import plot
from bench.simulate import STRATEGIES, TITLES, Spec, arrival_shards, make_job, planned_shards, run
from loramill.producer.costs import Costs
from loramill.producer.plan import plan
from loramill.producer.waves import Limits, MixFacts

SMALL = Spec(rows=6000, adapters=300, workers=3, slots=4, max_num_seqs=32, shard_rows=128)


def outcome(
    adapter: list[int], answer: list[int], strategy: Strategy, *, slots: int = 1, workers: int = 1, shard: int = 99
) -> Outcome:
    """A pass takes a second and one more with LoRA, a prompt none, a load ten; two rows at once."""
    costs = Costs(0, 1, 0, lora_s_per_pass=1, load_s=10)
    rows = Rows(np.array(adapter), np.ones(len(adapter), np.int64), np.array(answer))
    shards = np.split(np.arange(len(adapter)), range(shard, len(adapter), shard))
    return simulate(rows, shards, Setting(workers, slots, 2, 99, 9, costs), strategy)


def test_a_row_that_waits_for_its_slot_holds_up_the_others_or_does_not() -> None:
    adapter, answer = [0, 1, 0], [5, 3, 4]
    waiting = outcome(adapter, answer, STRATEGIES["fifo"])
    assert (waiting.makespan_s, waiting.loads, waiting.evictions) == (30 + 2 * (5 + 3 + 4), 3, 2)
    passing = outcome(adapter, answer, STRATEGIES["sorted"])
    assert (passing.makespan_s, passing.loads, passing.evictions) == (20 + 2 * (5 + 3), 2, 1)
    assert passing.busy_s == 2 * (4 + 1 / 2) + 2 * 3 / 2  # full, then half; nobody holds a place during a load
    assert (passing.rows, passing.passes) == (3, 8)


def test_rows_of_the_base_need_no_slot_and_no_lora() -> None:
    found = outcome([-1, -1, -1], [2, 3, 1], STRATEGIES["fifo"])
    assert (found.makespan_s, found.loads, found.busy_s) == (3, 0, 3)


def test_an_adapter_that_is_wanted_in_sight_stays() -> None:
    """Two slots, in turn 0, 1, 2, 0: by recent use 0 would go for 2 and come back."""
    adapter, answer = [0, 1, 2, 0], [1, 9, 1, 1]
    assert outcome(adapter, answer, STRATEGIES["fifo"], slots=2).loads == 4
    assert outcome(adapter, answer, STRATEGIES["plan"], slots=2).loads == 3


def test_a_shard_of_resident_adapters_is_claimed_first() -> None:
    """Shards of one row: a single worker that just had 0 takes the other 0 before 1."""
    adapter, answer = [0] * 50 + [1] * 150 + [0] * 50, [1] * 250
    assert outcome(adapter, answer, Strategy("resident first", "pass over", "lru"), shard=50).loads == 2
    assert outcome(adapter, answer, Strategy("in order", "pass over", "lru"), shard=50).loads == 3


def test_shards_have_every_row_once() -> None:
    rows, limit = make_job(SMALL)
    facts = [MixFacts((adapter,), 16) for adapter in range(SMALL.adapters)]
    made = plan(rows.adapter.astype(np.int32), rows.prompt, limit, facts, Limits(4, 32, 8192))
    for shards in (
        planned_shards(made, SMALL.shard_rows),
        arrival_shards(rows, SMALL.shard_rows),
        arrival_shards(rows, SMALL.shard_rows, batch=100),
    ):
        listed = list(shards)
        assert sorted(np.concatenate(listed).tolist()) == list(range(SMALL.rows))
        assert max(map(len, listed)) <= SMALL.shard_rows


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    hardware = {"cores": 2, "cpu": "A CPU"}
    about = {"name": "simulation-small", "titles": TITLES, "source": "a source", "hardware": hardware}
    return {**about, "spec": asdict(SMALL), "command": "python", "date": "2026-01-02", **run(SMALL)}


def test_the_plan_loads_and_idles_least(result: dict[str, dict[str, dict[str, float]]]) -> None:
    runs = result["runs"]
    for measure in ("makespan_s", "loads", "idle_share"):
        assert runs["plan"][measure] < runs["sorted"][measure] < runs["fifo"][measure]
    for one in runs.values():
        assert one["reads"] <= one["loads"] and one["loads"] - one["swaps"] <= SMALL.workers * SMALL.slots
        assert 0 <= one["idle_share"] < 1


def test_the_section_and_the_plot_show_every_strategy(result: dict[str, object]) -> None:
    text = simulation_report.section([result])
    assert "A simulation: no model ran" in text and "a source" in text
    assert all(f"| {title} |" in text for title in TITLES.values())
    assert f"]({simulation_report.plot_name(result)})" in text
    root = ElementTree.fromstring(plot(simulation_report.points(result), TITLES))
    bars = [one for one in root.iter("{http://www.w3.org/2000/svg}rect") if one.get("height") == "6"]
    assert len(bars) == len(TITLES) * len(simulation_report.MEASURES)
