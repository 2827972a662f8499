"""The documents' section of `python -m bench.operations`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures import spread
from bench.point_report import made_by

Result = Mapping[str, Any]

TITLES = {
    "qkv_rotation": "q, k, v; rotation",
    "attention": "attention",
    "out_down_norm": "o, down; norms",
    "gate_up": "gate, up",
    "rest": "embedding, head, engine",
}


def section(results: Sequence[Result]) -> str:
    """A table of each result."""
    return "\n".join(map(_table, results))


def _table(result: Result) -> str:
    base, lora = result["seconds"].values()
    lines = ["| | operation | no LoRA | 16 adapters | |", "|---|---|---|---|---|"]
    for phase in base:
        for operation, title in TITLES.items():
            lines.append(_row(phase, title, base[phase][operation], lora[phase][operation]))
        lines.append(_row(phase, "all", sum(base[phase].values()), sum(lora[phase].values())))
    lines.append(_row("both", "all", _all(base), _all(lora)))
    reads = {name: f"{size / 1e6:,.0f} MB" for name, size in result["bytes_of_pass"].items()}
    speed = result["read_bytes_s"]
    extra = result["bytes_of_pass"]["low_rank"] / speed
    (first, second), rounds = result["seconds"], result["rounds_s"]
    found = spread([one[first] / one[second] for one in rounds])
    about = (
        f"{first} / {second}: {found.median:.2f}x ({found.low:.2f}x-{found.high:.2f}x), the ratios of {len(rounds)} "
        "rounds in which passes of both took turns. The table has the least seconds of every operation, summed, and "
        f"the same ratio of them. A decode pass of all rows reads {reads['weights']} of weights, "
        f"{reads['keys_values']} of keys and values when half of the answer is there, and {reads['low_rank']} of "
        f"low-rank weights: {extra * 1e3:.1f} ms at the {speed / 1e9:.0f} GB/s that a sum reads. {made_by(result)}"
    )
    return "\n".join([*lines, "", about, ""])


def _row(phase: str, title: str, base: float, lora: float) -> str:
    return f"| {phase} | {title} | {base:.3f} s | {lora:.3f} s | {base / lora:.2f}x |"


def _all(phases: Mapping[str, Mapping[str, float]]) -> float:
    return sum(sum(operations.values()) for operations in phases.values())
