"""Rows' lines in a temporary file, with what finds them again in columns: any order in, row order out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from loramill.store.errors import StoreError

READ_BYTES = 2**20
_ROWS = 2**14


class Spool:
    """Lines of rows 0 to total - 1, each with its newline; 13 bytes of memory a row."""

    def __init__(self, total: int, file: BinaryIO) -> None:
        """`file` is empty, readable and writable, and closed by whoever opened it."""
        self._file = file
        self._end = 0
        self._offset = np.zeros(total, np.int64)
        self._length = np.zeros(total, np.uint32)
        self.failed = np.zeros(total, np.bool_)
        """(total,) whether the row's line is one for the error file."""

    @property
    def has(self) -> NDArray[np.bool_]:
        """(total,) whether the row has a line."""
        return self._length > 0

    @property
    def answered(self) -> NDArray[np.bool_]:
        """(total,) whether it has one that is no error."""
        return self.has & ~self.failed

    def is_answered(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The same of these rows."""
        return (self._length[rows] > 0) & ~self.failed[rows]

    def add(
        self, rows: NDArray[np.int64], lengths: NDArray[np.uint32], failed: NDArray[np.bool_], lines: bytes
    ) -> None:
        """Lines of these rows, one after another in `lines`; what a row had before is forgotten. Raises OSError."""
        self._file.write(lines)
        # Whoever follows the file sees whole lines, and reading by the descriptor below sees all of them.
        self._file.flush()
        ends = self._end + np.cumsum(lengths, dtype=np.int64)
        self._offset[rows] = ends - lengths
        self._length[rows] = lengths
        self.failed[rows] = failed
        self._end += len(lines)

    def lines(self, rows: NDArray[np.int64]) -> Iterator[bytes]:
        """The lines of these rows in their order, a few at a time where they lie side by side. Raises StoreError."""
        for at in range(0, len(rows), _ROWS):
            some = rows[at : at + _ROWS]
            starts = self._offset[some]
            ends = starts + self._length[some]
            apart = np.flatnonzero(starts[1:] != ends[:-1]) + 1
            first, last = np.append(0, apart), np.append(apart, len(some)) - 1
            for start, end in zip(starts[first].tolist(), ends[last].tolist(), strict=True):
                yield from self._read(start, end)

    def _read(self, start: int, end: int) -> Iterator[bytes]:
        while start < end:
            part = os.pread(self._file.fileno(), min(end - start, READ_BYTES), start)
            if not part:
                raise StoreError("the temporary file was cut short by somebody else")
            yield part
            start += len(part)


class InOrder:
    """Lines that come in any order, given in the order of their rows."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self._next = 0

    def ready(self) -> Iterator[tuple[int, bytes]]:
        """Rows, with their lines, before which none lacks that was not given yet."""
        has = self.spool.has
        while self._next < len(has) and has[self._next]:
            self._next += 1
            yield self._line(self._next - 1)

    def rest(self) -> Iterator[tuple[int, bytes]]:
        """Those that are left once no more will come."""
        for row in np.flatnonzero(self.spool.has[self._next :]).tolist():
            yield self._line(self._next + row)

    def _line(self, row: int) -> tuple[int, bytes]:
        return row, b"".join(self.spool.lines(np.array([row])))


def joined(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in parts of about READ_BYTES: lines are small, and whoever takes them wants more at a time."""
    waiting, size = list[bytes](), 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= READ_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


def write_all(parts: Iterator[bytes], write: Callable[[bytes], object]) -> None:
    """Writes them so."""
    for part in joined(parts):
        write(part)
