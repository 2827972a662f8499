"""`python -m bench.serve_load`: the clients of `bench.serve`, each kind in a process of its own; JSON on stdout."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import openai

EVERY_S = 1.0


def poll(url: str, clients: int, seconds: float, batches: Sequence[str]) -> list[float]:
    """How long each look at a batch took, in seconds, of clients that look once a second, each at one batch."""
    return asyncio.run(_poll(url, clients, seconds, batches))


async def _poll(url: str, clients: int, seconds: float, batches: Sequence[str]) -> list[float]:
    places = random.Random(0)
    ends = time.monotonic() + seconds
    each = [_client(url, batches[n % len(batches)], places.random() * EVERY_S, ends) for n in range(clients)]
    return [took for looks in await asyncio.gather(*each) for took in looks]


async def _client(url: str, batch: str, after_s: float, ends: float) -> list[float]:
    """By hand, on a connection that is kept: what is measured is the server, and the client shares its cores."""
    where, took = urlsplit(url), []
    request = f"GET /v1/batches/{batch} HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer x\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    at = time.monotonic() + after_s
    while at < ends:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        # From when it was to be sent, so that a server that holds one up holds up those behind it too.
        began = at
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200"), head
        body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
        took.append(time.monotonic() - began)
        assert json.loads(body)["id"] == batch
        at = max(at + EVERY_S, time.monotonic())
    writer.close()
    await writer.wait_closed()
    return took


def upload(url: str, path: Path) -> float:
    """Seconds of an upload by OpenAI's client."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client, path.open("rb") as file:
        began = time.monotonic()
        made = client.files.create(file=file, purpose="batch")
        took = time.monotonic() - began
        client.files.delete(made.id)
        return took


def download(url: str, file_id: str, size: int) -> float:
    """Seconds of a download by OpenAI's client, which keeps nothing of it."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        began = time.monotonic()
        with client.files.with_streaming_response.content(file_id) as answer:
            came = sum(len(piece) for piece in answer.iter_bytes())
        assert came == size, came
        return time.monotonic() - began


def main(arguments: Sequence[str]) -> None:
    """`poll URL CLIENTS SECONDS BATCH...`, `upload URL PATH` or `download URL FILE BYTES`."""
    what, url, *rest = arguments
    if what == "poll":
        print(json.dumps(poll(url, int(rest[0]), float(rest[1]), rest[2:])))
    elif what == "upload":
        print(json.dumps(upload(url, Path(rest[0]))))
    else:
        print(json.dumps(download(url, rest[0], int(rest[1]))))


if __name__ == "__main__":
    main(sys.argv[1:])
