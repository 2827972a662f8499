"""A stub worker that is quick to hear, for the tests of routes that it answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.store.contract import JobStore
from loramill.store.sqlite_store import SqliteStore
from loramill.worker import engine_process, housekeeping
from loramill.worker.node import Node
from tests.worker.queueing import ENVIRONMENT, until, working


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stub engines, and workers that look and speak often."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine_process, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(housekeeping, "ROUND_S", 0.1)
    monkeypatch.setattr(housekeeping, "HELLO_S", 0.3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with SqliteStore(tmp_path / "jobs.db") as opened:
        yield opened


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The worker's --adapters-dir."""
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def worker(quick: None, store: JobStore, root: Path, tmp_path: Path) -> Iterator[Node]:
    with working(SqliteStore(tmp_path / "jobs.db"), adapters_dir=root) as (node, _):
        until(lambda: [one.state for one in store.workers()] == ["ready"])
        yield node
