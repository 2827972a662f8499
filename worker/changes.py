"""Adapters that come and go while an engine child runs: a thread reads and checks them, the loop takes them over."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from loramill.schemas.failures import Failure
from loramill.worker.frames import Frame, Kind, write_frame
from loramill.worker.serving import Change, Served

KINDS = frozenset({Kind.LOAD, Kind.UNLOAD, Kind.DROP})


@dataclass(slots=True, frozen=True)
class Prepared:
    """What became of one wish: a change to be taken over, or why there is none."""

    asked: Frame
    change: Change | None
    refused: str | None = None


class Changes:
    """What a child serves, and how that changes. Only `prepare` runs beside the loop, for one wish at a time: the next
    one is a change to what came of it."""

    def __init__(self, served: Served, outbound: BinaryIO, post: Callable[[Prepared], object]) -> None:
        """`post` hands over to the loop, from any thread."""
        self.served = served
        self._out, self._post = outbound, post
        self._waiting: deque[Frame] = deque()
        self._busy = False

    def say(self) -> None:
        """What is served, to the worker: files first."""
        for sha, blob in self.served.blobs.items():
            write_frame(self._out, Kind.BLOB, blob, sha=sha)
        write_frame(self._out, Kind.MANIFEST, manifest=self.served.manifest.model_dump(mode="json"))

    def ask(self, frame: Frame) -> None:
        """One of KINDS came."""
        if frame.kind is Kind.DROP:
            self.served = self.served.dropping(frame.fields["key"])
        else:
            self._waiting.append(frame)
            self._begin()

    def take(self, prepared: Prepared) -> None:
        """The thread is done with a wish."""
        before, refused = self.served, prepared.refused
        if prepared.change is not None:
            try:
                self.served = before.taking(prepared.change)
            except ValueError as error:
                refused = str(error)
        if self.served.manifest != before.manifest:
            self.say()
        asked = prepared.asked.fields
        write_frame(self._out, Kind.ANSWER, name=asked["name"], stamp=asked["stamp"], refused=refused)
        self._busy = False
        self._begin()

    def _begin(self) -> None:
        if self._waiting and not self._busy:
            self._busy = True
            asked, served = self._waiting.popleft(), self.served
            threading.Thread(target=lambda: self._post(prepare(served, asked)), daemon=True).start()


def prepare(served: Served, asked: Frame) -> Prepared:
    """Reads and checks what a wish asks for."""
    said = asked.fields
    try:
        if asked.kind is Kind.LOAD:
            return Prepared(asked, served.offers.adding(said["name"], said["source"], said["scale"]))
        return Prepared(asked, served.offers.removing(said["name"]))
    except (ValueError, Failure) as error:
        return Prepared(asked, None, "; ".join(str(error).splitlines()))
    except Exception as error:  # whatever it is: an adapter that cannot be had, which the others do not suffer for
        return Prepared(asked, None, f"{type(error).__name__}: {' '.join(str(error).split())}")
