"""The documents' section of `python -m bench.queue`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """What each part of the way of a row takes without a model."""
    return "\n".join(map(_one, results))


def _one(result: Mapping[str, Any]) -> str:
    rows, answer, embedded = result["rows"], result["answer"], result["embedded"]
    memory = result["redis_bytes_per_row"]
    cpu_us = (answer["worker_cpu_s"] + answer["redis_cpu_s"]) / answer["all_rows"] * 1e6
    lines = [
        "| | rows/s | CPU of a row | most memory of the process |",
        "|---|---|---|---|",
        *(
            f"| {title} | {rows / one['wall_s']:,.0f} | {one['cpu_s'] / rows * 1e6:.0f} µs | "
            f"{one['max_rss_bytes'] / 2**20:.0f} MiB |"
            for title, one in (("`submit`", result["submit"]), ("`results -o`, in input order", result["collect"]))
        ),
        f"| {result['workers']} workers, first commit to last | {answer['rows_per_s']:,.0f} | {cpu_us:.0f} µs, "
        f"of which Redis {answer['redis_cpu_s'] / answer['all_rows'] * 1e6:.0f} | |",
        f"| embedded: the same runner and stub into a run's journal, one process | {embedded['rows_per_s']:,.0f} | "
        f"{embedded['cpu_s'] / embedded['rows'] * 1e6:.0f} µs | |",
    ]
    hardware, versions = result["hardware"], result["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"{rows:,} rows of {result['row_bytes']:.0f} bytes over 16 adapters, result lines of "
            f"{result['result_bytes']:.0f} bytes, a stub in the engine's place. Redis holds "
            f"{memory['input']:.0f} bytes a row of input and {memory['output']:.0f} of output "
            f"({_mib(memory['input'])} and {_mib(memory['output'])} MiB a million rows); these rows compress "
            "well. The workers' CPU includes their start. "
            f"{hardware['cores']} cores of {hardware['cpu']}, Redis {versions['redis-server']} with an append-only "
            f"file synced `{result['fsync']}`; {result['date']}; `{result['command']}`.",
            "",
        ]
    )


def _mib(bytes_a_row: float) -> str:
    return f"{bytes_a_row * 1e6 / 2**20:.0f}"
