"""A live server of the batch routes over a store where stub workers said what they serve."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import openai
import uvicorn
from openai.types import Batch

from loramill.producer.api.app import make_app
from loramill.producer.api.batch_book import Batch as Kept
from loramill.producer.api.contents import Contents
from loramill.producer.api.context import Api
from loramill.producer.api.keys import Keys
from loramill.producer.api.minder import Minder, Pace
from loramill.store.contract import JobStore
from loramill.store.packing import Chunk
from loramill.store.records import Claim
from tests.producer.queued import done_row
from tests.producer.served_by_stub import MANIFEST

FAST = Pace(look_s=0.05, lock_s=2.0, reap_s=0.05, again_s=0.1)
DEADLINE_S = 60.0
ENDED = {"completed", "failed", "cancelled", "expired"}

T = TypeVar("T")


def until(look: Callable[[], T], good: Callable[[T], object] = bool) -> T:
    """What `look` returns, once that is `good`."""
    give_up = time.monotonic() + DEADLINE_S
    while not good(seen := look()):
        assert time.monotonic() < give_up, f"it is still {seen!r}"
        time.sleep(0.02)
    return seen


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The URL of a uvicorn that serves `app` in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)


def chat(id: str, text: str = "hello", model: str | None = None, **body: Any) -> dict[str, Any]:
    """A line of a batch."""
    said = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **({"model": model} if model else {})}
    return {"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": said | body}


def chats(count: int, *models: str | None) -> list[dict[str, Any]]:
    """Lines that go round these models."""
    names = models or (None,)
    return [chat(f"r{at}", f"row {at}", names[at % len(names)]) for at in range(count)]


@dataclass
class Served:
    """One server."""

    api: Api
    url: str
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    def client(self, token: str = "any") -> openai.OpenAI:
        """The official one."""
        if token not in self.clients:
            self.clients[token] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=token)
        return self.clients[token]

    def upload(
        self,
        rows: Iterable[dict[str, Any] | str | bytes],
        *,
        owner: str = "",
        name: str = "in.jsonl",
        end: bytes = b"\n",
    ) -> str:
        """The id of a file with these lines."""
        with Contents(self.api.shelf).begin(owner, name, "batch") as writing:
            for row in rows:
                text = json.dumps(row) if isinstance(row, dict) else row
                writing.write((text.encode() if isinstance(text, str) else text) + end)
            return writing.finish().id

    def lines(self, file_id: str | None, *, owner: str = "") -> list[dict[str, Any]]:
        """A file's."""
        assert file_id is not None
        contents = Contents(self.api.shelf)
        text = b"".join(contents.read(contents.find(owner, file_id)))
        return [json.loads(line) for line in text.splitlines()]

    def create(self, rows: Iterable[dict[str, Any] | str | bytes] | str, **asked: Any) -> Batch:
        """A batch of these lines, or of a file."""
        file = rows if isinstance(rows, str) else self.upload(rows)
        said: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **asked}
        return self.client().batches.create(input_file_id=file, **said)

    def see(self, id: str, *statuses: str) -> Batch:
        """The batch, once it has one of these statuses."""
        client = self.client()
        return until(lambda: client.batches.retrieve(id), lambda batch: batch.status in (statuses or ENDED))

    def claim(self) -> Claim:
        """The next shard, as a worker takes it."""
        claim = until(lambda: self.api.store.claim("w", MANIFEST.id))
        assert claim is not None
        return claim

    def answer(self, claim: Claim, positions: Iterable[int] | None = None, fail: Iterable[str] = ()) -> None:
        """Results of a claimed shard's rows."""
        rows = self.api.store.read_shard(claim.lease.job, claim.lease.shard)
        places = list(range(len(rows)) if positions is None else positions)
        done = [done_row(claim.lease.job, *rows[at], fail=set(fail)) for at in places]
        self.api.store.commit(claim.lease, Chunk.of(done, places))

    def work(self, id: str, fail: Iterable[str] = ()) -> Batch:
        """The ended batch: all that waits is answered until then."""

        def step() -> Batch:
            if claim := self.api.store.claim("w", MANIFEST.id):
                self.answer(claim, fail=fail)
            return self.client().batches.retrieve(id)

        return until(step, lambda batch: batch.status in ENDED)


@contextmanager
def serving(
    store: JobStore,
    *,
    keys: Path | None = None,
    name: str = "one",
    pace: Pace = FAST,
    minds: bool = True,
    on_end: Callable[[Kept], None] = lambda batch: None,
) -> Iterator[Served]:
    """A server over `store`; without `minds` it only answers."""
    api = Api(store, Keys(keys), name=name)
    with ExitStack() as stack:
        if minds:
            minder = Minder(api, on_end, pace)
            minder.start()
            stack.callback(minder.close)
        served = Served(api, stack.enter_context(listening(make_app(api))))
        yield served
        for client in served.clients.values():
            client.close()
