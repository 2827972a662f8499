"""Spans of time as people write and read them: `90`, `90s`, `5m`, `4h`, `1d`."""

from __future__ import annotations

import re

import click

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
LONGEST_S = 10 * 366 * 86400


def parse_duration(text: str) -> float:
    """Seconds, above 0 and at most ten years. Raises ValueError."""
    found = _WRITTEN.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not a time: write it like 90, 90s, 5m, 4h or 1d")
    seconds = float(found[1]) * _UNITS[found[2]]
    if not 0 < seconds <= LONGEST_S:
        raise ValueError(f"{text!r} is not above 0 and at most ten years")
    return seconds


def seconds_of(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """The callback of an option that takes a duration."""
    if value is None:
        return None
    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def in_words(seconds: float) -> str:
    """`850 ms`, `42 s`, `5 m 10 s`, `4 h 20 m`, `2 d 3 h`: the two largest units, what is 0 left out."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    left, parts = round(seconds), list[str]()
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, _UNITS[unit])
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return " ".join(part for part in parts[:2] if part)
