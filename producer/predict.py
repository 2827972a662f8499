"""What a plan takes: passes, adapters moved, merges and, where costs are known, seconds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from loramill.producer.costs import Costs, dynamic_seconds, static_seconds
from loramill.producer.traffic import traffic
from loramill.producer.waves import Limits, MixFacts, Mode, Wave
from loramill.producer.work import Work, merges, shares, totals


@dataclass(slots=True, frozen=True)
class Predicted:
    """What carrying out the plan takes if every answer is as long as it may be."""

    seconds: float | None
    """None without costs."""
    passes: int
    adapter_loads: int
    """Into slots, each adapter's next need known."""
    adapter_evictions: int
    adapter_reads: int
    """From disk."""
    merges: int
    """Adapters merged into the base's weights."""
    restores: int
    """Times that the base's own weights come back for a dynamic wave."""


def predict(
    waves: Sequence[Wave], work: Work, facts: Sequence[MixFacts], limits: Limits, costs: Costs | None
) -> Predicted:
    """Of waves in which every mix is either dynamic or static throughout."""
    needs = [
        frozenset[int]().union(*(facts[mix].adapters for mix in wave.mixes if mix >= 0))
        for wave in waves
        if wave.mode is Mode.DYNAMIC
    ]
    moved = traffic(needs, slots=limits.slots, host=limits.max_loaded_loras, pinned=limits.pinned)
    static = np.unique([wave.mixes[0] for wave in waves if wave.mode is Mode.STATIC]).astype(np.int64)
    restores = sum(one.mode is Mode.STATIC and two.mode is Mode.DYNAMIC for one, two in pairwise(waves))
    sums = np.delete(shares(work, facts, limits), static, axis=1).sum(axis=1)
    sums[-1] = moved.loads
    dynamic = totals(sums, np.delete(work.longest, static).max(initial=0))
    passes = dynamic.passes(limits)
    merged, drained = merges(work, facts)[static].sum(), work.drained[static].sum()
    seconds = None
    if costs:
        prompt, answer = work.prompt[static].sum(), work.answer[static].sum()
        alone = static_seconds(costs, prompt=prompt, answer=answer, passes=drained, merges=merged)
        together = dynamic_seconds(costs, dynamic, passes, slots=limits.slots)
        seconds = float(alone + together + costs.read_s * moved.reads + costs.restore_s * restores)
    return Predicted(
        seconds=seconds,
        passes=int(np.ceil(passes + drained)),
        adapter_loads=moved.loads,
        adapter_evictions=moved.evictions,
        adapter_reads=moved.reads,
        merges=int(merged),
        restores=restores,
    )
