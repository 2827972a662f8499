"""What a client sends, up to a limit: of size, of depth, of time."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

import numpy as np
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from loramill.producer.api.context import Limits
from loramill.producer.api.errors import ApiError, invalid

BODY_S = 60.0
"""For the whole of a body that is no file."""
IDLE_S = 60.0
"""Between two pieces of a file."""
MAX_DEPTH = 64
AROUND_BYTES = 2**18
"""What a form has around its file."""
DRAIN_BYTES, DRAIN_S = 2**24, 3.0
"""How much more is read of what was refused, so that who sends it reads the answer and not a reset connection."""
_PARTS = re.compile(r"/v1/uploads/[^/]+/parts")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class Body:
    """The body of one request. One that is no file is read before the application is asked."""

    def __init__(
        self, scope: Scope, headers: Headers, receive: Receive, limits: Limits, closing: asyncio.Event
    ) -> None:
        self._receive, self._closing = receive, closing
        self._most = _most(scope, limits)
        self._is_file = self._most != limits.body_bytes
        self._ended = "content-length" not in headers and "transfer-encoding" not in headers
        self._said_bytes = headers.get("content-length")
        self._seen = 0
        self._read: bytes | None = None
        self._refused = self._watched = False
        self._may_be_watched = scope["method"] == "GET"

    async def check(self) -> None:
        """Raises ApiError: it is too large, too slow, or nested too deeply."""
        if self._said_bytes is not None and int(self._said_bytes) > self._most:
            raise self._too_large()
        if self._is_file or self._ended:
            return
        try:
            async with asyncio.timeout(BODY_S):
                self._read = await self._whole()
        except TimeoutError:
            raise self._too_slow() from None
        if nested_over(self._read, MAX_DEPTH):
            raise invalid(f"the body is nested over {MAX_DEPTH} deep", code="too_deep")

    async def receive(self) -> Message:
        """ASGI's. Raises ApiError like `check`."""
        if self._read is not None:
            read, self._read = self._read, None
            return {"type": "http.request", "body": read, "more_body": False}
        if self._ended:
            return await self._until_gone()
        try:
            async with asyncio.timeout(IDLE_S):
                return await self._next()
        except TimeoutError:
            raise self._too_slow() from None

    async def send(self, message: Message, send: Send) -> None:
        """ASGI's. The answer to a refused body goes before the rest of the body is looked at."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._watched = self._may_be_watched and kind.startswith(b"text/event-stream")
        elif self._refused and not message.get("more_body", False):
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await self._drain()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(message)

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)
            if self._seen > self._most:
                raise self._too_large()
        return message

    async def _whole(self) -> bytes:
        read = bytearray()
        while not self._ended:
            message = await self._next()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the body ended early", code="invalid_request")
            read += message.get("body", b"")
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
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return
            self._seen += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)

    def _too_large(self) -> ApiError:
        self._refused = True
        what = "a file" if self._is_file else "a body that is no file"
        said = f"{what} may have {self._most:,} bytes here"
        return ApiError(413, said, code="too_large", headers={"connection": "close"})

    def _too_slow(self) -> ApiError:
        close = {"connection": "close", "x-should-retry": "false"}
        return ApiError(408, "the body did not come in time", code="request_timeout", headers=close)


def nested_over(body: bytes, most: int) -> bool:
    """Whether JSON has more than so many brackets open at once, as far as can be said without parsing it."""
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    told = np.frombuffer(_STRING.sub(b"", body), dtype=np.uint8)
    opens, closes = (told == 0x5B) | (told == 0x7B), (told == 0x5D) | (told == 0x7D)
    return bool(np.cumsum(opens.astype(np.int32) - closes.astype(np.int32)).max(initial=0) > most)


def _most(scope: Scope, limits: Limits) -> int:
    """Bytes of the body that such a request may have."""
    if scope["method"] == "POST":
        if scope["path"] == "/v1/files":
            return limits.file_bytes + AROUND_BYTES
        if _PARTS.fullmatch(scope["path"]):
            return limits.part_bytes + AROUND_BYTES
    return limits.body_bytes
