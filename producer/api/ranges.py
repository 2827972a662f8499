"""Which bytes of a file a request asks for (RFC 9110: ranges and conditions)."""

from __future__ import annotations

import re


class Unsatisfiable(Exception):
    """The file has none of the bytes asked for."""


def asked(value: str | None, size: int) -> tuple[int, int] | None:
    """(start, stop) of a Range header; None for the whole file, which is what to send for several ranges too, and for
    what makes no sense. Raises Unsatisfiable."""
    found = re.fullmatch(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", value or "", re.IGNORECASE)
    if found is None or found[0].strip().endswith("=-"):
        return None
    first, last = found[1], found[2]
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size or start >= stop:
        raise Unsatisfiable
    return start, stop


def has_it(value: str | None, etag: str) -> bool:
    """Whether an If-None-Match header says that the client has the file."""
    if value is None:
        return False
    given = [one.strip().removeprefix("W/") for one in value.split(",")]
    return etag in given or given == ["*"]
