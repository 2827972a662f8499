"""A TCP proxy that can be a bad network: it withholds, swallows, delays and resets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

_LINGER_0 = struct.pack("ii", 1, 0)
"""SO_LINGER that makes a close a reset."""


class _Link:
    """One connection: the client's side and the server's."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.sides = [client]
        self.is_lost = False
        """Nothing passes any more, in either direction, and nobody is told."""

    def reset(self) -> None:
        for side in self.sides:
            raw = side.get_extra_info("socket")
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
            side.transport.abort()


class Proxy:
    """Passes connections to `port` of this machine on to another, in a thread of its own."""

    def __init__(self, target: int, host: str = "127.0.0.1") -> None:
        self.delay_s = 0.0
        """What each piece of data takes longer, either way."""
        self._target = (host, target)
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._passable = asyncio.Event()
        self._passable.set()
        self._listening = socket.create_server((host, 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        server = asyncio.start_server(self._serve, sock=self._listening)
        self._server = asyncio.run_coroutine_threadsafe(server, self._loop).result()

    def partition(self, *, lose: bool = False) -> None:
        """Nothing passes until `heal`: connections stay open, new ones are taken and hear nothing. What was sent
        arrives late, as TCP sends again; with `lose` the connections of now stay mute for ever, as when a router
        forgot them."""

        def cut() -> None:
            self._passable.clear()
            for link in self._links if lose else ():
                link.is_lost = True

        self._call(cut)

    def heal(self) -> None:
        """Ends a partition."""
        self._call(self._passable.set)

    def reset(self) -> None:
        """Both sides of every connection get a reset."""
        self._call(lambda: [link.reset() for link in self._links])

    def close(self) -> None:
        """Ends it with all connections."""

        async def end() -> None:
            self._server.close()
            for link in self._links:
                link.reset()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, do: Callable[[], object]) -> None:
        """Runs it in the proxy's thread, and waits."""

        async def done() -> None:
            do()

        asyncio.run_coroutine_threadsafe(done(), self._loop).result(5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        link = _Link(writer)
        self._links.add(link)
        try:
            await self._passable.wait()
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            link.sides.append(far_writer)
            await asyncio.gather(self._pump(reader, far_writer, link), self._pump(far_reader, writer, link))
        except (OSError, asyncio.CancelledError):
            link.reset()
        finally:
            self._links.discard(link)
            self._tasks.discard(task)
            for side in link.sides:
                side.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        while data := await reader.read(65536):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._passable.wait()
            if not link.is_lost:
                writer.write(data)
                await writer.drain()
        # The end of a connection is a message too: it does not pass a partition either.
        await self._passable.wait()
        if not link.is_lost and writer.can_write_eof():
            writer.write_eof()
