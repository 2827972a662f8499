"""Which devices this worker computes on: each is taken by one worker of a machine, and known without torch."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
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


def take_devices(wanted: str, flag: str = "--device") -> list[Device]:
    """The devices of `--device`: `auto` (a GPU where there is one), `cpu`, `cuda` (one that is free), `cuda:N`, `all`.

    Raises Failure: USAGE for what is no device, MACHINE if there is none, or another process has it.
    """
    numbered = _NUMBERED.fullmatch(wanted)
    if wanted not in ("auto", "cpu", "cuda", "all") and not numbered:
        raise Failure(ExitCode.USAGE, f"{flag} {wanted}: it is auto, cpu, cuda, cuda:N (N from 0) or all")
    if wanted == "cpu":
        return [Device("cpu", "cpu")]
    gpus = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), listed())
    if not gpus:
        if wanted == "auto":
            return [Device("auto", "auto")]  # what is not Nvidia's, torch finds by itself
        raise Failure(ExitCode.MACHINE, f"{flag} {wanted}: there is no GPU here")
    if numbered and int(numbered[1]) >= len(gpus):
        raise Failure(ExitCode.MACHINE, f"{flag} {wanted}: there are {len(gpus)} GPUs here, cuda:0 is the first")
    taken: list[Device] = []
    for number in [int(numbered[1])] if numbered else range(len(gpus)):
        if _lock(gpus[number]):
            taken.append(Device(f"cuda:{number}", "cuda", {"CUDA_VISIBLE_DEVICES": gpus[number]}))
            if wanted != "all":
                break
    if not taken:
        which = wanted if numbered else f"{len(gpus)} of {len(gpus)} GPUs"
        raise Failure(ExitCode.MACHINE, f"{flag} {wanted}: other workers of this machine have {which}")
    return taken


def names_of(wanted: str, flag: str) -> list[str]:
    """The names in `all`, or in a list of `cuda:N` and `cpu` with commas between. Raises Failure (USAGE)."""
    names = [name.strip() for name in wanted.split(",")]
    if names != ["all"] and not all(name == "cpu" or _NUMBERED.fullmatch(name) for name in names):
        raise Failure(ExitCode.USAGE, f"{flag} {wanted}: it is all, or some of cuda:N (N from 0) and cpu with commas")
    for name in names:
        if name != "cpu" and names.count(name) > 1:
            raise Failure(ExitCode.USAGE, f"{flag} {wanted}: {name} is there twice")
    return names


def take_each(wanted: str, flag: str) -> list[Device]:
    """A device for each of `names_of`, for `all` every GPU that no other process has; those on the CPU have equal
    parts of its cores. Raises Failure like it, and like `take_devices`."""
    names = names_of(wanted, flag)
    devices = [device for name in names if name != "cpu" for device in take_devices(name, flag)]
    count = names.count("cpu")
    ours = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cores = max(1, ours // max(1, count))
    # Where the operator has said how many threads there are to be, he has said it.
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(cores)}
    return devices + [Device(f"cpu:{number}", "cpu", threads) for number in range(count)]


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
