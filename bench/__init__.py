"""One harness for speed: the same job through loramill and its peers, side by side on one machine."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""


def hide_root() -> None:
    """Take the repository off the import path, where `-m` put it: `kernels` there would pass for the published one."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
