"""What the parts of `make gpu` share: the refusal without a device, and a results file by device and part."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import ROOT, machine

NEEDS = ("torch", "triton", "transformers", "safetensors", "peft", "numpy", "pytest")
"""All that `make gpu` needs, and nothing else may be imported by what it runs."""


def no_device(part: str) -> bool:
    """Whether this Python lacks what the parts need, or a CUDA device; says so in one line."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu: {part} needs {', '.join(missing)}, which {sys.executable} has not: set PYTHON", file=sys.stderr)
        return True
    import torch

    if not torch.cuda.is_available():
        print(f"gpu: {part} wants a CUDA device, and torch sees none here", file=sys.stderr)
    return not torch.cuda.is_available()


def slug(device: str) -> str:
    """A device's name as it begins a file's: `NVIDIA H200` gives nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def describe_part(part: str, command: Sequence[str]) -> dict[str, Any]:
    """What every results file of a part begins with."""
    import torch

    return {
        "part": part,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": " ".join(map(str, command)),
        "versions": machine.versions() | {"cuda": torch.version.cuda},
    }


def save_part(result: dict[str, Any], *, whole: bool = True) -> Path:
    """Write it as <device>-<part>.json into $OUT, or into bench/results; what is not whole never goes there."""
    kept = ROOT / "bench" / "results" if whole else ROOT / ".cache" / "bench"
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else kept
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(result['device'])}-{result['part']}.json"
    making = path.with_suffix(".making")
    making.write_text(json.dumps(result, indent=1) + "\n")
    making.replace(path)
    return path
