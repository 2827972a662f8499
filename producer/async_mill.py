"""The Python API for asyncio: a Mill in a thread of its own."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from os import PathLike
from typing import Any, Self

from loramill.producer.generated import Generated, Row, generated, rows_of
from loramill.producer.mill import Batch, Given, Mill


class AsyncMill:
    """A Mill in a thread of its own: `async with AsyncMill(base, adapters=...) as mill`.

    Any number of calls at once share its batches.
    """

    def __init__(
        self,
        base_model: str | PathLike[str],
        adapters: Mapping[str, Given] | None = None,
        **options: Any,
    ) -> None:
        self._make: Callable[[], Mill] = lambda: Mill(base_model, adapters, **options)
        self._todo: queue.SimpleQueue[Callable[[Mill], None] | None] = queue.SimpleQueue()
        self._listeners: set[Callable[[Any], None]] = set()
        self._ended: BaseException | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        loaded: asyncio.Queue[BaseException | None] = asyncio.Queue()
        self._thread = threading.Thread(
            target=self._serve, args=(lambda error: loop.call_soon_threadsafe(loaded.put_nowait, error),), daemon=True
        )
        self._thread.start()
        if error := await loaded.get():
            raise error
        return self

    async def __aexit__(self, *_: object) -> None:
        self._todo.put(None)
        await asyncio.to_thread(self._thread.join)

    def generate(self, prompts: Any, *, adapter: str | None = None, **sampling: Any) -> AsyncIterator[Generated]:
        """As Mill.generate; the rows run whether or not the results are taken."""
        return self.run(rows_of(prompts, adapter, sampling))

    async def run(self, rows: Iterable[Row]) -> AsyncIterator[Generated]:
        """As Mill.run."""
        batch: Batch | None = None
        async with self._mailbox() as (mail, post):
            try:
                self._todo.put(lambda mill: _reply(post, lambda: _started(mill, rows, post)))
                batch = _raised(await mail.get())
                ready: dict[int, bytes] = {}
                for number in range(batch.count if batch else 0):
                    while number not in ready:
                        ready.update((row.row, row.line) for row in _raised(await mail.get()))
                    yield generated(number, ready.pop(number))
            finally:
                if batch is not None:
                    dropped = batch
                    self._todo.put(lambda mill: mill.drop(dropped))

    @property
    def adapters(self) -> dict[str, str]:
        """As Mill.adapters."""
        return self._mill.adapters

    async def add_adapter(self, name: str, path: str | PathLike[str], scale: float = 1.0) -> None:
        """As Mill.add_adapter."""
        await self._do(lambda mill: mill.add_adapter(name, path, scale))

    async def replace_adapter(self, name: str, path: str | PathLike[str], scale: float = 1.0) -> None:
        """As Mill.replace_adapter."""
        await self._do(lambda mill: mill.replace_adapter(name, path, scale))

    async def remove_adapter(self, name: str, *, wait: bool = False) -> None:
        """As Mill.remove_adapter."""
        await self._do(lambda mill: mill.remove_adapter(name, wait=wait))

    async def _do(self, change: Callable[[Mill], None]) -> None:
        """Carries out `change` between two passes."""
        async with self._mailbox() as (mail, post):
            self._todo.put(lambda mill: _reply(post, lambda: change(mill)))
            _raised(await mail.get())

    @asynccontextmanager
    async def _mailbox(self) -> AsyncIterator[tuple[asyncio.Queue[Any], Callable[[Any], None]]]:
        """What the thread posts, for whoever waits here; its end is heard of too. Raises if it has ended."""
        loop = asyncio.get_running_loop()
        mail: asyncio.Queue[Any] = asyncio.Queue()

        def post(item: Any) -> None:
            loop.call_soon_threadsafe(mail.put_nowait, item)

        self._listeners.add(post)  # before the look at _ended: whatever ends the thread now is heard of
        try:
            if self._ended:
                raise self._ended
            yield mail, post
        finally:
            self._listeners.discard(post)

    def _serve(self, loaded: Callable[[BaseException | None], Any]) -> None:
        try:
            mill = self._mill = self._make()
        except BaseException as error:
            loaded(error)
            return
        loaded(None)
        with mill:
            self._work(mill)

    def _work(self, mill: Mill) -> None:
        while True:
            try:
                todo = self._todo.get(block=not mill.has_work)
                if todo is None:
                    return
                todo(mill)
            except queue.Empty:
                pass
            try:
                mill.step()
            except BaseException as error:
                self._ended = error
                for post in list(self._listeners):
                    post(error)
                return


def _started(mill: Mill, rows: Iterable[Row], post: Callable[[Any], None]) -> Batch | None:
    batch = mill.open(rows, post)
    if batch:
        mill.submit(batch)
    return batch


def _reply(post: Callable[[Any], None], work: Callable[[], Any]) -> None:
    """Posts what `work` returns, or the error that it ends with."""
    try:
        done = work()
    except Exception as error:
        done = error
    post(done)


def _raised(item: Any) -> Any:
    if isinstance(item, BaseException):
        raise item
    return item
