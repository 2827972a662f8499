"""The results file of a program beside `python -m bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine


def keep(out: Path, part: str, program: str, arguments: Sequence[str], found: Mapping[str, Any]) -> None:
    """Write what `python -m <program> <arguments>` found to `out`, after when, how and on what it was found."""
    result = {
        "part": part,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": " ".join([f"python -m {program}", *arguments]),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        **found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
