"""Result files that appear whole or not at all, compressed as their name says."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from loramill.store.errors import StoreError


@contextmanager
def atomic_writer(path: Path, *, compressed: bool = True) -> Iterator[Callable[[bytes], object]]:
    """Yields a `write(bytes)` whose bytes are at `path` once the block ends, and nowhere if it raises.

    With `compressed`, `.gz` and `.zst` names are. The bytes gather in `NAME.part` in the same folder: one writer at a
    time, and what a killed one left is overwritten by the next. Raises StoreError (disk full, folder that cannot be
    written).
    """
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as raw:
            with _compressor(path.suffix if compressed else "", raw) as write:
                yield write
            raw.flush()
            os.fsync(raw.fileno())
        part.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        _discard(part)
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        _discard(part)
        raise


def remove_file(path: Path) -> None:
    """Removes `path` if it is there; durable on return. Raises StoreError."""
    try:
        path.unlink(missing_ok=True)
        fsync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"cannot remove {path}: {error.strerror or error}") from error


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable: a new file's bytes can outlive its name otherwise."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _compressor(suffix: str, raw: BinaryIO) -> Iterator[Callable[[bytes], object]]:
    if suffix == ".gz":
        # No name and no time inside: the same rows make the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as out:
            yield out.write
    elif suffix == ".zst":
        with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as out:
            yield out.write
    else:
        yield raw.write


def _discard(part: Path) -> None:
    # The first error is the one to report, whatever happens to the left-over.
    try:
        part.unlink(missing_ok=True)
    except OSError:
        return
