"""The files that a command is to make: what they are called, and whether they can be written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from loramill.schemas.failures import ExitCode, Failure


def errors_beside(output: Path) -> Path:
    """Where failed rows go: `out.jsonl.gz` has `out.errors.jsonl.gz` beside it."""
    stem, dot, suffixes = output.name.partition(".jsonl")
    if not dot:
        stem, suffixes = output.stem, output.suffix
    return output.with_name(f"{stem}.errors{dot}{suffixes}")


def refuse_clashes(files: Mapping[str, Path]) -> None:
    """Raises Failure (USAGE) if two of them, by what they are for, are the same file."""
    seen: dict[Path, str] = {}
    for flag, path in files.items():
        real = path.resolve()
        # The same file under another name: a hard link, or a file system that ignores case.
        other = seen.get(real) or next((seen[old] for old in seen if _is_same(old, real)), None)
        if other:
            raise Failure(ExitCode.USAGE, f"{other} and {flag} are the same file: {path}")
        seen[real] = flag


def check_target(flag: str, path: Path) -> None:
    """Raises Failure: USAGE for what is no file, MACHINE for a folder that cannot be written."""
    if path.exists() and not path.is_file():
        raise Failure(ExitCode.USAGE, f"{flag} {path}: not a regular file")
    if not path.parent.is_dir():
        raise Failure(ExitCode.MACHINE, f"{flag} {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise Failure(ExitCode.MACHINE, f"{flag} {path}: the folder {path.parent} cannot be written")


def refuse_existing(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Raises Failure (USAGE) if one is there already and may not be replaced."""
    for path in paths:
        if path.exists() and not overwrite:
            raise Failure(ExitCode.USAGE, f"{path} exists: pass --overwrite to replace it")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
