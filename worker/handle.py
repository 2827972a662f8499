"""A shard in an engine, as the thread that sent it there sees it: what comes back, in order."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loramill.schemas.said import SaidChoice
from loramill.store.packing import Chunk
from loramill.worker.frames import Kind


@dataclass(slots=True, frozen=True)
class Ended:
    """No more rows of the shard will come."""


@dataclass(slots=True, frozen=True)
class Died:
    """The engine died, and with it what it had of the shard."""

    suspects: tuple[int, ...] = ()
    """Positions of the rows that were running, as far as their results had not come."""
    alone: int | None = None
    """The one row that was in the engine at all."""


@dataclass(slots=True, frozen=True)
class Delta:
    """More of the answers that its row is given."""

    choices: Sequence[SaidChoice]


Event = Chunk | Delta | Ended | Died


class Handle:
    """A shard in an engine. Its events come in order: chunks and deltas, and then Ended or Died, once."""

    def __init__(self, send: Callable[..., None], key: int, job: str, adapters: tuple[str, ...] = ()) -> None:
        """`send` writes a frame to the engine; `adapters` are the keys of those that the rows need."""
        self.key, self.job, self.adapters = key, job, adapters
        self.ended = False
        """Whether all that will come has come; it may still wait to be taken."""
        self._send = send
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def take(self, timeout_s: float) -> Event | None:
        """The next event; None if there is none within the time."""
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def stop(self, *, now: bool) -> None:
        """No further row starts; with `now` the running ones are dropped too. What is finished still comes."""
        if not self.ended:
            self._send(Kind.STOP, key=self.key, now=now)

    def put(self, event: Event) -> None:
        """For the engine's reader."""
        self.ended = self.ended or isinstance(event, Ended | Died)
        self._events.put(event)
