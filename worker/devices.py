"""Which devices this worker computes on: each is taken by one worker of a machine, and known without torch."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loramill.schemas.failures import ExitCode, Failure

_UUID = re.compile(r"^(?P<part>[ \t]*)(?:GPU|MIG) .*UUID: (?P<uuid>[\w-]+)\)", re.MULTILINE)
_NUMBERED = re.compile(r"cuda:(\d+)")


@dataclass(slots=True, frozen=True)
class Device:
    """Where an engine computes. It is taken until this process ends."""

    name: str
    option: str
    """What the engine is told: `cpu`, `cuda`, or `auto`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """In which it sees this device alone."""


def take_devices(wanted: str) -> list[Device]:
    """The devices of `--device`: `auto` (a GPU where there is one), `cpu`, `cuda` (one that is free), `cuda:N`, `all`.

    Raises Failure: USAGE for what is no device, MACHINE if there is none, or another worker has it.
    """
    numbered = _NUMBERED.fullmatch(wanted)
    if wanted not in ("auto", "cpu", "cuda", "all") and not numbered:
        raise Failure(ExitCode.USAGE, f"--device {wanted}: it is auto, cpu, cuda, cuda:N (N from 0) or all")
    if wanted == "cpu":
        return [Device("cpu", "cpu")]
    gpus = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), listed())
    if not gpus:
        if wanted == "auto":
            return [Device("auto", "auto")]  # what is not Nvidia's, torch finds by itself
        raise Failure(ExitCode.MACHINE, f"--device {wanted}: there is no GPU here")
    if numbered and int(numbered[1]) >= len(gpus):
        raise Failure(ExitCode.MACHINE, f"--device {wanted}: there are {len(gpus)} GPUs here, cuda:0 is the first")
    taken: list[Device] = []
    for number in [int(numbered[1])] if numbered else range(len(gpus)):
        if _lock(gpus[number]):
            taken.append(Device(f"cuda:{number}", "cuda", {"CUDA_VISIBLE_DEVICES": gpus[number]}))
            if wanted != "all":
                break
    if not taken:
        which = wanted if numbered else f"{len(gpus)} of {len(gpus)} GPUs"
        raise Failure(ExitCode.MACHINE, f"--device {wanted}: other workers of this machine have {which}")
    return taken


def count_devices(wanted: str) -> int:
    """How many engines `--device` comes to, if nobody else has one of them."""
    return max(1, len(visible(os.environ.get("CUDA_VISIBLE_DEVICES"), listed()))) if wanted == "all" else 1


def visible(asked: str | None, gpus: Sequence[str]) -> Sequence[str]:
    """The devices that CUDA_VISIBLE_DEVICES leaves, by their unique ids where they are known."""
    if asked is None:
        return gpus
    left = []
    for name in asked.split(","):
        name = name.strip()
        if name.isdigit() and int(name) < len(gpus):
            name = gpus[int(name)]
        elif not name or name.startswith("-"):
            break  # as CUDA does
        left.append(name)
    return left


def listed() -> list[str]:
    """Unique ids of the GPUs of this machine, or of the parts that one is divided into."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        said = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_listing(said.stdout) if said.returncode == 0 else []


def parse_listing(text: str) -> list[str]:
    """Of what `nvidia-smi -L` prints: a GPU's parts (MIG) stand indented below it, and take its place."""
    found: list[tuple[str, bool]] = []
    for match in _UUID.finditer(text):
        is_part = bool(match["part"])
        if is_part and found and not found[-1][1]:
            found.pop()
        found.append((match["uuid"], is_part))
    return [uuid for uuid, _ in found]


_locks: list[int] = []


def _lock(gpu: str) -> bool:
    # The system lets go of it when this process ends, however it does.
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path(tempfile.gettempdir())
    path = folder / f"loramill-{os.getuid()}-{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Failure(
            ExitCode.MACHINE, f"{path}, which says who has a GPU, cannot be opened: {error.strerror}"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return False
    _locks.append(handle)
    return True
