"""The file of a request's body on its way into the store: a piece at a time, in threads, and gone if anything fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from loramill.producer.api.contents import KIND, PART_KIND, ContentTooLong, Writing
from loramill.producer.api.context import Api, Caller
from loramill.producer.api.errors import ApiError, invalid
from loramill.producer.api.multipart import FORM_BYTES, Form, Take
from loramill.store.errors import StoreError
from loramill.store.shelf import PIECE_BYTES

IDLE_S = 120.0
"""A client that sends nothing for so long is gone."""
_THREADS = 4
"""That write at the same time: files must not take those of all other requests."""

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Room:
    """How long a file may be, and what is said of a longer one."""

    bytes: int
    refusal: ApiError


def used(api: Api, caller: Caller) -> int:
    """Bytes that the caller has, what is being written included."""
    return sum(api.shelf.usage(kind, caller.name).size for kind in (KIND, PART_KIND))


def room(api: Api, caller: Caller, most: int, too_large: ApiError) -> Room:
    """`most` bytes, or what is left of the caller's quota."""
    left = max(0, caller.quota.stored_bytes - used(api, caller))
    return Room(most, too_large) if left >= most else Room(left, over_quota(caller))


def over_quota(caller: Caller) -> ApiError:
    """What is said to a caller that has too much."""
    most = caller.quota.stored_bytes
    return ApiError(403, f"your files would come to more than {most} bytes: delete some", code="storage_quota_exceeded")


async def in_thread(api: Api, work: Callable[[], T]) -> T:
    """What `work` returns, from one of the threads for files."""
    threads = api.shared.get("file_threads")
    if threads is None:
        threads = api.shared["file_threads"] = ThreadPoolExecutor(_THREADS, "files")
    return await asyncio.get_running_loop().run_in_executor(threads, work)


@asynccontextmanager
async def received(
    request: Request, api: Api, room: Room, field: str, begin: Callable[[str], Writing]
) -> AsyncIterator[tuple[Writing, dict[str, str]]]:
    """The file that the form has as `field`, written but not finished, and the form's other fields; abandoned unless it
    is finished inside. `begin` is given its file name. Raises ApiError."""
    writing: Writing | None = None

    def open_file(name: str, filename: str) -> Take:
        nonlocal writing
        if name != field:
            raise invalid(f"{name} is no file that is asked for here", param=name, code="unknown_parameter")
        if writing is not None:
            raise invalid(f"{name} is given twice", param=name)
        writing = begin(filename)
        return writing.write

    form = Form(request.headers.get("content-type"), open_file)
    try:
        try:
            await _pour(request, api, room, form.feed)
        except ContentTooLong:
            raise room.refusal from None
        form.close()
        if writing is None:
            missing = f"there is no {field}, or it has no file name"
            raise invalid(missing, param=field, code="missing_required_parameter")
        yield writing, form.fields
    finally:
        if writing is not None:
            with suppress(StoreError):  # its time will be up
                await in_thread(api, writing.abandon)


async def _pour(request: Request, api: Api, room: Room, into: Take) -> None:
    """The body to `into`, about a piece at a time; while one is worked on the next is received."""
    most = room.bytes + FORM_BYTES
    if int(request.headers.get("content-length", 0)) > most:
        raise room.refusal
    total = 0
    held = bytearray()
    working = _start(api, into, b"")
    chunks = aiter(request.stream())
    try:
        while chunk := await _next(chunks):
            total += len(chunk)
            if total > most:
                raise room.refusal
            held += chunk
            if len(held) >= PIECE_BYTES:
                await asyncio.shield(working)
                working, held = _start(api, into, bytes(held)), bytearray()
        await asyncio.shield(working)
        working = _start(api, into, bytes(held))
        await asyncio.shield(working)
    finally:
        await asyncio.gather(working, return_exceptions=True)


def _start(api: Api, into: Take, data: bytes) -> asyncio.Task[None]:
    return asyncio.create_task(in_thread(api, lambda: into(data)))


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    try:
        async with asyncio.timeout(IDLE_S):
            return await anext(chunks)
    except TimeoutError:
        raise ApiError(408, f"nothing came for {IDLE_S:g} s", code="request_timeout") from None
    except ClientDisconnect:
        raise invalid("the client went away", code="client_disconnected") from None
