"""Where a store can be: empty at first, opened as often as a test likes. Every store that is added is added here.

A store takes `clock`, a function that returns seconds since 1970, in place of its own clock, so that tests move time.
For a server's store it is an argument that its scripts take, empty in use: the server's time then.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramill.store.contract import JobStore
from loramill.store.part_files import Files
from tests.contract.model import Model
from tests.servers import RedisServer


@dataclass(slots=True)
class Clock:
    """Moves when it is told to."""

    now_ms: int = 1_800_000_000_000

    def __call__(self) -> float:
        return self.now_ms / 1000

    def advance(self, seconds: float) -> None:
        self.now_ms += round(seconds * 1000)


class Place(ABC):
    """One store's place, with the clock that all its handles go by."""

    def __init__(self, *, files: bool) -> None:
        self.clock = Clock()
        self.files = f"memory://{uuid.uuid4().hex}" if files else None

    @abstractmethod
    def open(self, **options: Any) -> JobStore:
        """A new handle; what was written through others is there. `lease_s` and `retention_s` as every store has."""

    def _files(self) -> Files | None:
        return Files(self.files) if self.files is not None else None


class ModelPlace(Place):
    """The model itself is held to the contract as well."""

    def __init__(self) -> None:
        super().__init__(files=False)
        self.model: Model | None = None

    def open(self, **options: Any) -> JobStore:
        if self.model is None:
            self.model = Model(self.clock, **options)
        return self.model


class SqlitePlace(Place):
    """A database file in a folder of its own."""

    def __init__(self, folder: Path, *, files: bool) -> None:
        super().__init__(files=files)
        self.path = folder / f"{uuid.uuid4().hex}.db"

    def open(self, **options: Any) -> JobStore:
        from loramill.store.sqlite_store import SqliteStore

        return SqliteStore(self.path, files=self._files(), clock=self.clock, **options)


class RedisPlace(Place):
    """A prefix of its own on a server that all tests share."""

    def __init__(self, server: RedisServer, *, files: bool) -> None:
        super().__init__(files=files)
        self.url, self.prefix = server.url, uuid.uuid4().hex

    def open(self, **options: Any) -> JobStore:
        from loramill.store.redis_store import RedisStore

        return RedisStore(self.url, prefix=self.prefix, files=self._files(), clock=self.clock, **options)
