"""Part files on any file system that fsspec knows: `file://`, `s3://`, `memory://`, ..."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loramill.store.errors import StoreError, StoreFull, StoreRefused
from loramill.store.files import fsync_folder

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Files:
    """A folder of files that are written once, whole or not at all, and never change.

    What lies there and is not spoken of by the store is nothing: what a dead worker left, or one that lost its lease.
    """

    def __init__(self, url: str) -> None:
        """`url`: of the folder, as fsspec takes it; a bare path is local. How a service is reached and who one is there
        are for its package's own environment. Raises StoreRefused."""
        import fsspec  # type: ignore[import-untyped]

        self.url = url.rstrip("/") if url.strip("/") else url
        try:
            self._system, root = fsspec.core.url_to_fs(url)
        except Exception as error:  # whatever a file system's package raises for what it was given
            raise StoreRefused(f"cannot use the folder {url}: {error}") from error
        self._root = root.rstrip("/")
        self._local = isinstance(self._system, fsspec.get_filesystem_class("file"))
        try:
            # Refused now, and not after the first rows were computed.
            probe = f".probe-{uuid.uuid4().hex}"
            self.put(probe, b"\n")
            self._system.rm_file(self._path(probe))
        except StoreFull:
            raise
        except Exception as error:
            reason = _reason(error.__cause__ if isinstance(error, StoreError) else error)
            raise StoreRefused(f"cannot use the folder {url} for part files: {reason}") from error

    def put(self, name: str, data: bytes) -> None:
        """Writes `url/name`; durable on return. The same name again replaces it. Raises StoreFull, StoreError."""
        path = self._path(name)
        with self._failures("write", name):
            if self._local:
                _put_local(Path(path), data)
            else:
                self._put_whole(path, data)

    def get(self, name: str) -> bytes:
        """Raises StoreError if it is not there."""
        with self._failures("read", name):
            return bytes(self._system.cat_file(self._path(name)))

    def remove(self, folder: str) -> None:
        """Removes `url/folder` with everything in it; nothing if it is not there."""
        with self._failures("remove", folder):
            path = self._path(folder)
            self._system.invalidate_cache()  # others have written there
            try:
                self._system.rm(path, recursive=True)
            except FileNotFoundError:
                return

    def _put_whole(self, path: str, data: bytes) -> None:
        """An object appears whole or not at all. Where there are folders, they are made when they are missed."""
        try:
            self._system.pipe_file(path, data)
        except FileNotFoundError:
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._system.pipe_file(path, data)

    def _path(self, name: str) -> str:
        parts = name.split("/")
        if "" in parts or "." in parts or ".." in parts or "\\" in name or "\0" in name:
            raise StoreError(f"{name!r} is no name in the folder {self.url}")
        return f"{self._root}/{name}"

    @contextmanager
    def _failures(self, doing: str, name: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # a service's package has errors of its own, which no list could hold
            full = isinstance(error, OSError) and error.errno in NO_ROOM
            kind = StoreFull if full else StoreError
            raise kind(f"cannot {doing} {self.url}/{name}: {_reason(error)}") from error


def _put_local(path: Path, data: bytes) -> None:
    """Temporary file, fsync, rename, fsync of the folder: killed at any point, `path` is whole or not there."""
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _make_folder(folder: Path) -> None:
    """Durable with its file: a folder's name lies in the one above it, up to what was there."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def _reason(error: Any) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0]
