"""The API asked as a caller of one's choosing, without the gate that finds out who asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from loramill.producer.api.app import make_app
from loramill.producer.api.context import Api, Caller
from loramill.store.contract import JobStore


class As:
    """The app, asked by one caller."""

    def __init__(self, app: Any, caller: Caller) -> None:
        self._app, self._caller = app, caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["caller"] = self._caller
        await self._app(scope, receive, send)


@contextmanager
def asking(store: JobStore, *callers: Caller) -> Iterator[list[TestClient]]:
    """A client for each caller, of one server."""
    app = make_app(Api(store, keys=cast(Any, None)))
    clients = [TestClient(As(app, caller), raise_server_exceptions=False) for caller in callers or (Caller(),)]
    yield clients
    for client in clients:
        client.close()
