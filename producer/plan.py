"""A job's plan: which mixes are merged, the waves, the order of the rows, and what it is going to cost. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loramill.producer.costs import Costs
from loramill.producer.modes import Decision, decide
from loramill.producer.predict import Predicted, predict
from loramill.producer.prefixes import turns
from loramill.producer.waves import Limits, MixFacts, Mode, Wave, arrange, arrange_in_turn
from loramill.producer.work import measure

Ints = NDArray[np.int64]

WINDOW_BATCHES = 16
"""How many batches of rows a window of the input has: with `order="input"` no row overtakes a row of an earlier one."""


@dataclass(slots=True, frozen=True)
class Plan:
    """What to do with every row of a job."""

    waves: list[Wave]
    rows: Ints
    """Positions of all rows in the order to start: the waves' rows."""
    decisions: dict[int, Decision]
    """Of every mix that has rows."""
    predicted: Predicted


def plan(
    mix: NDArray[np.int32],
    prompt_tokens: NDArray[np.integer],
    answer_tokens: NDArray[np.integer],
    facts: Sequence[MixFacts],
    limits: Limits,
    *,
    prompt_hash: NDArray[np.int64] | None = None,
    begins: NDArray[np.int64] | None = None,
    mode: Literal["auto", "dynamic", "static"] = "auto",
    order: Literal["throughput", "input"] = "throughput",
    costs: Costs | None = None,
    decided: Mapping[int, Mode] | None = None,
    to_cut: bool = False,
) -> Plan:
    """Every row in one wave; no wave with more adapters than slots; the same for the same arguments.

    mix: (rows,) position in `facts`, -1 for the base.  prompt_tokens, answer_tokens: (rows,); answers at their longest.
    prompt_hash: (rows,) equal for equal prompts, if such rows are to be side by side: their answers can be shared.
    begins: (rows,) how prompts begin (`prefixes.beginnings`), if rows of a mix that begin alike are to be together:
    what they have in common is then computed once.
    decided: what an earlier run of the same job decided, kept as it is.
    to_cut: the order is going to be cut in shards for several engines: each should then need few adapters.

    `throughput` serves all dynamic waves, which run on into one another, and then one static wave for each merged mix,
    the most tokens first. A static wave starts and ends with an empty engine: ones among the dynamic waves would each
    drain those too, and want the base's weights back. So there is one more part-empty tail than static waves, and no
    restore. `input` does this for each window of the input in turn, and keeps the input's order where the slots allow:
    no row waits for a later window, whatever its adapter.

    Raises:
        ValueError: a mix that must be dynamic needs more adapters than slots are free, or `decided` is impossible.
    """
    prompt, answer = np.asarray(prompt_tokens, np.int64), np.asarray(answer_tokens, np.int64)
    size = max(1, len(mix) if order == "throughput" else WINDOW_BATCHES * limits.max_num_seqs)
    window = np.arange(len(mix)) // size
    work = measure(mix, prompt, answer, window, mixes=len(facts), max_num_seqs=limits.max_num_seqs)
    decisions = decide(work, facts, limits, mode=mode, costs=costs, decided=decided or {})
    merged = np.zeros(len(facts) + 1, bool)  # the base, -1, is the last
    merged[[number for number, one in decisions.items() if one.mode is Mode.STATIC]] = True
    is_static, cost = merged[mix], prompt + answer
    # A row runs for as many passes as its answer has tokens, and its prompt is a part of one.
    length = answer * (1 + prompt.max(initial=0)) + prompt
    turn = turns(mix, length, begins, prompt_hash)
    waves: list[Wave] = []
    for start in range(0, len(mix), size):
        rows = np.arange(start, min(start + size, len(mix)))
        dynamic, static = rows[~is_static[rows]], rows[is_static[rows]]
        if order == "throughput":
            waves += arrange(dynamic, mix, cost, turn, facts, limits, to_cut=to_cut)
        else:
            waves += arrange_in_turn(dynamic, mix, facts, limits)
        waves += _static_waves(static, mix, cost, turn)
    all_rows = np.concatenate([wave.rows for wave in waves]) if waves else np.empty(0, np.int64)
    return Plan(waves, all_rows, decisions, predict(waves, work, facts, limits, costs))


def _static_waves(rows: Ints, mix: NDArray[np.int32], cost: Ints, turn: Ints) -> Iterator[Wave]:
    """One wave a mix, its rows in turn; the mix with the most tokens first, so that a job ends on small tails."""
    ordered = rows[np.lexsort((turn[rows], mix[rows]))]
    parts = np.split(ordered, np.flatnonzero(np.diff(mix[ordered])) + 1) if len(rows) else []
    for part in sorted(parts, key=lambda part: -int(cost[part].sum())):
        yield Wave(Mode.STATIC, (int(mix[part[0]]),), part)
