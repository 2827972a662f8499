"""A file or rows to a batch."""

from __future__ import annotations

import gzip
import json
import os
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import zstandard

from loramill.producer.generated import Row
from loramill.producer.given_rows import Stop, spooled, spooled_here
from loramill.producer.remote.errors import ClientError, Refused
from loramill.producer.remote.objects import one
from loramill.producer.remote.steps import Call, Do, Steps
from loramill.producer.remote.uploads import upload
from loramill.schemas.batch_objects import BatchObject, Endpoint
from loramill.schemas.file_objects import FileObject
from loramill.schemas.request import MAX_LINE_BYTES

ROWS_NAME = "rows.jsonl"
CHAT: Endpoint = "/v1/chat/completions"
TEXT: Endpoint = "/v1/completions"
Source: TypeAlias = tuple[BinaryIO, str]
"""An open file, and what it is called."""


@dataclass(slots=True, frozen=True)
class Asked:
    """What a batch is to be."""

    endpoint: Endpoint | None
    window: str
    metadata: Mapping[str, str] | None
    priority: int
    on_invalid: Literal["fail", "skip"]
    key: str | None
    """The same one again is the same batch."""


def submitted(source: Source, asked: Asked, part_bytes: int, patience_s: float) -> Steps[BatchObject]:
    """The batch of a file. Raises Refused, Unreachable."""
    file, name = source
    endpoint = asked.endpoint or (yield Do(lambda: endpoint_of(file, name)))
    uploaded = yield from upload(file, name, "batch", part_bytes, patience_s)
    body = {
        "input_file_id": uploaded.id,
        "endpoint": endpoint,
        "completion_window": asked.window,
        "metadata": None if asked.metadata is None else dict(asked.metadata),
        "loramill": {"priority": asked.priority, "on_invalid": asked.on_invalid},
    }
    headers = {"idempotency-key": asked.key or secrets.token_urlsafe(24)}
    try:
        batch = yield from one(BatchObject, Call("POST", "batches", json=body, headers=headers), patience_s)
    except Refused:
        yield from _forget(uploaded)
        raise
    if batch.input_file_id != uploaded.id:  # submitted before, with the same key
        yield from _forget(uploaded)
    return batch


def _forget(file: FileObject) -> Steps[None]:
    """Nobody knows of it, and its time may never be up."""
    with suppress(ClientError):
        yield Call("DELETE", f"files/{file.id}")


def endpoint_of(file: BinaryIO, name: str) -> Endpoint:
    """Where an input belongs: by the url of its first line that can be read, or by what it asks. Without such a line it
    may go anywhere: the server says what is wrong with it."""
    for line in _first_lines(file, name):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return TEXT if row.get("url", TEXT if "prompt" in row else CHAT) == TEXT else CHAT
    return CHAT


def _first_lines(file: BinaryIO, name: str) -> list[bytes]:
    try:
        with os.fdopen(os.dup(file.fileno()), "rb") as raw:
            raw.seek(0)
            lines: BinaryIO | gzip.GzipFile | zstandard.ZstdDecompressionReader = raw
            if name.endswith(".gz"):
                lines = gzip.GzipFile(fileobj=raw)
            elif name.endswith(".zst"):
                lines = zstandard.ZstdDecompressor().stream_reader(raw)
            head = lines.read(MAX_LINE_BYTES + 1)
    except (OSError, EOFError, zstandard.ZstdError):
        return []
    return head.removeprefix(b"\xef\xbb\xbf").splitlines()


@contextmanager
def opened(given: str | os.PathLike[str] | Iterable[Row]) -> Iterator[Source]:
    """A file, or rows as one. Raises OSError, ValueError for what is no row."""
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        with path.open("rb") as file:
            yield file, path.name
    else:
        with spooled_here(given) as file:
            yield file, ROWS_NAME


@asynccontextmanager
async def opened_async(
    given: str | os.PathLike[str] | Iterable[Row] | AsyncIterable[Row],
) -> AsyncIterator[Source]:
    """The same, while others run."""
    if isinstance(given, str | os.PathLike):
        with opened(given) as source:
            yield source
    else:
        async with spooled(given, Stop()) as file:
            yield file, ROWS_NAME
