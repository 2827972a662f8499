"""Part files on any file system that fsspec knows: `file://`, `s3://`, `memory://`, ..."""

from __future__ import annotations


class Files:
    """A folder of files that are written once, whole or not at all, and never change.

    What lies there and is not spoken of by the store is nothing: what a dead worker left, or one that lost its lease.
    """

    def __init__(self, url: str) -> None:
        """`url`: of the folder, as fsspec takes it; a bare path is local. Raises StoreRefused."""
        self.url = url

    def put(self, name: str, data: bytes) -> None:
        """Writes `url/name`; durable on return. The same name again replaces it. Raises StoreFull, StoreError."""
        raise NotImplementedError

    def get(self, name: str) -> bytes:
        """Raises StoreError if it is not there."""
        raise NotImplementedError

    def remove(self, folder: str) -> None:
        """Removes `url/folder` with everything in it; nothing if it is not there."""
        raise NotImplementedError
