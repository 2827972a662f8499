"""A job's plan in its own terms: the mixes that its rows come to, by content, and what is decided about each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loramill.producer.costs import Costs
from loramill.producer.explain import describe
from loramill.producer.index import Index
from loramill.producer.plan import Plan, plan
from loramill.producer.waves import Limits, MixFacts, Mode
from loramill.schemas.names import Names, Uses
from loramill.worker.settings import LoraMode, Order

_SHOWN = 4

Mix = tuple[tuple[str, float], ...]
"""As the engine has it: content hashes with strengths."""


class AdapterFacts(NamedTuple):
    """What planning needs to know of an adapter."""

    rank: int
    static_only: bool


@dataclass(slots=True, frozen=True)
class JobPlan:
    """The plan of some rows of a job."""

    plan: Plan
    mix: NDArray[np.int32]
    """(rows,) position in `mixes` of each row that is planned, -1 for the base."""
    mixes: Sequence[Mix]
    names: Sequence[str]
    """Of the mixes, for people."""
    tokens: NDArray[np.int64]

    @property
    def order(self) -> NDArray[np.int64]:
        """Positions among the planned rows, in the order to start."""
        return self.plan.rows

    @property
    def merged(self) -> frozenset[Mix]:
        """The mixes that are served statically."""
        return frozenset(self.mixes[n] for n, one in self.plan.decisions.items() if one.mode is Mode.STATIC)

    @property
    def decisions(self) -> dict[str, str]:
        """For a journal: the mode of each mix."""
        return {_key(self.mixes[number]): one.mode.value for number, one in self.plan.decisions.items()}

    def predicted_as(self, other: JobPlan) -> JobPlan:
        """The same plan with another's prediction."""
        return replace(self, plan=replace(self.plan, predicted=other.plan.predicted))

    def summary(self) -> list[str]:
        """What was decided and why, in a line or few; nothing where no adapter is asked for."""
        modes = [one.mode for one in self.plan.decisions.values()]
        if not modes:
            return []
        merged = [number for number, one in self.plan.decisions.items() if one.mode is Mode.STATIC]
        reasons = [f"{self.names[number]}: {self.plan.decisions[number].why}" for number in merged[:_SHOWN]]
        if len(merged) < len(modes):
            other = next(one for one in self.plan.decisions.values() if one.mode is Mode.DYNAMIC)
            reasons.append(f"{len(modes) - len(merged):,} adapters and mixes side by side: {other.why}")
        if len(merged) > _SHOWN:
            reasons.append(f"and {len(merged) - _SHOWN:,} more merged; --explain shows them")
        return reasons

    def describe(self) -> dict[str, Any]:
        """What `explain` shows."""
        return describe(self.plan, self.names, self.tokens)


class Draft:
    """Rows that are to be planned: those at `left` of the index."""

    def __init__(
        self, index: Index, left: NDArray[np.int64], names: Names, adapters: Mapping[str, AdapterFacts]
    ) -> None:
        """`adapters` by content hash."""
        # Two names of one content are one mix, so that they are not decided differently.
        shown: dict[Mix, str] = {}
        mixes = [names.by_hash(uses) for uses in index.mixes]
        for mix, uses in zip(mixes, index.mixes, strict=True):
            shown.setdefault(mix, _shown(uses))
        self.mixes, self.names = list(shown), list(shown.values())
        numbers = {mix: number for number, mix in enumerate(self.mixes)}
        self.mix = np.array([*(numbers[mix] for mix in mixes), -1], np.int32)[index.mix[left]]
        self.prompt = index.prompt_tokens[left].astype(np.int64)
        self.answer = index.max_tokens[left].astype(np.int64) * index.n[left]
        self.prompt_hash, self.begins = index.prompt_hash[left], index.begins[left]
        self._adapters = adapters
        self._content = {sha256: number for number, sha256 in enumerate(adapters)}

    @cached_property
    def by_use(self) -> list[str]:
        """Adapters that can be served both ways, by content hash, the most used first."""
        rows = np.bincount(self.mix[self.mix >= 0], minlength=len(self.mixes))
        count: dict[str, int] = {}
        for mix, used in zip(self.mixes, rows, strict=True):
            for sha256, _ in mix:
                count[sha256] = count.get(sha256, 0) + int(used)
        both = [sha256 for sha256 in count if count[sha256] and not self._adapters[sha256].static_only]
        return sorted(both, key=lambda sha256: -count[sha256])

    def undecided(self, decided: Mapping[str, str]) -> bool:
        """Whether some mix of these rows could still be served either way."""
        present = (self.mixes[number] for number in np.unique(self.mix) if number >= 0)
        return any(
            _key(mix) not in decided and not any(self._adapters[sha256].static_only for sha256, _ in mix)
            for mix in present
        )

    @property
    def total_tokens(self) -> int:
        """Prompts, and answers at their longest."""
        return int(self.prompt.sum() + self.answer.sum())

    def plan(
        self,
        *,
        slots: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_loaded_loras: int | None,
        pinned: frozenset[str],
        mode: LoraMode,
        order: Order,
        costs: Costs | None,
        decided: Mapping[str, str],
        to_cut: bool = False,
    ) -> JobPlan:
        """`decided`: what an earlier run of the job kept of its `JobPlan.decisions`. `to_cut` and ValueError as `plan`
        has them."""
        number = self._content
        limits = Limits(
            slots,
            max_num_seqs,
            max_num_batched_tokens,
            frozenset(number[sha256] for sha256 in pinned),
            max_loaded_loras,
        )
        known = {at: Mode(decided[key]) for at, mix in enumerate(self.mixes) if (key := _key(mix)) in decided}
        made = plan(
            self.mix,
            self.prompt,
            self.answer,
            [self._facts(mix) for mix in self.mixes],
            limits,
            prompt_hash=self.prompt_hash,
            begins=self.begins,
            mode=mode,
            order=order,
            costs=costs,
            decided=known,
            to_cut=to_cut,
        )
        return JobPlan(made, self.mix, self.mixes, self.names, self.prompt + self.answer)

    def _facts(self, mix: Mix) -> MixFacts:
        facts = [self._adapters[sha256] for sha256, _ in mix]
        return MixFacts(
            tuple(self._content[sha256] for sha256, _ in mix),
            max(one.rank for one in facts),
            any(one.static_only for one in facts),
        )


def _key(mix: Mix) -> str:
    return json.dumps(mix)


def _shown(uses: Uses) -> str:
    return " + ".join(name if strength == 1 else f"{name}*{strength:g}" for name, strength in uses)
