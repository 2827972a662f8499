"""Where a peer lives that has an environment of its own: as a variable says, or where `make bench-peers` made it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from bench import ROOT


def environment_python(name: str) -> Path:
    """Of the peer `name`: BENCH_<NAME>_PYTHON, or else that of .venv-<name>."""
    named = os.environ.get(variable(name))
    return Path(named) if named else ROOT / f".venv-{name}" / "bin" / "python"


def variable(name: str) -> str:
    return f"BENCH_{name.upper()}_PYTHON"


def absent(name: str, package: str) -> str | None:
    """Why the peer `name`, which needs `package`, cannot run; None if it can."""
    python = environment_python(name)
    if not python.exists():
        return f"not installed: `make bench-peers` makes .venv-{name}, or {variable(name)} names an interpreter"
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode:
        return f"{package} is not installed for the interpreter of {variable(name)} or .venv-{name}"
    return None
