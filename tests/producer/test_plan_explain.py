"""What `--explain` shows."""

from __future__ import annotations

import json

import numpy as np

from loramill.producer.costs import Costs
from loramill.producer.explain import describe, explain
from loramill.producer.plan import plan
from loramill.producer.waves import Limits, MixFacts

COSTS = Costs(5e-4, 0.015, 7e-4, 5e-5, 0.004, 1e-4, 5e-4, merge_s=1.0)


def test_a_small_plan_is_shown_in_full() -> None:
    mix = np.array([0] * 6400 + [1, -1], np.int32)
    tokens = np.full(len(mix), 100)
    made = plan(mix, tokens, tokens, [MixFacts((0,), 8), MixFacts((1,), 8)], Limits(2, 64, 8192), costs=COSTS)
    described = describe(made, ["sql", "rm\x1b[2J"], tokens * 2)
    lines = explain(described).splitlines()
    assert lines[0].startswith("predicted at most: 10,100 passes, ")
    assert lines[0].endswith("adapters: 1 loads, 0 evictions, 1 reads from disk, 1 merges, 0 restores")
    assert lines[1:4] == [
        "2 waves:",
        "  1: dynamic, base, rm\\x1b[2J: 2 rows, 400 tokens",
        "  2: static, sql: 6,400 rows, 1,280,000 tokens",
    ]
    assert lines[4] == "2 adapters and mixes:"
    assert lines[5].startswith("  sql: static: 6,400 rows; merged saves ")
    assert lines[6].startswith("  rm\\x1b[2J: dynamic: 1 rows; merged takes ")
    assert json.loads(json.dumps(described)) == described


def test_a_thousand_adapters_are_summed_up() -> None:
    mix = np.arange(4000, dtype=np.int32) % 1000
    facts = [MixFacts((number,), 8, static_only=number == 500) for number in range(1000)]
    made = plan(mix, mix * 0 + 10, mix * 0 + 10, facts, Limits(8, 64, 8192))
    described = describe(made, [f"a{number}" for number in range(1000)], mix.astype(np.int64) * 0 + 20)
    text = explain(described)
    assert len(text.splitlines()) < 30
    assert "a500: static: it can only be served merged" in text
    assert "and 988 more (988 dynamic)" in text
    assert sum(wave["rows"] for wave in described["waves"]) == 4000
    assert len(described["mixes"]) == 1000
