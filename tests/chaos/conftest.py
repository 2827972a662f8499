"""Clusters for tests. What a test starts is ended, whatever happened."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster
from tests.servers import RedisServer


@pytest.fixture
def cluster(tmp_path: Path, redis_server: RedisServer) -> Iterator[Cluster]:
    """On the session's server, in a corner of its own."""
    with Cluster(tmp_path, redis_server.url, prefix=f"chaos-{uuid.uuid4().hex[:8]}") as made:
        yield made


@pytest.fixture
def server(tmp_path: Path, redis_server: RedisServer) -> Iterator[Callable[..., RedisServer]]:
    """Starts servers of the test's own, which it may kill; `redis_server` sees to it that there is one to start."""
    with ExitStack() as stack:

        def start(**settings: str) -> RedisServer:
            return stack.enter_context(RedisServer(tmp_path / "redis", **settings))

        yield start
    shutil.rmtree(tmp_path / "redis", ignore_errors=True)
