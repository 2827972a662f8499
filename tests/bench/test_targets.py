"""What was asked against what was found: the best of each side, round by round, and growth from point to point."""

from __future__ import annotations

from typing import Any

import pytest

from bench.named import POINTS
from bench.peers.runner import runners
from bench.targets import TARGETS, Judged, Target, judge


def point(name: str, rows: int = 8, **run_s: list[float]) -> dict[str, Any]:
    found = {
        runner.replace("_", "-"): {"title": runner, "run_s": seconds, "peak_bytes": [100 * len(seconds)]}
        for runner, seconds in run_s.items()
    }
    return {"name": name, "job": {"rows": rows}, "runners": found}


def verdicts(*results: dict[str, Any]) -> dict[str, Judged]:
    return {one.target.what: one for one in judge(results) if one.found}


def test_nothing_is_judged_that_was_not_measured() -> None:
    assert [one.verdict for one in judge([])] == ["not measured"] * len(TARGETS)
    assert all("not measured |" in one.row() for one in judge([]))


def test_the_best_of_each_side_is_compared() -> None:
    found = verdicts(
        point(
            "main", loramill_base=[1.0, 1.0, 1.0], loramill=[2.0, 2.0, 2.0], loramill_16=[1.0, 1.1, 1.25],
            peft_mixed=[9.0, 9.0, 9.0], peft_grouped=[5.0, 5.5, 5.0],
            vllm_4=[7.0, 7.0, 7.0], vllm_16=[20.0, 21.0, 20.0],
        )
    )  # fmt: skip
    assert set(found) == {
        "16 adapters / no LoRA",
        "16 adapters / vLLM CPU with LoRA",
        "16 adapters / best PEFT arrangement",
    }
    assert found["16 adapters / best PEFT arrangement"].found == ([5.0, 5.0, 4.0], "loramill_16 / peft_grouped")
    assert found["16 adapters / best PEFT arrangement"].verdict == "met"
    assert found["16 adapters / no LoRA"].verdict == "met within the spread"
    assert found["16 adapters / vLLM CPU with LoRA"].verdict == "missed"
    assert "| at least 4.50x | 5.00x (4.00x-5.00x) |" in found["16 adapters / best PEFT arrangement"].row()


def test_growth_is_from_point_to_point() -> None:
    few, many = (
        point("growth-1000", 1000, loramill=[1.0, 2.5]),
        point("growth-100000", 100_000, loramill=[125.0, 250.0]),
    )
    found = verdicts(few, many)
    assert found["time for a row"].found == ([1.25, 1.0], "100,000 rows / 1,000 rows")
    assert found["time for a row"].verdict == "met within the spread"
    assert found["most memory"].verdict == "met"


@pytest.mark.parametrize(("shares", "verdict"), [([0.01, 0.02], "met"), ([0.06, 0.08], "missed")])
def test_at_most_is_the_other_way_round(shares: list[float], verdict: str) -> None:
    passes = {str(share): {"title": "pass", "outside": {"median": share}} for share in shares}
    found = verdicts({"part": "engine-time", "passes": passes})
    assert found["engine time outside the forward pass"].verdict == verdict
    assert "| at most 5.0% |" in found["engine time outside the forward pass"].row()


def test_a_bound_within_the_range_is_met() -> None:
    target = Target("x", "y", 1.0, lambda _: None)
    assert Judged(target, ([0.9, 0.95, 1.01], "")).verdict == "met within the spread"
    assert Judged(target, ([0.9, 0.95, 0.99], "")).verdict == "missed"


def test_every_point_names_runners_and_targets_points_that_there_are() -> None:
    every = runners()
    for name, named in POINTS.items():
        assert set(named.runners) <= set(every), name
        assert len(set(named.runners)) == len(named.runners)
    full = [
        point(name, named.spec.rows, **{runner.replace("-", "_"): [1.0] for runner in named.runners})
        for name, named in POINTS.items()
    ]
    passes = {"part": "engine-time", "passes": {"a": {"title": "a", "outside": {"median": 0.01}}}}
    assert all(one.found for one in judge([*full, passes]))
