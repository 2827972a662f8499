"""Processes of a test: started in groups of their own, found by their parents, ended whatever happened."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TAIL = 40


class Process:
    """A command with all that it starts, its output in a file."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("ab") as out:
            self._popen = subprocess.Popen(
                command, env=dict(environment), cwd=log.parent, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        self._seen = {self.pid: _born(self.pid)}
        """All of the family that was ever looked at, and when it began: a number can be another process's by now."""

    @property
    def pid(self) -> int:
        """Of the command itself."""
        return self._popen.pid

    @property
    def code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._popen.poll()

    def family(self) -> list[int]:
        """The command and all that descends from it and is alive, parents first."""
        children: dict[int, list[int]] = {}
        for pid, parent in _parents().items():
            children.setdefault(parent, []).append(pid)
        found = [self.pid] if self.code is None else []
        for pid in found:
            found += children.get(pid, [])
        self._seen |= {pid: _born(pid) for pid in found if pid not in self._seen}
        return found

    def send(self, which: signal.Signals, pid: int | None = None) -> None:
        """To the command alone, or to one of its family; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid if pid is None else pid, which)

    def wait(self, timeout_s: float) -> int:
        """How it ended. Raises AssertionError if it does not."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended within {timeout_s} s\n{self.tail()}") from None

    def end(self) -> None:
        """Kills it with all that it ever started, and waits."""
        while family := self.family():
            # Parents first, so that none starts anything more.
            for pid in family:
                self.send(signal.SIGKILL, pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(0.05)
        for pid, born in self._seen.items():
            if born is not None and _born(pid) == born:
                self.send(signal.SIGKILL, pid)

    def tail(self) -> str:
        """The last lines that it said."""
        lines = self.log.read_text(errors="replace").splitlines()
        return f"--- {self.name} ({self.code}), last of {len(lines)} lines:\n" + "\n".join(lines[-TAIL:])

    def said(self, text: str) -> int:
        """How many of its lines hold the text."""
        return sum(text in line for line in self.log.read_text(errors="replace").splitlines())


def _parents() -> dict[int, int]:
    """Every process of this machine that is no zombie -> its parent."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name in parentheses may hold anything.
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if state not in "ZX":
                    found[int(entry.name)] = int(parent)
    return found


def _born(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def command_of(pid: int) -> str:
    """A process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Whether it runs, be it stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def is_stopped(pid: int) -> bool:
    """Whether a SIGSTOP has come to it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def until(what: str, holds: Callable[[], object], timeout_s: float = 20.0, pause_s: float = 0.05) -> None:
    """Waits until `holds()`. Raises AssertionError, naming `what`, if it never does."""
    given_up = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > given_up:
            raise AssertionError(f"within {timeout_s} s: not {what}")
        time.sleep(pause_s)
