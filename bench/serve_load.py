"""`python -m bench.serve_load`: the clients of `bench.serve`, each kind in a process of its own; JSON on stdout."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import openai

EVERY_S = 1.0


def poll(url: str, clients: int, seconds: float, batches: Sequence[str]) -> list[float]:
    """How long each look at a batch took, in seconds, of clients that look once a second, each at one batch."""
    return asyncio.run(_poll(url, clients, seconds, batches))


async def _poll(url: str, clients: int, seconds: float, batches: Sequence[str]) -> list[float]:
    print(flush=True)  # ready
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


def upload(client: openai.OpenAI, path: Path) -> float:
    """Seconds of an upload, which is forgotten again."""
    with path.open("rb") as file:
        began = time.monotonic()
        made = client.files.create(file=file, purpose="batch")
        took = time.monotonic() - began
    client.files.delete(made.id)
    return took


def download(client: openai.OpenAI, file_id: str, size: int) -> float:
    """Seconds of a download, of which nothing is kept."""
    began = time.monotonic()
    with client.files.with_streaming_response.content(file_id) as answer:
        came = sum(len(piece) for piece in answer.iter_bytes())
    assert came == size, came
    return time.monotonic() - began


def move(url: str, seconds: float, once: Callable[[openai.OpenAI], float]) -> list[float]:
    """How long each took, begun again until the time is up."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        client.files.list(limit=1)
        print(flush=True)  # ready
        ends, took = time.monotonic() + seconds, list[float]()
        while time.monotonic() < ends:
            took.append(once(client))
        return took


def main(arguments: Sequence[str]) -> None:
    """`poll URL SECONDS CLIENTS BATCH...`, `upload URL SECONDS PATH` or `download URL SECONDS FILE BYTES`."""
    what, url, seconds, *rest = arguments
    if what == "poll":
        took = poll(url, int(rest[0]), float(seconds), rest[1:])
    elif what == "upload":
        took = move(url, float(seconds), lambda client: upload(client, Path(rest[0])))
    else:
        took = move(url, float(seconds), lambda client: download(client, rest[0], int(rest[1])))
    print(json.dumps(took))


if __name__ == "__main__":
    main(sys.argv[1:])
