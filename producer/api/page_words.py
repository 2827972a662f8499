"""How the page writes times and numbers."""

from __future__ import annotations

from datetime import UTC, datetime

from loramill.worker.durations import in_words


def when(at_ms: int) -> str:
    """In full, the same for everybody: `2026-01-31 12:00:00 UTC`."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def iso(at_ms: int) -> str:
    """For machines."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")


def ago(at_ms: int, now_ms: float) -> str:
    """`4 m ago`: the largest unit alone."""
    passed_s = (now_ms - at_ms) / 1000
    if passed_s < 5:
        return "just now"
    count, unit = in_words(passed_s).split(" ")[:2]
    return f"{count} {unit} ago"


def left(at_ms: int, now_ms: float) -> str:
    """`in 23 h 10 m`."""
    left_s = (at_ms - now_ms) / 1000
    return f"in {in_words(left_s)}" if left_s > 0 else "now"


def short(number: float) -> str:
    """`950`, `12 k`, `12.4 k`, `3.1 M`: for places where the exact number is noise."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            by = 1e3 if unit == "k" else size
            return f"{number / by:.1f}".removesuffix(".0") + f" {unit}"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"
