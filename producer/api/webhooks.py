"""Tells whoever wants to know that a batch has ended: signed, again and again for a day until somebody takes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from loramill.producer.api.batch_book import Batch
from loramill.producer.api.context import Api
from loramill.producer.api.errors import place_of
from loramill.producer.api.webhook_post import Endpoint, Refused, post
from loramill.store.errors import StoreError
from loramill.store.shelf import Record, RecordExists, RecordNotFound

AGAIN_S = (5, 30, 120, 600, 1800, 3600, 7200, 14400, 21600, 32400)
"""Until each further try; about a day in all."""
KEPT_S = 26 * 3600.0
_KIND = "webhook"
_LOCK_S = 60.0
_PAGE = 100
_WORKERS = 4
_log = logging.getLogger("loramill.api")


@dataclass(slots=True, frozen=True)
class Pace:
    """In seconds."""

    look_s: float = 1.0
    again_s: tuple[float, ...] = AGAIN_S


class Webhooks:
    """A server's deliveries. What one does not bring itself to send, another sends."""

    def __init__(
        self,
        api: Api,
        endpoint_of: Callable[[str], Endpoint | None],
        *,
        allow_private: bool = False,
        pace: Pace | None = None,
    ) -> None:
        """`endpoint_of`: where the events of an owner go; None is nowhere. `allow_private`: also to private networks
        and to this machine, and without TLS."""
        self._api, self._shelf = api, api.shelf
        self._endpoint_of, self._allow_private, self._pace = endpoint_of, allow_private, pace or Pace()
        self._owners: set[str] = set()
        """Those to whom something is being sent: one who takes his time holds up nobody else."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="webhooks")

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def close(self) -> None:
        """Waits for what is on its way."""
        self._closing.set()
        self._thread.join()
        self._pool.shutdown()

    def owe(self, batch: Batch) -> None:
        """Takes note of the end of a batch, if its owner wants to hear of it. The same end again is the same event."""
        if self._endpoint_of(batch.owner) is None:
            return
        id = f"evt_{blake2b(batch.id.encode(), digest_size=12).hexdigest()}"
        said = {"type": f"batch.{batch.data.status}", "batch": batch.id, "at_ms": batch.data.ended_ms}
        with suppress(RecordExists):
            self._shelf.put(_KIND, id, batch.owner, orjson.dumps(said | {"tries": 0, "due_s": 0}), ttl_s=KEPT_S)

    def _run(self) -> None:
        while not self._closing.wait(self._pace.look_s):
            try:
                self._look()
            except StoreError as error:
                _log.warning("webhooks wait: %s", error)
            except Exception as error:
                _log.error("webhooks wait: %s", place_of(error))

    def _look(self) -> None:
        for record in self._shelf.overdue(_KIND):
            _log.warning("webhook %s is given up: nobody took it", record.id)
            self._shelf.remove(_KIND, record.id)
        due: dict[str, list[Record]] = {}
        after: str | None = None
        with suppress(RecordNotFound):  # it was taken between two pages: the next look sees the others
            while page := self._shelf.records(_KIND, after=after, limit=_PAGE, oldest_first=True):
                for record in page:
                    if orjson.loads(record.data)["due_s"] <= time.time():
                        due.setdefault(record.owner, []).append(record)
                after = page[-1].id
        for owner, records in due.items():
            if owner not in self._owners and len(self._owners) < _WORKERS:
                self._owners.add(owner)
                self._pool.submit(self._send_all, owner, records)

    def _send_all(self, owner: str, records: Sequence[Record]) -> None:
        try:
            for record in records:
                if self._closing.is_set():
                    return
                self._send(record)
        finally:
            self._owners.discard(owner)

    def _send(self, record: Record) -> None:
        lock = f"webhook:{record.id}"
        try:
            if self._shelf.lock(lock, self._api.name, _LOCK_S):
                # Another server may have sent it since it was read.
                self._deliver(self._shelf.get(record.kind, record.id))
                self._shelf.unlock(lock, self._api.name)
        except StoreError as error:
            _log.info("webhook %s: %s", record.id, error)
        except Exception as error:
            _log.error("webhook %s: %s", record.id, place_of(error))

    def _deliver(self, record: Record) -> None:
        said: dict[str, Any] = orjson.loads(record.data)
        endpoint = self._endpoint_of(record.owner)
        if endpoint is None or said["due_s"] > time.time():
            return
        event = {
            "id": record.id, "object": "event", "type": said["type"], "created_at": said["at_ms"] // 1000,
            "data": {"id": said["batch"]},
        }  # fmt: skip
        try:
            status = post(endpoint, record.id, orjson.dumps(event), allow_private=self._allow_private)
            taken, answer = 200 <= status < 300, f"HTTP {status}"
        except Refused as refused:
            taken, answer = False, str(refused)
        tries = said["tries"] + 1
        _log.info("webhook %s, try %d: %s", record.id, tries, answer)
        if taken:
            self._shelf.remove(_KIND, record.id)
        elif tries > len(self._pace.again_s):
            _log.warning("webhook %s is given up after %d tries: %s", record.id, tries, answer)
            self._shelf.remove(_KIND, record.id)
        else:
            due_s = time.time() + self._pace.again_s[tries - 1]
            self._shelf.replace(record, orjson.dumps(said | {"tries": tries, "due_s": due_s}), ttl_s=KEPT_S)
