"""The documents' section of `python -m bench.serve`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

_STORES = {"sqlite": "SQLite", "redis": "Redis"}


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """What a server takes while large files pass through it, and how long others wait."""
    return "\n".join(map(_one, results))


def _one(result: Mapping[str, Any]) -> str:
    megabytes, hardware = result["file_bytes"] / 1e6, result["hardware"]
    rows = [
        f"| {_STORES[name]} | {_mb(one['started_rss_bytes'])} | {_mb(one['idle_rss_bytes'])} | "
        f"{_mb(one['peak_rss_bytes'])} | {one['median_s'] * 1e3:.0f} ms | {one['p99_s'] * 1e3:.0f} ms | "
        f"{one['slowest_s'] * 1e3:.0f} ms | {_rate(megabytes, one['uploads_s'])} | "
        f"{_rate(megabytes, one['downloads_s'])} | {one['others_cores']:.1f} |"
        for name, one in result["stores"].items()
    ]
    return "\n".join(
        [
            "| store | memory at its start | idle, once it has checked batches | at most | look, median | 99% | "
            "slowest | upload | download | cores busy with others' work |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"{result['clients']} clients look at batches once a second, while a file of {megabytes:.0f} MB is "
            f"uploaded and another downloaded, again and again, by OpenAI's client; {_looks(result)} looks. Clients, "
            f"server and Redis share {hardware['cores']} cores of {hardware['cpu']}; {result['date']}; "
            f"`{result['command']}`.",
            "",
        ]
    )


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def _rate(megabytes: float, seconds: Sequence[float]) -> str:
    return f"{megabytes / median(seconds):.0f} MB/s" if seconds else "not done in time"


def _looks(result: Mapping[str, Any]) -> str:
    return " and ".join(f"{one['looks']:,}" for one in result["stores"].values())
