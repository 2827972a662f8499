"""What a person sees while a run goes on: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

PLAIN_EVERY_S = 5.0
LIVE_EVERY_S = 0.1
_RATE_WINDOW_S = 15.0


@dataclass(slots=True, frozen=True)
class Moment:
    """The counts of a run, or of a job elsewhere, at one moment; tokens count from its start."""

    rows_done: int
    rows_failed: int
    prompt_tokens: int
    completion_tokens: int
    adapters_resident: int | None = None
    """Of a run in this process, as are those that follow."""
    prompt_tokens_shared: int = 0
    """Not computed, beside `prompt_tokens`."""


class Progress:
    """Shows Moments of a run over `rows` rows on `stream`, no more often than a person can read them.

    A context manager: the live line, where there is one, goes away with it.
    """

    def __init__(
        self,
        rows: int,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows = rows
        self._clock = clock
        self._quiet = quiet
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._is_live = self._console.is_terminal
        # The counts need the 80 columns of an ordinary terminal; the bar comes where there are more.
        columns = [TextColumn("{task.description}"), *([BarColumn(bar_width=24)] if self._console.width > 110 else [])]
        self._bar = RichProgress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("", total=max(rows, 1))
        self._seen: deque[tuple[float, Moment]] = deque()
        self._shown_at = clock()

    def __enter__(self) -> Progress:
        if self._is_live and not self._quiet:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._is_live and not self._quiet:
            self._bar.stop()

    def update(self, moment: Moment) -> None:
        """Takes the newest counts; cheap enough for every step of the engine."""
        now = self._clock()
        every_s = LIVE_EVERY_S if self._is_live else PLAIN_EVERY_S
        if self._quiet or (self._seen and now - self._shown_at < every_s):
            return
        self._seen.append((now, moment))
        while now - self._seen[0][0] > _RATE_WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        if self._is_live:
            self._bar.update(self._task, completed=moment.rows_done, description=self._line())
        elif len(self._seen) > 1:
            self._console.print(self._line())
        self._shown_at = now

    def say(self, text: str) -> None:
        """One line that stays, above the live one where there is one."""
        if not self._quiet:
            self._console.print(text, markup=False)

    def _line(self) -> str:
        since, first = self._seen[0]
        now, last = self._seen[-1]
        spent_s = max(now - since, 1e-9)
        rows_s = (last.rows_done - first.rows_done) / spent_s
        # What matters most comes first: a narrow terminal cuts off the end.
        parts = [
            f"{last.rows_done:,}/{self._rows:,} rows",
            f"ETA {_clock_face((self._rows - last.rows_done) / rows_s) if rows_s else '--:--'}",
            f"in {_rate(last.prompt_tokens - first.prompt_tokens, spent_s)}"
            f" out {_rate(last.completion_tokens - first.completion_tokens, spent_s)} tok/s",
            f"{last.rows_failed:,} failed",
        ]
        if last.adapters_resident is not None:
            parts.append(f"{last.adapters_resident} adapters resident")
        if last.prompt_tokens_shared:
            share = last.prompt_tokens_shared / (last.prompt_tokens + last.prompt_tokens_shared)
            parts.append(f"{share:.0%} of prompts shared")
        return "  ".join(parts)


def counter(what: str, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> Callable[[int], None]:
    """A callback that takes a growing count and says it every few seconds: `what` with the count in place of `{}`."""
    said_at = clock()

    def say(count: int) -> None:
        nonlocal said_at
        if clock() - said_at >= PLAIN_EVERY_S:
            note(what.format(f"{count:,}"), quiet=quiet)
            said_at = clock()

    return say


def note(text: str, *, quiet: bool = False) -> None:
    """One line about the run as a whole, on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _rate(count: int, spent_s: float) -> str:
    rate = count / spent_s
    return f"{rate / 1000:,.1f}k" if rate >= 10_000 else f"{rate:,.0f}"


def _clock_face(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
