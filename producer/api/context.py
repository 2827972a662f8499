"""What every request needs: the server's store and limits, and who asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends, Request

from loramill.producer.api.errors import ApiError
from loramill.store.contract import JobStore
from loramill.store.shelf import Shelf

if TYPE_CHECKING:
    from loramill.producer.api.keys import Keys

GIB = 2**30


@dataclass(slots=True, frozen=True)
class Quota:
    """What one key may have and do."""

    stored_bytes: int = 100 * GIB
    """Of files, results included."""
    open_batches: int = 1000
    """That have not ended."""
    pending_rows: int = 50_000_000
    """Of such batches."""
    requests_per_minute: int = 6000
    questions: int = 64
    """Asked at the same time."""


@dataclass(slots=True, frozen=True)
class Caller:
    """Who asks: a key's name, or "" where there are no keys."""

    name: str = ""
    operator: bool = True
    """May see all jobs, the metrics, and change what workers serve."""
    adapters: tuple[str, ...] = ("*",)
    """Patterns of the names that it may use; the others are not there for it."""
    quota: Quota = field(default_factory=Quota)

    def may_use(self, adapter: str) -> bool:
        """Whether the adapter is there for this caller."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


@dataclass(slots=True, frozen=True)
class Limits:
    """Of every request, whoever asks."""

    file_bytes: int = 8 * GIB
    """Of one file, as it is stored."""
    part_bytes: int = 64 * 2**20
    """Of one part of an upload."""
    body_bytes: int = 4 * 2**20
    """Of a body that is no file."""
    retention_s: float | None = None
    """How long files are kept whose owner set no time; None is for ever."""
    unpacked_bytes: int = 64 * GIB
    """What a packed input may come to, on this machine's disk."""


@dataclass(slots=True)
class Api:
    """One server: `request.app.state.api`."""

    store: JobStore
    keys: Keys
    limits: Limits = field(default_factory=Limits)
    store_url: str = ""
    base: str | None = None
    """Which base rows are for where workers serve several."""
    broker: str | None = None
    prefix: str = "loramill"
    name: str = "api"
    """Of this server among others of the same store: what it holds locks by."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What parts of the API keep for as long as the server runs, by their own names."""

    @property
    def shelf(self) -> Shelf:
        """The store's."""
        return self.store.shelf


# These are `async` so that FastAPI asks them where it is, and not each in a thread, for which a request would wait.


async def get_api(request: Request) -> Api:
    """The server that got the request."""
    return cast(Api, request.app.state.api)


async def get_caller(request: Request) -> Caller:
    """Who asks, as `gate.py` found out before anything else was done."""
    return cast(Caller, request.state.caller)


async def get_operator(request: Request) -> Caller:
    """Raises ApiError (403) for a caller that is none."""
    caller = await get_caller(request)
    if not caller.operator:
        raise ApiError(403, "only an operator's key may do that", code="operators_only")
    return caller


ApiOf = Annotated[Api, Depends(get_api)]
CallerOf = Annotated[Caller, Depends(get_caller)]
OperatorOf = Annotated[Caller, Depends(get_operator)]
