"""Health while a store does not answer."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx2

from loramill.producer.api import health
from loramill.producer.api.app import make_app
from loramill.producer.api.context import Api
from loramill.producer.api.keys import Keys
from loramill.store.errors import StoreUnreachable
from loramill.store.sqlite_store import SqliteStore


class Hanging(SqliteStore):
    """Answers when it is let, and counts who asked."""

    asked = 0
    broken = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.let = threading.Event()

    def workers(self) -> list[Any]:
        self.asked += 1
        self.let.wait(60)
        if self.broken:
            raise StoreUnreachable("nobody answers")
        return []


def test_however_many_ask_the_store_is_asked_once(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(health, "LOOK_S", 3600.0)

    async def ask() -> None:
        transport = httpx2.ASGITransport(app=make_app(Api(store, Keys())))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            waiting = [asyncio.create_task(client.get("/readyz")) for _ in range(200)]
            # Nobody's wait keeps others from an answer that needs no store.
            assert (await client.get("/healthz")).status_code == 200
            store.let.set()
            assert {(await one).status_code for one in waiting} == {503 if store.broken else 200}
            assert store.asked == 1

    for broken in (False, True):
        with Hanging(tmp_path / f"{broken}.db") as store:
            store.broken = broken
            asyncio.run(ask())
