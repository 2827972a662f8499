"""How a command ends: its exit codes, and the one error that carries a code to the person."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What `loramill` returns to the shell."""

    OK = 0
    MACHINE = 1
    """The machine failed us; what is committed stays and the same command resumes."""
    USAGE = 2
    ROWS_FAILED = 3
    """Finished, and some rows failed or were skipped as invalid."""
    INPUT = 4
    """The input, the base or an adapter is not usable: found before any compute."""
    CANCELLED = 5
    """The job was cancelled; what was committed stays."""
    EXPIRED = 6
    """The job was not finished in its time."""
    NOT_FOUND = 7
    """There is no such job."""
    WAITED = 124
    """A wait timed out; the job goes on."""
    INTERRUPTED = 130


class Failure(Exception):
    """Ends the command with `code`; each of `lines` is one clear line for stderr."""

    def __init__(self, code: ExitCode, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.code = code
        self.lines = lines
