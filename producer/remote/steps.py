"""What a client does, one step after another, as data: who carries the steps out may wait for them or await them.

A task is a generator of steps that returns its result. Each step is answered with what came of it, or with an error
that is raised where the step was asked for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeAlias, TypeVar

from loramill.producer.remote.errors import Refused, Unreachable, refused
from loramill.producer.remote.slices import Form

T = TypeVar("T")

LEAST_S, MOST_S = 0.25, 8.0
"""A pause before asking again: doubled each time, and up to as much again at random, so that clients part."""


class Body(Enum):
    """How an answer is taken."""

    WHOLE = "whole"
    BYTES = "bytes"
    """Opened: then as pieces, by Next."""
    EVENTS = "events"
    """Opened: then as server-sent events."""


@dataclass(slots=True, frozen=True)
class Call:
    """A request, answered with a Reply. Raises Unreachable."""

    method: str
    path: str
    params: Mapping[str, str | int | float] = field(default_factory=dict)
    json: Mapping[str, Any] | None = None
    form: Form | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body = Body.WHOLE
    again: bool = True
    """Whether asking twice does no harm, should the first answer have been lost."""
    timeout_s: float | None = None
    """Longer than usual: of each wait for bytes."""


@dataclass(slots=True, frozen=True)
class Reply:
    """An answer; of one that was opened, unless it is an error, the body comes later."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    content: bytes = b""


@dataclass(slots=True, frozen=True)
class Next:
    """What comes next of the answer that was opened last: bytes, an event, or None at the end. Raises Unreachable."""


@dataclass(slots=True, frozen=True)
class Pause:
    """A while without doing anything."""

    seconds: float


@dataclass(slots=True, frozen=True)
class Do:
    """Work on this machine that may block."""

    work: Callable[[], Any]


@dataclass(slots=True, frozen=True)
class Item(Generic[T]):
    """A value for whoever iterates over the task."""

    value: T


Step: TypeAlias = Call | Next | Pause | Do | Item[Any]
Steps: TypeAlias = Generator[Step, Any, T]


def asked(call: Call, patience_s: float) -> Steps[Reply]:
    """The good answer to a request, asked again for so long while there is hope. Raises Refused, Unreachable."""
    began_s, attempt = time.monotonic(), 0
    while True:
        failure: Refused | Unreachable
        asked_s: float | None = None
        try:
            reply: Reply = yield call
        except Unreachable as error:
            if error.sent and not call.again:
                raise
            failure = error
        else:
            if reply.status < 400:
                return reply
            failure = refused(reply.status, reply.headers, reply.content)
            if not failure.passing:
                raise failure
            asked_s = retry_after_s(reply.headers)
        pause = pause_s(attempt, patience_s - (time.monotonic() - began_s), asked_s)
        if pause is None:
            raise failure
        attempt += 1
        yield Pause(pause)


def pause_s(
    attempt: int, left_s: float, asked_s: float | None, chance: Callable[[], float] = random.random
) -> float | None:
    """How long to wait before asking again, as the server asked or longer each time; None if the time is not enough."""
    pause = min(LEAST_S * 2**attempt, MOST_S / 2) * (1 + chance())
    pause = max(pause, asked_s or 0)
    return pause if pause <= left_s else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """What the server asks for. A date, which ours never gives, is taken for none."""
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None
