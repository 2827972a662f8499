"""Tokenizer files that workers published, in a folder where they can be opened."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from loramill.schemas.failures import ExitCode, Failure
from loramill.store.errors import StoreError

Blob = Callable[[str], bytes]
"""The bytes of a hash. Raises StoreError."""


def default_folder() -> Path:
    """Of this user, for every store: what is in it goes by its hash."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "loramill" / "tokenizers"


def tokenizer_folder(files: Mapping[str, str], blob: Blob, cache: Path | None = None) -> Path:
    """A folder with exactly these files, name -> SHA-256 of its content, which is looked at every time.

    Any number of processes may do this at once. Raises StoreError for a blob that is not what its hash says, Failure
    (MACHINE) for a cache that cannot be written.
    """
    for name in files:
        if name in ("", ".", "..") or Path(name).name != name:
            raise StoreError(f"a manifest names a tokenizer file {name!r}, which is no file's name")
    cache = cache or default_folder()
    folder = cache / hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:32]
    try:
        if not _holds(folder, files):
            cache.mkdir(parents=True, exist_ok=True)
            _make(folder, files, blob)
    except OSError as error:
        raise Failure(
            ExitCode.MACHINE, f"{folder}: cannot be written: {error.strerror or error}; XDG_CACHE_HOME moves it"
        ) from error
    return folder


def _make(folder: Path, files: Mapping[str, str], blob: Blob) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-", ignore_cleanup_errors=True) as new:
        made = Path(new, "made")
        made.mkdir()
        for name, digest in files.items():
            content = blob(digest)
            if hashlib.sha256(content).hexdigest() != digest:
                raise StoreError(f"the stored tokenizer file {name} is not what its hash {digest} says")
            (made / name).write_bytes(content)
        # Twice: what is in the way may be damaged, and whoever else makes the same may be first again.
        for attempt in range(3):
            try:
                made.rename(folder)
                return
            except OSError:
                if _holds(folder, files):
                    return
                if attempt == 2:
                    raise
                _put_aside(folder, Path(new, f"old-{attempt}"))


def _put_aside(folder: Path, where: Path) -> None:
    try:
        folder.rename(where)
    except FileNotFoundError:
        return  # another process did
    shutil.rmtree(where, ignore_errors=True)


def _holds(folder: Path, files: Mapping[str, str]) -> bool:
    try:
        found = {entry.name: hashlib.sha256(entry.read_bytes()).hexdigest() for entry in folder.iterdir()}
    except OSError:
        return False
    return found == dict(files)
