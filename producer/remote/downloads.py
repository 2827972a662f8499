"""A file of the server to here: gone on with where a broken connection left it, and checked."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from loramill.producer.remote.errors import Damaged, Unreachable
from loramill.producer.remote.steps import Body, Call, Item, Next, Pause, Reply, Steps, asked, pause_s

_SHA256 = re.compile(r'"([0-9a-f]{64})"')
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


def fetched(file_id: str, take: Callable[[bytes], Iterable[Any]], patience_s: float) -> Steps[None]:
    """What `take` makes of the bytes of a file as they come, and of b"" at their end, as items. A broken connection is
    taken up again for `patience_s` since the last byte.

    Raises Damaged if they are not what the server said of them, Refused, Unreachable.
    """
    digest, at = hashlib.sha256(), 0
    size: int | None = None
    etag, is_whole = "", False
    attempt, last_s = 0, time.monotonic()
    while not is_whole:
        try:
            reply = yield from asked(_call(file_id, at, etag), patience_s)
            if at == 0:
                etag, said = reply.headers.get("etag", ""), reply.headers.get("content-length")
                size = None if said is None else int(said)
            else:
                _check(reply, file_id, at, size)
            while (part := (yield Next())) is not None:
                digest.update(part)
                at += len(part)
                attempt, last_s = 0, time.monotonic()
                for value in take(part):
                    yield Item(value)
            is_whole = size is None or at >= size
            if not is_whole:
                raise Unreachable(f"the connection ended after {at:,} of {size:,} bytes of {file_id}", sent=True)
        except Unreachable:
            pause = pause_s(attempt, patience_s - (time.monotonic() - last_s), None)
            if pause is None:
                raise
            attempt += 1
            yield Pause(pause)
    known = _SHA256.fullmatch(etag)
    if (size is not None and at != size) or (known is not None and known[1] != digest.hexdigest()):
        raise Damaged(f"{file_id}: what came, {at:,} bytes, is not what the server has")
    for value in take(b""):
        yield Item(value)


def whole(part: bytes) -> Iterable[bytes]:
    """For `fetched`: the bytes as they are."""
    return (part,) if part else ()


def lines_of(parse: Callable[[bytes], Any]) -> Callable[[bytes], Iterable[Any]]:
    """For `fetched`: what `parse` makes of each line that is not blank, without its end."""
    held: list[bytes] = []

    def take(part: bytes) -> Iterator[Any]:
        *whole, last = part.split(b"\n")
        if whole or not part:
            whole[:1] = [b"".join([*held, *whole[:1]])]
            held.clear()
        held.append(last)
        yield from (parse(line) for line in whole if line.strip())

    return take


def _call(file_id: str, at: int, etag: str) -> Call:
    # As it is stored: compressed on the way, its length and its ranges would be another's.
    headers = {"accept-encoding": "identity"}
    if at:
        headers["range"] = f"bytes={at}-"
        if etag:
            headers["if-range"] = etag
    return Call("GET", f"files/{file_id}/content", headers=headers, body=Body.BYTES)


def _check(reply: Reply, file_id: str, at: int, size: int | None) -> None:
    found = _RANGE.fullmatch(reply.headers.get("content-range", ""))
    if reply.status != 206 or found is None or (int(found[1]), int(found[2])) != (at, size):
        raise Damaged(f"{file_id}: the server has another content by now, or gives no ranges; begin again")
