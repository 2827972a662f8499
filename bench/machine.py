"""What the numbers were measured on: hardware and versions, without the machine's name or paths."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("loramill", "torch", "triton", "transformers", "peft")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Threads that every runner gets: one per core, unless OMP_NUM_THREADS says otherwise."""
    return int(os.environ.get("OMP_NUM_THREADS") or cores())


@contextmanager
def watch_others() -> Iterator[list[float]]:
    """Appends to the list that it yields how many cores were kept busy by others (processes not started inside).

    Two threads on cores that a third process shares wait for each other at every operation: on two cores one busy
    neighbour was seen to turn 0.9 s into 16.7 s. A result without this figure cannot be believed. Linux only.
    """
    found: list[float] = []
    busy, own, wall = _busy_s(), _children_s(), time.perf_counter()
    yield found
    if busy is not None:
        others = _busy_s() - busy - (_children_s() - own)
        found.append(max(0.0, others / (time.perf_counter() - wall)))


def adopt() -> None:
    """From now on be the parent of descendants whose own parent has ended, so that `reap` finds them. Linux only."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap(within_s: float = 10.0) -> None:
    """Wait for whatever this process has as children, so that their seconds count as its own, not as others'.

    vLLM's worker outlives what started it: its 27 s of a run of 47 were taken for another's.
    """
    until = time.monotonic() + within_s
    with suppress(ChildProcessError):
        while time.monotonic() < until:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.02)


_PR_SET_CHILD_SUBREAPER = 36


def hardware() -> dict[str, Any]:
    info = _colon_file("/proc/cpuinfo")
    flags = info.get("flags", "").split()
    memory_kib = int(_colon_file("/proc/meminfo").get("MemTotal", "0 kB").split()[0])
    return {
        "cpu": info.get("model name", platform.processor() or "unknown"),
        "cores": cores(),
        "threads": threads(),
        "bf16": sorted(flag for flag in flags if flag in ("avx512_bf16", "amx_bf16", "bf16")),
        "memory_gib": round(memory_kib / 2**20, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Of Python and `PACKAGES`; None where one is not installed."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _busy_s() -> float | None:
    """Core seconds since boot that were not idle or waiting for a disk; None where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, *rest = map(int, stat.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    """Core seconds of ended child processes and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _colon_file(path: str) -> dict[str, str]:
    """First value of each `key: value` line; empty where there is no such file (not Linux)."""
    file = Path(path)
    found: dict[str, str] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found
