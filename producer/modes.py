"""Which mixes are served dynamically and which merged into the base's weights: by predicted seconds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loramill.producer.costs import Costs, dynamic_seconds, static_seconds
from loramill.producer.waves import Limits, MixFacts, Mode
from loramill.producer.work import Work, merges, shares, totals

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEAST_GAIN = 0.02
"""What merging must save of the job's time to be believed."""


@dataclass(slots=True, frozen=True)
class Decision:
    """How one mix is served, and why in words."""

    mode: Mode
    why: str


def decide(
    work: Work,
    facts: Sequence[MixFacts],
    limits: Limits,
    *,
    mode: Literal["auto", "dynamic", "static"],
    costs: Costs | None,
    decided: Mapping[int, Mode],
) -> dict[int, Decision]:
    """The decision for every mix that has rows, the most tokens first.

    What was decided before is kept, mixes that can only be served merged are, and `mode` decides for the others.
    `auto` looks, for every k, at merging the k mixes with the most tokens. It takes the least k that saves what the
    best one saves, but for `LEAST_GAIN` of that; and none where it saves less than `LEAST_GAIN` of the job. Without
    costs nothing is merged.

    Raises:
        ValueError: an earlier decision cannot be carried out, or a mix that must be dynamic exceeds the free slots.
    """
    decisions: dict[int, Decision] = {}
    open_: list[int] = []
    for mix in np.flatnonzero(work.rows[:-1]).tolist():
        wide = len(limits.needed(facts[mix])) > limits.free
        if mix in decided:
            decisions[mix] = Decision(decided[mix], f"{decided[mix]}: decided by an earlier run of this job")
        elif facts[mix].static_only:
            decisions[mix] = Decision(Mode.STATIC, "static: it can only be served merged")
        elif mode == "auto" and wide:
            why = f"static: its {len(facts[mix].adapters)} adapters are more than the slots have room for"
            decisions[mix] = Decision(Mode.STATIC, why)
        elif mode == "auto":
            open_.append(mix)
        else:
            decisions[mix] = Decision(Mode(mode), f"{mode}: asked for")
        if mix in decisions and decisions[mix].mode is Mode.DYNAMIC and (wide or facts[mix].static_only):
            reason = "it can only be served merged" if facts[mix].static_only else f"{limits.free} slots are free"
            raise ValueError(f"mix {mix} of {len(facts[mix].adapters)} adapters cannot be served dynamically: {reason}")
    if costs is None:
        why = "dynamic: too little work to measure what merging would save"
        decisions |= dict.fromkeys(open_, Decision(Mode.DYNAMIC, why))
    elif open_:
        static = np.array([mix for mix, one in decisions.items() if one.mode is Mode.STATIC], np.int64)
        decisions |= _Auto(work, facts, limits, costs).decide(np.array(open_), static)
    tokens = work.prompt + work.answer
    return {mix: decisions[mix] for mix in sorted(decisions, key=lambda mix: (-tokens[mix], mix))}


class _Auto:
    """The predicted seconds of a job by which of its mixes are merged."""

    def __init__(self, work: Work, facts: Sequence[MixFacts], limits: Limits, costs: Costs) -> None:
        self._work, self._limits, self._costs = work, limits, costs
        self._shares = shares(work, facts, limits)
        self._merges = merges(work, facts)
        self._static = static_seconds(
            costs, prompt=work.prompt, answer=work.answer, passes=work.drained, merges=self._merges
        )

    def decide(self, undecided: Ints, static: Ints) -> dict[int, Decision]:
        """Of `undecided` mixes, where those in `static` are merged whatever is decided."""
        work = self._work
        mixes = undecided[np.lexsort((undecided, -(work.prompt + work.answer)[undecided]))]
        fixed = np.delete(work.longest, np.r_[static, mixes]).max(initial=0)
        all_dynamic = np.delete(self._shares, static, axis=1).sum(axis=1)[:, None]

        # The first k merged, for every k.
        own = self._shares[:, mixes]
        gone = np.cumsum(np.c_[np.zeros(len(own)), own], axis=1)
        longest = np.maximum.accumulate(np.r_[fixed, work.longest[mixes][::-1]])[::-1]
        merged = self._static[static].sum() + np.cumsum(np.r_[0, self._static[mixes]])
        merging = len(static) + np.arange(len(mixes) + 1)
        seconds = self._seconds(all_dynamic - gone, longest, merged, merging)
        # The last few mixes may save next to nothing: as many as bring all but a little of what can be saved.
        count = int(np.argmax(seconds <= seconds.min() + LEAST_GAIN * (seconds[0] - seconds.min())))
        if seconds[0] - seconds[count] < LEAST_GAIN * seconds[0]:
            count = 0

        # The first `count` merged, and each mix in turn served the other way.
        is_static = np.arange(len(mixes)) < count
        sign = np.where(is_static, 1, -1)
        left = all_dynamic - gone[:, [count]] + sign * own
        top, second = np.sort(np.r_[work.longest[mixes[count:]], fixed, 0])[::-1][:2]
        longest = np.where(is_static, np.maximum(work.longest[mixes], top), top)
        longest = np.where(~is_static & (work.longest[mixes] == top), second, longest)
        flipped = self._seconds(left, longest, merged[count] - sign * self._static[mixes], merging[count] - sign)
        changes = (flipped - seconds[count]).tolist()
        return {
            mix: self._decision(mix, merge_it, change, float(seconds[0]))
            for mix, merge_it, change in zip(mixes.tolist(), is_static.tolist(), changes, strict=True)
        }

    def _seconds(self, dynamic: Floats, longest: Floats, static: Floats, merging: Ints) -> Floats:
        """Of alternatives: sums of dynamic `shares`, their longest answer, seconds of static waves, mixes merged."""
        sums = totals(dynamic, longest)
        together = dynamic_seconds(self._costs, sums, sums.passes(self._limits), slots=self._limits.slots)
        # In windows, the base comes back after each but the last.
        return together + static + np.where(merging > 0, self._costs.restore_s * (self._work.windows - 1), 0.0)

    def _decision(self, mix: int, merged: bool, change_s: float, whole_s: float) -> Decision:
        rows = f"{int(self._work.rows[mix]):,} rows"
        merge = f"a merge costs {_seconds(self._costs.merge_s * self._merges[mix])}"
        if merged:
            saves = f"merged saves {_seconds(change_s)} of {_seconds(whole_s)}"
            return Decision(Mode.STATIC, f"static: {rows}; {saves}, {merge}")
        if change_s < 0:
            saves = f"merged would save {_seconds(-change_s)} of {_seconds(whole_s)}"
            return Decision(Mode.DYNAMIC, f"dynamic: {rows}; {saves}, too little to be sure of; {merge}")
        return Decision(Mode.DYNAMIC, f"dynamic: {rows}; merged takes {_seconds(change_s)} longer, {merge}")


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
