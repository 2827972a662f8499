"""A live server: the application over a real store, served by a real uvicorn, asked by OpenAI's own client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx2
import openai
import pytest
import uvicorn

from loramill.producer.api.app import make_app
from loramill.producer.api.context import Api, Caller
from loramill.store.sqlite_store import SqliteStore
from tests.servers import free_port

START_S = 60.0


@dataclass
class Live:
    """A server that answers until the test ends."""

    api: Api
    url: str
    """Without /v1."""
    callers: dict[str, Caller] = field(default_factory=dict)
    """By their tokens; any other token is one of a caller of that name without rights beyond its own things."""
    _opened: ExitStack = field(default_factory=ExitStack)

    def client(self, token: str = "ann", **more: Any) -> openai.OpenAI:
        """OpenAI's, as anybody would make it. It tries nothing twice: a test that wants that says so."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, **{"max_retries": 0} | more)
        return self._opened.enter_context(made)

    def http(self, token: str = "ann", **more: Any) -> httpx2.Client:
        """A bare one."""
        made = httpx2.Client(base_url=self.url, headers={"authorization": f"Bearer {token}"}, timeout=60, **more)
        return self._opened.enter_context(made)

    def close(self) -> None:
        """Closes its clients."""
        self._opened.close()


class Callers:
    """Who asks, by token: what keys do."""

    def __init__(self, app: Any, callers: dict[str, Caller]) -> None:
        self.app, self.callers = app, callers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"Bearer ").decode().removeprefix("Bearer ")
            scope.setdefault("state", {})["caller"] = self.callers.get(given, Caller(given, operator=False))
        await self.app(scope, receive, send)


@contextmanager
def serving(api: Api) -> Iterator[Live]:
    """A server of `api` in a thread."""
    port = free_port()
    live = Live(api, f"http://127.0.0.1:{port}")
    config = uvicorn.Config(Callers(make_app(api), live.callers), port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    give_up = time.monotonic() + START_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < give_up, "the server did not start"
        time.sleep(0.01)
    try:
        yield live
    finally:
        live.close()
        server.should_exit = True
        thread.join(START_S)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "store.db")
    yield store
    store.close()


@pytest.fixture
def live(store: SqliteStore) -> Iterator[Live]:
    with serving(Api(store, cast(Any, None))) as live:
        yield live


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Waits for something to become true."""

    def wait(true: Callable[[], object]) -> None:
        give_up = time.monotonic() + START_S
        while not true():
            assert time.monotonic() < give_up
            time.sleep(0.01)

    return wait
