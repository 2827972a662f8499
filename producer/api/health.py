"""Whether the server lives, and whether it can do its work: the two routes that ask for no key."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from loramill.producer.api.context import Api, ApiOf
from loramill.store.errors import StoreError

LOOK_S = 1.0
"""How old what is said of the store may be: anybody may ask, as often as he likes."""

router = APIRouter()


class Health(BaseModel):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The store answers."""

    status: Literal["ready"] = "ready"
    store: Literal["ok"] = "ok"
    workers: int
    """Heard of within the last half minute. Without one, rows wait."""


class _Looked:
    """How many workers there were when somebody last asked, or what the store said instead."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()  # whoever waits for a store that hangs keeps no thread from others
        self._until_s = 0.0
        self._answer: int | StoreError = 0

    async def workers(self, api: Api) -> int:
        """Raises StoreError."""
        async with self._lock:
            if time.monotonic() >= self._until_s:
                try:
                    self._answer = len(await run_in_threadpool(api.store.workers))
                except StoreError as error:
                    self._answer = error
                self._until_s = time.monotonic() + LOOK_S
        if isinstance(self._answer, StoreError):
            raise self._answer.with_traceback(None)
        return self._answer


@router.get("/healthz")
async def healthz() -> Health:
    """200 as long as the process lives."""
    return Health()


@router.get("/readyz")
async def readyz(api: ApiOf) -> Readiness:
    """200 when the store answers."""
    looked: _Looked = api.shared.setdefault("readyz", _Looked())
    return Readiness(workers=await looked.workers(api))
