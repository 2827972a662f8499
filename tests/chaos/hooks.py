"""What a chaos test does inside a worker's own processes: signals at exact points, short times, another clock, a disk
that is full. Nothing of it is in what is shipped; see `site/sitecustomize.py`."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from loramill.store.contract import JobStore
from loramill.store.part_files import Files


class Point(StrEnum):
    """Where a worker is when it gets a signal."""

    AFTER_CLAIM = "after-claim"
    BEFORE_COMMIT = "before-commit"
    MID_COMMIT = "mid-commit"
    """The results are on their way: in a part file, if there are files; the store does not speak of them."""
    AFTER_COMMIT = "after-commit"
    """The store has them, and the worker has not looked at its answer."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Chaos:
    """What happens in a worker's processes."""

    times: Mapping[str, float] = field(default_factory=dict)
    """`module:NAME` -> seconds, in place of what the module says, before anything else is imported."""
    at: Point | None = None
    """Where the worker gets `signal`, the first of all workers that has the same `once`."""
    signal: str = "SIGKILL"
    once: str = ""
    """A file that says that it has happened."""
    clock_s: float = 0.0
    """How much this machine's clock is ahead, for this worker and its engine."""
    file_bytes: int | None = None
    """No file of the worker may become larger."""

    def environment(self) -> dict[str, str]:
        """Of a process that is to be so."""
        return {"LORAMILL_CHAOS": json.dumps(asdict(self))}


def install(text: str) -> None:
    """Does what `Chaos.environment` says in this process."""
    chaos = Chaos(**json.loads(text))
    if chaos.clock_s:
        _shift_clock(chaos.clock_s)
    if any(part in ("tests.chaos.child", "loramill.worker.child") for part in sys.orig_argv):
        # An engine has no store, and not its worker's limit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return
    for name, seconds in chaos.times.items():
        module, _, constant = name.partition(":")
        loaded = importlib.import_module(module)
        getattr(loaded, constant)  # a name that is no more must not go unseen
        setattr(loaded, constant, seconds)
    if chaos.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (chaos.file_bytes, resource.RLIM_INFINITY))
    if chaos.at is not None:
        _signal_at(Point(chaos.at), signal.Signals[chaos.signal], Path(chaos.once))


def _shift_clock(seconds: float) -> None:
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + round(seconds * 1e9)


def _signal_at(point: Point, which: signal.Signals, once: Path) -> None:
    begin = JobStore.__init__

    def hit(here: Point) -> None:
        if here is not point:
            return
        with contextlib.suppress(FileExistsError):
            os.close(os.open(once, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            once.write_text(str(os.getpid()))
            os.kill(os.getpid(), which)

    def around(method: Callable[..., Any], before: Point | None, after: Point | None) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            if before is not None:
                hit(before)
            returned = method(*given, **named)
            if after is not None and returned is not None:
                hit(after)
            return returned

        return called

    def begun(self: JobStore, files: Files | None) -> None:
        begin(self, files)
        for name, before, after in (
            ("claim", None, Point.AFTER_CLAIM),
            ("commit", Point.BEFORE_COMMIT, None),
            ("_commit", Point.MID_COMMIT, Point.AFTER_COMMIT),
        ):
            setattr(self, name, around(getattr(self, name), before, after))

    JobStore.__init__ = begun  # type: ignore[method-assign]
