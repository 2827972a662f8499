"""A store with jobs and batches in all states, and the whole application over it, asked with keys."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from loramill.producer.api.app import make_app
from loramill.producer.api.batch_book import Batch, BatchData, Book, new_batch_id
from loramill.producer.api.context import Api
from loramill.producer.api.keys import Key, Keys, hash_of, write_keys
from loramill.schemas.job import JobNames, JobSpec
from loramill.store.records import Job, NewShard
from tests.producer.queued import line_of
from tests.producer.served_by_stub import MANIFEST, Place

PEOPLE: dict[str, dict[str, Any]] = {
    "ops": {"operator": True},
    "ann": {},
    "bob": {"adapters": ["a03"]},
}


class Site:
    """The application over a place; with keys for `PEOPLE`, whose tokens are their names, or open."""

    def __init__(self, folder: Path, *, with_keys: bool = False) -> None:
        self.place = Place(folder, MANIFEST)
        self.store = self.place.store
        if with_keys:
            keys = {name: Key(sha256=hash_of(name), **rights) for name, rights in PEOPLE.items()}
            write_keys(folder / "keys.toml", keys)
        self.api = Api(self.store, Keys(folder / "keys.toml" if with_keys else None))
        self.app = make_app(self.api)
        self.book = Book(self.store.shelf)

    def client(self, who: str | None = None) -> TestClient:
        """Asks as this key's owner."""
        headers = {} if who is None else {"authorization": f"Bearer {who}"}
        return TestClient(self.app, "http://127.0.0.1", headers=headers, follow_redirects=False)

    def job(self, job_id: str, rows: int = 8, **spec: Any) -> Job:
        """An accepted job of the stub's base, in shards of four rows."""
        given = {"names": JobNames(base="stub"), **spec}
        self.store.stage(JobSpec(id=job_id, base_id=MANIFEST.base_id, **given))
        for number, start in enumerate(range(0, rows, 4)):
            lines = [(row, line_of(row)) for row in range(start, min(start + 4, rows))]
            self.store.add_shard(job_id, NewShard(number, lines))
        return self.store.accept(job_id)

    def batch(self, owner: str, **data: Any) -> Batch:
        """A batch's record, as the API makes it."""
        given: dict[str, Any] = {
            "endpoint": "/v1/completions", "input_file_id": "file-0", "completion_window": "24h", "window_s": 86400,
            "pending_rows": 1000,
        }  # fmt: skip
        return self.book.put(new_batch_id(), owner, BatchData(**given | data))

    def running_batch(self, owner: str, rows: int = 8, **spec: Any) -> Batch:
        """One with its accepted job."""
        batch = self.batch(owner)
        job = self.job(batch.id, rows, owner=owner, **spec)
        status = {"status": job.status, "submits": 1, "in_progress_ms": job.accepted_ms, "total": rows}
        return self.book.change(batch, **status)


@dataclass
class Seen(HTMLParser):
    """What is in a page."""

    html: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_endtag(self, tag: str) -> None:
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        """Its text, with single spaces."""
        return re.sub(r"\s+", " ", self.text).strip()

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The attributes of every such element."""
        return [
            found for name, found in self.tags if name == tag and all(found.get(k) == v for k, v in attributes.items())
        ]

    @property
    def jobs(self) -> list[str]:
        """The ids of the jobs in the table, in its order."""
        return [str(row["id"]).removeprefix("job-") for row in self.all("tr") if str(row.get("id")).startswith("job-")]

    @property
    def links(self) -> set[str]:
        """Where it leads, and what it does."""
        found = [one.get("href") for one in self.all("a")] + [one.get("action") for one in self.all("form")]
        return {link for link in found if link}
