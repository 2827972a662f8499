"""A worker process, and what is done to it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.chaos.processes import Process, command_of, is_stopped, until


class Worker(Process):
    """A worker process with its engine child."""

    def pids(self) -> tuple[int, int] | None:
        """The process that feeds the engine, and the engine; None while there is none."""
        family = self.family()
        engine = next((pid for pid in family if "tests.chaos.child" in command_of(pid)), None)
        if engine is None:
            return None
        return int(Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[1]), engine

    def node(self) -> int:
        """The process that feeds the engine."""
        until(f"an engine of {self.name}", self.pids)
        found = self.pids()
        assert found is not None
        return found[0]

    def engine(self) -> int:
        """The engine child."""
        until(f"an engine of {self.name}", self.pids)
        found = self.pids()
        assert found is not None
        return found[1]

    def stop(self) -> None:
        """SIGSTOP, as when the machine sleeps: the engine too."""
        for pid in self.family():
            self.send(signal.SIGSTOP, pid)
        until(f"{self.name} stopped", lambda: all(is_stopped(pid) for pid in self.family()), 5)

    def go_on(self) -> None:
        """SIGCONT."""
        for pid in self.family():
            self.send(signal.SIGCONT, pid)

    def term(self, timeout_s: float = 15.0) -> tuple[int, float]:
        """SIGTERM: its exit code, and after how many seconds."""
        begun_s = time.monotonic()
        self.send(signal.SIGTERM)
        return self.wait(timeout_s), time.monotonic() - begun_s
