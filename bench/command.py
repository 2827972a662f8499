"""`loramill run` as a measured process: its summary, and the most memory that it held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMAND = Path(sys.executable).with_name("loramill")

_MEASURED = """
import os, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE)
sys.stdout.buffer.write(done.stdout)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.returncode)
"""


class CommandError(Exception):
    """The command failed; the message is what it said."""


def run(arguments: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`loramill run` with `arguments` into a temporary file: its summary with `max_rss_bytes`, and its output lines.

    Raises:
        CommandError: it did not end with 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"
        command = [COMMAND, "run", *arguments, "-o", output, "--json", "--quiet"]
        # A process in between, so that the memory is that of this one command.
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            raise CommandError(f"loramill {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        summary, memory = done.stdout.splitlines()
        lines = [json.loads(line) for line in output.read_text().splitlines()]
    return json.loads(summary) | {"max_rss_bytes": int(memory)}, lines
