"""`loramill run` as a measured process: its summary, and the most memory that it and its children held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMAND = Path(sys.executable).with_name("loramill")
LOOK_S = 0.05
"""Between two looks at the memory."""


class CommandError(Exception):
    """The command failed; the message is what it said."""


def run(arguments: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`loramill run` with `arguments` into a temporary file: its summary with `max_rss_bytes`, and its output lines.

    Raises:
        CommandError: it did not end with 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, said, errors = (Path(folder) / name for name in ("out.jsonl", "said", "errors"))
        command = [str(COMMAND), "run", *arguments, "-o", str(output), "--json", "--quiet"]
        with said.open("w") as stdout, errors.open("w") as stderr:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
            code, most = _wait(process.pid)
            process.returncode = code
        if code:
            raise CommandError(f"loramill {' '.join(arguments)} ended with {code}:\n{errors.read_text()[-2000:]}")
        # Not splitlines: an answer may hold characters that end a line for it and not for JSON.
        lines = [json.loads(line) for line in output.read_text().split("\n") if line]
        return json.loads(said.read_text()) | {"max_rss_bytes": most}, lines


def _wait(pid: int) -> tuple[int, int]:
    """Its exit code, and the most bytes that it and its children had resident at once.

    The system remembers the most of one process; of several together there is only what a look finds. (What wait4
    tells of a process begins with the memory of the one that started it.)
    """
    most = 0
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), most
        most = max(most, _bytes(pid, "VmHWM"), sum(_bytes(one, "VmRSS") for one in _family(pid)))
        time.sleep(LOOK_S)


def _family(pid: int) -> list[int]:
    """`pid` and its descendants; on Linux, elsewhere none."""
    found, new = [pid], [pid]
    while new:
        tasks = [task for parent in new for task in Path("/proc").glob(f"{parent}/task/*/children")]
        new = [int(child) for task in tasks for child in _read(task).split()]
        found += new
    return found


def _bytes(pid: int, field: str) -> int:
    """A field of the process's status, which has kB."""
    lines = [line.split() for line in _read(Path(f"/proc/{pid}/status")).splitlines() if line.startswith(field)]
    return int(lines[0][1]) * 1024 if lines else 0


def _read(file: Path) -> str:
    """A file of a process, empty when it has ended."""
    try:
        return file.read_text()
    except OSError:
        return ""
