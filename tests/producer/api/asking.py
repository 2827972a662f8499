"""The API asked as a caller of one's choosing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from starlette.testclient import TestClient

from loramill.producer.api.app import make_app
from loramill.producer.api.context import Api, Caller
from loramill.producer.api.keys import Keys
from loramill.store.contract import JobStore
from tests.producer.api.callers import Callers


@contextmanager
def asking(store: JobStore, *callers: Caller) -> Iterator[list[TestClient]]:
    """A client for each caller, of one server."""
    tokens = {f"token-{number}": caller for number, caller in enumerate(callers or (Caller(),))}
    app = make_app(Api(store, cast(Keys, Callers(tokens))))
    clients = [
        TestClient(app, headers={"authorization": f"Bearer {token}"}, raise_server_exceptions=False) for token in tokens
    ]
    yield clients
    for client in clients:
        client.close()
