"""Rows for the stub engine, and what they must come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from tests.chaos.oracle import Expected
from tests.stub_engine import manifest

BASE = "stub"
HASHES: dict[str | None, str | None] = {None: None} | {one.name: one.sha256 for one in manifest()[0].adapters}


@dataclass(slots=True, frozen=True)
class Rows:
    """A job's input lines, and what they must come to."""

    lines: list[bytes] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)


def id_of(number: int) -> str:
    """Of the row with this number."""
    return f"r{number:05}"


def rows_of(
    count: int,
    adapters: Sequence[str | None] = (None, "a00", "a01", "a02", "a03"),
    special: Mapping[int, str] | None = None,
    failing: Mapping[int, str] | None = None,
) -> Rows:
    """`count` rows that go round `adapters`. `special`: words for the stub in the prompt of some rows; `failing`: the
    error codes with which some must fail."""
    special, failing, made = special or {}, failing or {}, Rows()
    for number in range(count):
        adapter = adapters[number % len(adapters)]
        prompt = f"row {number} {special[number]}" if number in special else f"row {number}"
        line: dict[str, object] = {"id": id_of(number), "prompt": prompt, "max_tokens": 4, "temperature": 0}
        made.lines.append(orjson.dumps(line | ({"adapter": adapter} if adapter else {})))
        if number in failing:
            made.expected.append(Expected(id_of(number), adapter, "", 500, failing[number]))
        else:
            made.expected.append(Expected(id_of(number), adapter, f"{adapter or BASE} ok:{prompt}"))
    return made
