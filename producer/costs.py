"""What a pass costs on one machine with one model, and the seconds of a job that follow from it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from loramill.producer.work import Totals

Floats = NDArray[np.float64]


@dataclass(slots=True, frozen=True)
class Costs:
    """Seconds, none negative. A pass takes what the base takes and, where adapters are in it, LoRA's addition."""

    prefill_s_per_token: float
    decode_s_per_pass: float
    decode_s_per_row: float
    """Of a row in a pass."""
    lora_s_per_token: float = 0.0
    """Added to a prompt token of a row with an adapter."""
    lora_s_per_pass: float = 0.0
    """Added to a decode pass with any adapter in it."""
    lora_s_per_row: float = 0.0
    """Added for each decoding row with an adapter."""
    lora_s_per_adapter: float = 0.0
    """Added for each distinct adapter in a decode pass: a tile of its own, its weights read."""
    merge_s: float = 0.0
    """The base's weights made anew with one adapter in them."""
    restore_s: float = 0.0
    """The base's own weights again, after a merge."""
    load_s: float = 0.0
    """An adapter from host memory into a slot."""
    read_s: float = 0.0
    """An adapter from disk into host memory."""


@dataclass(slots=True, frozen=True)
class Timing:
    """One pass that was timed: prompt `tokens` and decoding `rows`, shared out evenly over `adapters` (0: no LoRA)."""

    seconds: float
    tokens: int = 0
    rows: int = 0
    adapters: int = 0


def fit(
    timings: Iterable[Timing],
    *,
    merge_s: float = 0.0,
    restore_s: float = 0.0,
    load_s: float = 0.0,
    read_s: float = 0.0,
) -> Costs:
    """The costs that explain a few timings best, by non-negative least squares of the relative errors.

    Seven passes determine it: a prompt without LoRA and one with; decode without LoRA at two batch sizes; decode with
    one adapter at two batch sizes, and with many adapters. More are welcome, repeats above all: of passes of one shape
    the fastest counts, since noise only adds. What the timings cannot tell apart goes to as few costs as explain it,
    and LoRA that was timed faster than no LoRA costs nothing.

    Raises:
        ValueError: no pass without LoRA with prompt tokens, or none with decoding rows.
    """
    best: dict[tuple[int, int, int], float] = {}
    for one in timings:
        shape = one.tokens, one.rows, one.adapters
        best[shape] = min(one.seconds, best.get(shape, np.inf))
    plain = {shape: seconds for shape, seconds in best.items() if not shape[2]}
    if not any(tokens for tokens, _, _ in plain) or not any(rows for _, rows, _ in plain):
        raise ValueError("fit needs a prompt and a decode pass that were timed without LoRA")
    prefill, each_pass, each_row = _least_squares(plain, plain, columns=3)
    base = {shape: prefill * shape[0] + each_pass * (shape[1] > 0) + each_row * shape[1] for shape in best}
    added = {shape: max(0.0, seconds - base[shape]) for shape, seconds in best.items() if shape[2]}
    lora = _least_squares(added, best, columns=4) if added else [0.0] * 4
    token, lora_pass, row, adapter = lora
    return Costs(prefill, each_pass, each_row, token, lora_pass, row, adapter, merge_s, restore_s, load_s, read_s)


def _least_squares(
    seconds: dict[tuple[int, int, int], float], scale: dict[tuple[int, int, int], float], *, columns: int
) -> list[float]:
    """Non-negative weights of tokens, pass, rows and adapters: the best of every subset of columns, by trying them."""
    shapes = list(seconds)
    weight = 1 / np.array([max(scale[shape], 1e-12) for shape in shapes])
    table = [[tokens, rows > 0, rows, adapters * (rows > 0)][:columns] for tokens, rows, adapters in shapes]
    left, right = np.array(table, float) * weight[:, None], np.array(list(seconds.values())) * weight
    best, least = np.zeros(columns), float(right @ right)
    for size in range(1, columns + 1):
        for chosen in combinations(range(columns), size):
            found = np.linalg.lstsq(left[:, chosen], right, rcond=None)[0]
            error = float(np.sum((left[:, chosen] @ found - right) ** 2))
            if (found >= 0).all() and error < least * (1 - 1e-6) - 1e-15:
                best, least = np.zeros(columns), error
                best[list(chosen)] = found
    return [float(one) for one in best]


def dynamic_seconds(costs: Costs, totals: Totals, passes: Floats, *, slots: int) -> Floats:
    """Seconds of rows that run dynamically, loads into slots included."""
    lora_passes = np.minimum(passes, totals.present)
    return (
        costs.prefill_s_per_token * totals.prompt
        + costs.decode_s_per_pass * passes
        + costs.decode_s_per_row * totals.answer
        + costs.lora_s_per_token * totals.lora_prompt
        + costs.lora_s_per_pass * lora_passes
        + costs.lora_s_per_row * totals.lora_answer
        + costs.lora_s_per_adapter * np.minimum(totals.present, slots * passes)
        + costs.load_s * totals.loads
    )


def static_seconds(costs: Costs, *, prompt: Floats, answer: Floats, passes: Floats, merges: Floats) -> Floats:
    """Seconds of static waves: no LoRA, `merges` adapters merged, `passes` until each wave has drained."""
    return (
        costs.prefill_s_per_token * prompt
        + costs.decode_s_per_pass * passes
        + costs.decode_s_per_row * answer
        + costs.merge_s * merges
    )
