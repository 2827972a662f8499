"""What a client sends, up to a limit: of size, of depth, of time. Bodies with files have limits of their own."""

from __future__ import annotations

import asyncio
import re

import numpy as np
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from loramill.producer.api.context import Limits
from loramill.producer.api.errors import ApiError, invalid

BODY_S = 60.0
"""For the whole of a body."""
MAX_DEPTH = 64
DRAIN_BYTES, DRAIN_S = 2**24, 3.0
"""How much more is read of what was refused, so that who sends it reads the answer and not a reset connection."""
_END: Message = {"type": "http.response.body", "body": b"", "more_body": False}
_FILES = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class Body:
    """The body of one request. It is read before the application is asked, unless it has a file."""

    def __init__(
        self, scope: Scope, headers: Headers, receive: Receive, limits: Limits, closing: asyncio.Event
    ) -> None:
        self._receive, self._closing, self._most = receive, closing, limits.body_bytes
        self._has_file = scope["method"] == "POST" and _FILES.fullmatch(scope["path"]) is not None
        self._said_bytes = int(headers.get("content-length", 0))
        self._ended = "content-length" not in headers and "transfer-encoding" not in headers
        self._seen = 0
        self._read: bytes | None = None
        self._may_be_watched = scope["method"] == "GET"
        self._watched = self._refused = self._answered = False

    async def check(self) -> None:
        """Raises ApiError: it is too large, too slow, or nested too deeply."""
        if self._has_file or self._ended:
            return
        if self._said_bytes > self._most:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_S):
                self._read = await self._whole()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_S:g} s", code="request_timeout") from None
        if nested_over(self._read, MAX_DEPTH):
            raise invalid(f"the body is nested over {MAX_DEPTH} deep", code="too_deep")

    async def receive(self) -> Message:
        """ASGI's."""
        if self._read is not None:
            read, self._read = self._read, None
            return {"type": "http.request", "body": read, "more_body": False}
        return await (self._until_gone() if self._ended else self._next())

    async def send(self, message: Message, send: Send) -> None:
        """ASGI's. After an error to a body that is still coming the connection is closed."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self._watched = self._may_be_watched and headers.get("content-type", "").startswith("text/event-stream")
            self._refused = message["status"] >= 400 and not self._ended
            if self._refused:
                headers["connection"] = "close"
        elif self._refused and not message.get("more_body", False):
            await send({**message, "more_body": True})
            try:
                async with asyncio.timeout(DRAIN_S):
                    await self._drain()
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                if not self._closing.is_set():  # or else the server ends, and waits for nobody
                    raise
            message = _END
        self._answered = message["type"] == "http.response.body" and not message.get("more_body", False)
        await send(message)

    async def let_go(self, send: Send) -> None:
        """Ends the answer of whoever watched to the end of the server."""
        if self._watched and not self._answered and self._closing.is_set():
            await send(_END)

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        return message

    async def _whole(self) -> bytes:
        read = bytearray()
        while not self._ended:
            message = await self._next()
            if message["type"] == "http.disconnect":
                raise invalid("the client went away", code="client_disconnected")
            read += message.get("body", b"")
            if self._seen > self._most:
                raise self._too_large()
        return bytes(read)

    async def _until_gone(self) -> Message:
        """Until the client goes; who only watches is let go when the server ends."""
        gone = asyncio.ensure_future(self._receive())
        ends = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait((gone, ends), return_when=asyncio.FIRST_COMPLETED)
            if not gone.done() and self._watched:
                return {"type": "http.disconnect"}
            return await gone
        finally:
            gone.cancel()
            ends.cancel()

    async def _drain(self) -> None:
        until = self._seen + DRAIN_BYTES
        while not self._ended and self._seen < until:
            await self._next()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a body that has no file is at most {self._most} bytes", code="too_large")


def nested_over(body: bytes, most: int) -> bool:
    """Whether JSON has more than so many brackets open at once, as far as can be said without parsing it."""
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    told = np.frombuffer(_STRING.sub(b"", body), dtype=np.uint8)
    opens, closes = (told == 0x5B) | (told == 0x7B), (told == 0x5D) | (told == 0x7D)
    return bool(np.cumsum(opens.astype(np.int32) - closes.astype(np.int32)).max(initial=0) > most)
