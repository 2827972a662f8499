"""The documents' sections of `python -m bench.modes` and `python -m bench.thousand`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures import spread

Result = Mapping[str, Any]


def modes(results: Sequence[Result]) -> str:
    """Seconds of every mode on every shape, and how far `auto` is from the better of the other two."""
    return "\n".join(map(_modes, results))


def thousand(results: Sequence[Result]) -> str:
    """What was loaded, read and waited for, by plan and otherwise."""
    return "\n".join(map(_thousand, results))


def _modes(result: Result) -> str:
    lines = [
        "| job | dynamic | static | auto | auto / the better one | served by auto |",
        "|---|---|---|---|---|---|",
    ]
    for shape, one in result["shapes"].items():
        seconds = [_range(one["run_s"][mode], "{:.1f} s") for mode in ("dynamic", "static", "auto")]
        served = ", ".join(f"{rows:,} rows {mode}" for mode, rows in one["details"]["auto"]["modes"].items())
        ratio = _range(one["auto_over_better"], "{:.2f}")
        lines.append(f"| {shape} | {' | '.join(seconds)} | {ratio} ({one['better']}) | {served} |")
    job = next(iter(result["shapes"].values()))["job"]
    rounds = len(next(iter(result["shapes"].values()))["run_s"]["auto"])
    return "\n".join(
        [
            *lines,
            "",
            f"{job['rows']:,} rows of {job['prompt_tokens']} + {job['output_tokens']} tokens, adapters of rank "
            f"{job['rank']} on all linear projections; a random Qwen2 shape of {job['parameters'] / 1e6:.1f}M "
            f"parameters in bfloat16. Medians (ranges) of {rounds} interleaved rounds, adapters and measuring "
            f"included; the ratio is of each round. {_machine(result)}",
            "",
        ]
    )


def _thousand(result: Result) -> str:
    job, runs = result["job"], result["runs"]
    lines = [
        "| | seconds | loads into slots | read from disk | in host memory when asked for | MB read | slots waited "
        "| host tier at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rounds in runs.items():
        one = rounds[-1]
        lines.append(
            f"| {name} | {_range([r['run_s'] for r in rounds], '{:.1f}')} | {one['adapter_loads']:,} | "
            f"{one['host_loads']:,} | {one['host_hits']:,} | {one['host_bytes_read'] / 1e6:,.0f} | "
            f"{_range([r['host_waited_s'] * 1e3 for r in rounds], '{:.0f}')} ms | "
            f"{one['host_most_bytes'] / 2**20:.1f} MiB |"
        )
    ranks = ", ".join(map(str, job["ranks"]))
    return "\n".join(
        [
            *lines,
            "",
            f"{job['rows']:,} shuffled rows over {job['adapters']:,} adapters (Zipf {job['zipf']:g}; ranks {ranks}) of "
            f"the tiny model, 8 slots, host memory for adapters bounded to {result['host_bytes'] / 2**20:.0f} MiB; "
            f"medians (ranges) of {len(next(iter(runs.values())))} interleaved rounds, counts of the last one. "
            f"{_machine(result)}",
            "",
        ]
    )


def _machine(result: Result) -> str:
    hardware, versions = result["hardware"], result["versions"]
    return (
        f"{hardware['cores']} cores of {hardware['cpu']}, torch {versions['torch']}; {result['date']}; "
        f"`{result['command']}`."
    )


def _range(values: Sequence[float], form: str) -> str:
    found = spread(values)
    return f"{form.format(found.median)} ({form.format(found.low)} to {form.format(found.high)})"
