"""What `--explain` shows of a plan: as data, and as lines that stay few with a thousand adapters. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from loramill.producer.plan import Plan
from loramill.producer.waves import Mode

SHOWN_WAVES, SHOWN_MIXES, SHOWN_NAMES = 8, 12, 4
"""In full; the rest is counted."""


def describe(
    plan: Plan, names: Sequence[str], tokens: np.ndarray[tuple[int], np.dtype[np.integer[Any]]]
) -> dict[str, Any]:
    """The whole plan in plain values.

    names: of the mixes, by number.  tokens: (rows,) of each row, prompt and answer at its longest.
    """
    return {
        "predicted": asdict(plan.predicted),
        "waves": [
            {
                "mode": wave.mode.value,
                "mixes": [names[mix] if mix >= 0 else "base" for mix in wave.mixes],
                "rows": len(wave.rows),
                "tokens": int(tokens[wave.rows].sum()),
            }
            for wave in plan.waves
        ],
        "mixes": {
            names[mix]: {"mode": one.mode.value, "why": one.why}
            for mix, one in sorted(plan.decisions.items(), key=lambda item: item[1].mode is Mode.DYNAMIC)
        },
    }


def explain(described: Mapping[str, Any]) -> str:
    """What `describe` gave, to be read: the first waves and the heaviest mixes, merged ones before others."""
    waves, mixes, predicted = described["waves"], described["mixes"], described["predicted"]
    seconds = "" if predicted["seconds"] is None else f", {predicted['seconds']:,.1f} s"
    lines = [
        f"predicted at most: {predicted['passes']:,} passes{seconds}; adapters: {predicted['adapter_loads']:,} loads, "
        f"{predicted['adapter_evictions']:,} evictions, {predicted['adapter_reads']:,} reads from disk, "
        f"{predicted['merges']:,} merges, {predicted['restores']:,} restores",
        f"{len(waves):,} waves:",
        *(_wave(number, wave) for number, wave in enumerate(waves[:SHOWN_WAVES], 1)),
    ]
    if rest := waves[SHOWN_WAVES:]:
        rows, tokens = (sum(wave[key] for wave in rest) for key in ("rows", "tokens"))
        lines.append(f"  and {len(rest):,} more ({_modes(rest)}): {rows:,} rows, {tokens:,} tokens")
    lines.append(f"{len(mixes):,} adapters and mixes:")
    shown = list(mixes.items())
    lines += [f"  {_printable(name)}: {one['why']}" for name, one in shown[:SHOWN_MIXES]]
    if others := [one for _, one in shown[SHOWN_MIXES:]]:
        lines.append(f"  and {len(others):,} more ({_modes(others)})")
    return "\n".join(lines)


def _wave(number: int, wave: Mapping[str, Any]) -> str:
    names = ", ".join(_printable(name) for name in wave["mixes"][:SHOWN_NAMES])
    if (more := len(wave["mixes"]) - SHOWN_NAMES) > 0:
        names += f" and {more:,} more"
    return f"  {number}: {wave['mode']}, {names}: {wave['rows']:,} rows, {wave['tokens']:,} tokens"


def _modes(described: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(one["mode"] for one in described)
    return ", ".join(f"{count:,} {mode}" for mode, count in sorted(counts.items()))


def _printable(name: str) -> str:
    """Names come from the job: nothing in them reaches a terminal's controls."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)
