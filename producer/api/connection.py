"""One connection: uvicorn's, which waits for no client for ever, and says even what it cannot read in our shape."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from loramill.producer.api.errors import ApiError

HEADERS_S = 20.0
"""From a connection's beginning, or a request's first byte, to the end of the request's headers."""


class Connection(H11Protocol):
    """h11 refuses headers over 16 KiB by itself."""

    _headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio's."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._headers_timer is None:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, for what is no HTTP."""
        answer = ApiError(400, msg, code="invalid_http", headers={"connection": "close"}).response()
        body = bytes(answer.body)
        for event in (
            h11.Response(status_code=400, headers=answer.raw_headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_headers(self) -> None:
        self._headers_timer = self.loop.call_later(HEADERS_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None
