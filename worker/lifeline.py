"""A worker that ends with whoever started it, however that was."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

LIFELINE = "LORAMILL_LIFELINE"
"""Set by whoever starts a worker and wants it to end with himself: a file descriptor, of a pipe that he holds open."""


@contextmanager
def tied(
    command: Sequence[str], environment: Mapping[str, str], *, stdout: int | IO[bytes], stderr: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs a worker, which ends at once when this process does, or when the block is left."""
    watched, held = os.pipe()
    try:
        # A session of its own: a terminal's Ctrl-C reaches it through this process alone, once and as a SIGTERM.
        process = subprocess.Popen(
            command, env={**environment, LIFELINE: str(watched)}, pass_fds=[watched], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        )  # fmt: skip
    except BaseException:
        os.close(held)
        raise
    finally:
        os.close(watched)
    try:
        yield process
    finally:
        os.close(held)


def follow_lifeline() -> None:
    """Ends this process when whoever started it is gone, if he asked for that."""
    if LIFELINE in os.environ:
        threading.Thread(target=_follow, args=(int(os.environ[LIFELINE]),), daemon=True).start()


def _follow(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)
