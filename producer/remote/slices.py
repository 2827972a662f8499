"""Parts of a local file on their way to a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO


class Slice:
    """Bytes `start` to `stop` of an open file, read by position: any number of slices of one file at once."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self._fd, self._start, self._size, self._at = file.fileno(), start, stop - start, 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size`."""
        left = self._size - self._at
        part = os.pread(self._fd, left if size < 0 else min(size, left), self._start + self._at)
        self._at += len(part)
        return part

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Within the slice."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """Within the slice."""
        return self._at


@dataclass(slots=True, frozen=True)
class Form:
    """A multipart body with one file in it."""

    name: str
    """Of the file's field."""
    filename: str
    content: Slice
    fields: Mapping[str, str] = field(default_factory=dict)
