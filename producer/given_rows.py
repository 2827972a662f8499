"""What a program hands over as a job's rows, as an input like a file's."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from io import BufferedRandom
from os import PathLike
from tempfile import TemporaryFile, gettempdir
from typing import BinaryIO, TypeVar, cast

from loramill.producer.generated import Row, line_of
from loramill.producer.reader import Input, InputError, open_input

Given = str | PathLike[str] | Iterable[Row] | AsyncIterable[Row]

_WRITE_BYTES = 2**18

T = TypeVar("T")


class Stopped(Exception):
    """Nobody waits for it any more."""


class Stop:
    """Asked for by one thread, noticed by another: calling it raises Stopped once `set` was called."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Asks for it."""
        self._event.set()

    def __call__(self) -> None:
        if self._event.is_set():
            raise Stopped


async def stoppable(work: Callable[[], T], stop: Stop, undo: Callable[[T], object] = lambda done: None) -> T:
    """What `work` returns, from a thread. Cancelled, the thread is stopped and waited for; what it had done by then is
    undone."""
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        stop.set()
        (done,) = await asyncio.gather(thread, return_exceptions=True)
        if not isinstance(done, BaseException):
            await asyncio.to_thread(undo, done)
        raise


@asynccontextmanager
async def given_input(given: Given, stop: Stop) -> AsyncIterator[Input]:
    """The lines of a file, or of rows, which are spooled to disk as they come. Raises ValueError."""
    if isinstance(given, str | PathLike):
        path = str(given)
        try:
            source = await asyncio.to_thread(open_input, path, gettempdir())
        except InputError as error:
            raise ValueError(str(error)) from error
        with source:
            yield source
        return
    async with spooled(given, stop) as file:
        with Input("rows", cast(BufferedRandom, file)) as source:
            yield source


@asynccontextmanager
async def spooled(rows: Iterable[Row] | AsyncIterable[Row], stop: Stop) -> AsyncIterator[BinaryIO]:
    """Rows as the lines of a temporary file, written as they come. Raises ValueError."""
    with TemporaryFile() as file:
        lines = _Lines(cast(BinaryIO, file))
        if isinstance(rows, AsyncIterable):
            async for row in rows:
                if lines.add(row):
                    await asyncio.to_thread(lines.write)
        else:
            given = rows  # for the type checker, which does not know it inside a function
            await stoppable(lambda: _take(given, lines, stop), stop)
        await asyncio.to_thread(lines.write)
        yield cast(BinaryIO, file)


@contextmanager
def spooled_here(rows: Iterable[Row]) -> Iterator[BinaryIO]:
    """The same without an event loop."""
    with TemporaryFile() as file:
        lines = _Lines(cast(BinaryIO, file))
        _take(rows, lines, lambda: None)
        lines.write()
        yield cast(BinaryIO, file)


def _take(rows: Iterable[Row], lines: _Lines, stop: Callable[[], None]) -> None:
    for row in rows:
        stop()
        if lines.add(row):
            lines.write()


class _Lines:
    """Rows as lines, written some at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._count = self._size = 0
        self._waiting: list[bytes] = []

    def add(self, row: Row) -> bool:
        """Whether it is time to write. Raises ValueError for what is no JSON."""
        try:
            line = json.dumps(line_of(row, self._count)).encode()
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"row {self._count}: it is no JSON object: {error}") from error
        self._count += 1
        self._size += len(line)
        self._waiting += (line, b"\n")
        return self._size >= _WRITE_BYTES

    def write(self) -> None:
        """All that is waiting, to where others can read it."""
        self._file.write(b"".join(self._waiting))
        self._file.flush()
        self._waiting, self._size = [], 0
