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
from loramill.producer.api.keys import Keys
from loramill.store.contract import JobStore
from loramill.store.redis_store import RedisStore
from loramill.store.sqlite_store import SqliteStore
from loramill.worker import engine_process, housekeeping
from loramill.worker.node import Node
from tests.producer.api.callers import Callers
from tests.producer.served_by_stub import MANIFEST, Place
from tests.servers import free_port
from tests.worker import queueing

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


@contextmanager
def serving(api: Api) -> Iterator[Live]:
    """A server of `api` in a thread."""
    port = free_port()
    live = Live(api, f"http://127.0.0.1:{port}")
    api.keys = cast(Keys, Callers(live.callers))
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
    store = SqliteStore(tmp_path / "jobs.db")
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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stub engines, and workers that look and speak often."""
    for name, value in queueing.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine_process, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(housekeeping, "ROUND_S", 0.1)
    monkeypatch.setattr(housekeeping, "HELLO_S", 0.3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The worker's --adapters-dir."""
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def worker(quick: None, store: SqliteStore, root: Path, tmp_path: Path) -> Iterator[Node]:
    with queueing.working(SqliteStore(tmp_path / "jobs.db"), adapters_dir=root) as (node, _):
        queueing.until(lambda: [one.state for one in store.workers()] == ["ready"])
        yield node
