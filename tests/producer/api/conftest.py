"""A live server: the application over a real store, served by a real uvicorn, asked by OpenAI's own client."""

from __future__ import annotations

import threading
import time
import uuid
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
from loramill.store.contract import JobStore
from loramill.store.redis_store import RedisStore
from loramill.store.sqlite_store import SqliteStore
from tests.producer.served_by_stub import MANIFEST, Place
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
    """Who asks, by token: instead of keys in a file."""

    open = False

    def __init__(self, callers: dict[str, Caller]) -> None:
        self._callers = callers

    def caller(self, token: str | None) -> Caller | None:
        return self._callers.get(token, Caller(token, operator=False)) if token else None


@contextmanager
def serving(api: Api) -> Iterator[Live]:
    """A server of `api` in a thread."""
    port = free_port()
    live = Live(api, f"http://127.0.0.1:{port}")
    api.keys = cast(Any, Callers(live.callers))
    config = uvicorn.Config(make_app(api), port=port, log_level="error", lifespan="off")
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
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], JobStore]:
    """Opens one and the same store, again and again; in Redis where the test says so by a parameter."""
    if getattr(request, "param", "sqlite") == "redis":
        server, prefix = request.getfixturevalue("redis_server"), uuid.uuid4().hex
        return lambda: RedisStore(server.url, prefix=prefix)
    return lambda: SqliteStore(tmp_path / "jobs.db")


@pytest.fixture
def place(open_store: Callable[[], JobStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """That store, where stub workers said what they serve."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with open_store() as store:
        yield Place(tmp_path, MANIFEST, store=store)


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
