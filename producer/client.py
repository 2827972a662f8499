"""The HTTP API from Python, for those who do not use the openai package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, overload

import httpx2

from loramill.producer.generated import Generated, Row
from loramill.producer.remote import objects, questions, submits
from loramill.producer.remote.async_client import AsyncChat, AsyncClient
from loramill.producer.remote.downloads import fetched, whole
from loramill.producer.remote.drivers import Driver
from loramill.producer.remote.errors import ClientError, Damaged, Refused, Unreachable
from loramill.producer.remote.follow import looked, ordered_results, results, waited, watched, written
from loramill.producer.remote.objects import Model
from loramill.producer.remote.questions import Delta, Message, Prompt, Talk
from loramill.producer.remote.settings import ANSWER_S, PATIENCE_S, TIMEOUT_S, http_options
from loramill.producer.remote.uploads import PART_BYTES, upload
from loramill.schemas.adapter_objects import AdapterDeleted, AdapterObject
from loramill.schemas.batch_objects import BatchEvent, BatchObject, Endpoint
from loramill.schemas.file_objects import FileObject
from loramill.store.files import atomic_writer

__all__ = [
    "AsyncChat",
    "AsyncClient",
    "Chat",
    "Client",
    "ClientError",
    "Damaged",
    "Delta",
    "Refused",
    "Unreachable",
]


class Client:
    """A server's jobs, files and answers: `with Client("http://host:8000/v1") as c: batch = c.submit("in.jsonl")`.

    Any thread may call any method. What a server answers with an error is raised as Refused, with its `status`, `code`,
    `param` and `request_id`; Unreachable is no answer at all. Both are raised once asking again, with longer and longer
    pauses, did not help for `patience_s`; a batch that is followed goes on through ten minutes without its server.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        patience_s: float = PATIENCE_S,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """`base_url`: else LORAMILL_API, or what `loramill serve` listens on by itself. `api_key`: else
        LORAMILL_API_KEY. `timeout_s`: for a connection, and between two pieces of an answer. A file of more than
        `part_bytes` is uploaded in parts."""
        self._http = httpx2.Client(**http_options(base_url, api_key, timeout_s))
        self._driver, self._patience_s, self._part_bytes = Driver(self._http), patience_s, part_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    # Batches.

    def submit(
        self,
        given: str | PathLike[str] | Iterable[Row],
        endpoint: Endpoint | None = None,
        *,
        window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        priority: int = 0,
        on_invalid: Literal["fail", "skip"] = "fail",
        idempotency_key: str | None = None,
    ) -> BatchObject:
        """The batch of a file's lines, or of rows like those that Mill.run takes, which go to disk as they come.

        `endpoint`: else the one that the first line is for. `window`: by when it expires, `10m` to `30d`. With the same
        `idempotency_key` within a day it is the same batch. Its lines are checked later: then it is `failed`, and has
        `errors`."""
        asked = submits.Asked(endpoint, window, metadata, priority, on_invalid, idempotency_key)
        with submits.opened(given) as source:
            return self._driver.run(submits.submitted(source, asked, self._part_bytes, self._patience_s))

    def batch(self, batch_id: str) -> BatchObject:
        """As it is now."""
        return self._driver.run(looked(batch_id, self._patience_s))

    def batches(self) -> Iterator[BatchObject]:
        """All of them, the newest first."""
        return self._driver.each(objects.batches(self._patience_s))

    def watch(self, batch_id: str) -> Iterator[BatchObject | BatchEvent]:
        """The batch now, and each time that it changed, until it has ended, that included; and what happens to it
        meanwhile, such as a worker that was lost."""
        return self._driver.each(watched(batch_id, self._patience_s))

    def wait(self, batch_id: str, timeout_s: float | None = None) -> BatchObject:
        """The batch once it has ended. Raises TimeoutError, and the batch goes on."""
        return self._driver.run(waited(batch_id, timeout_s, self._patience_s))

    def results(
        self, batch_id: str, *, follow: bool = True, ordered: bool = False, after: int = 0
    ) -> Iterator[Generated]:
        """Every row's result as it finishes, until the batch has ended; without `follow` those that there are.

        With `ordered` in the order of the input: what is early waits on disk. Rows that never ran, because the batch
        was cancelled or expired, have none. `after`: how many to leave out, for who took so many before."""
        read = ordered_results if ordered else results
        return self._driver.each(read(batch_id, follow, after, self._patience_s))

    def output(self, batch_id: str) -> Iterator[Generated]:
        """The answers of a batch that has ended, in the order of its input. Raises ValueError for one that has not."""
        return self._driver.each(written(batch_id, False, self._patience_s))

    def errors(self, batch_id: str) -> Iterator[Generated]:
        """Its rows that failed, or never ran, in the same order."""
        return self._driver.each(written(batch_id, True, self._patience_s))

    def cancel(self, batch_id: str) -> BatchObject:
        """Starts no more rows of it; results that there are stay."""
        return self._driver.run(objects.cancel(batch_id, self._patience_s))

    def retry(self, batch_id: str, *, failed_only: bool = False) -> BatchObject:
        """A new batch of the rows of an ended one that failed or, without `failed_only`, never ran."""
        return self._driver.run(objects.retry(batch_id, failed_only, self._patience_s))

    # Files.

    def upload(self, path: str | PathLike[str]) -> FileObject:
        """A file as a batch's input, checked only in its name."""
        with submits.opened(path) as (file, name):
            return self._driver.run(upload(file, name, "batch", self._part_bytes, self._patience_s))

    def files(self, purpose: str | None = None) -> Iterator[FileObject]:
        """All of them, the newest first."""
        return self._driver.each(objects.files(purpose, self._patience_s))

    def file(self, file_id: str) -> FileObject:
        """What is known of it."""
        return self._driver.run(objects.file(file_id, self._patience_s))

    def download(self, file_id: str, path: str | PathLike[str]) -> int:
        """Writes a file to `path`, as a whole or not at all; its bytes. Raises Damaged, StoreError for the disk."""
        size = 0
        with atomic_writer(Path(path), compressed=False) as write:
            for part in self._driver.each(fetched(file_id, whole, self._patience_s)):
                write(part)
                size += len(part)
        return size

    def delete_file(self, file_id: str) -> None:
        """Removes it. A batch that has read it goes on."""
        self._driver.run(objects.delete_file(file_id, self._patience_s))

    # What is served.

    def models(self) -> Iterator[Model]:
        """The base and the adapters, by the names that rows give."""
        return self._driver.each(objects.models(self._patience_s))

    def adapters(self) -> Iterator[AdapterObject]:
        """What there is to know of each adapter."""
        return self._driver.each(objects.adapters(self._patience_s))

    def load_adapter(self, name: str, source: str | None = None, scale: float | None = None) -> AdapterObject:
        """Has the workers serve an adapter: `source` is a path in their --adapters-dir, the name unless given. For
        operators."""
        return self._driver.run(objects.load_adapter(name, source, scale, self._patience_s))

    def unload_adapter(self, name: str) -> AdapterDeleted:
        """Has them serve it no longer. For operators."""
        return self._driver.run(objects.unload_adapter(name, self._patience_s))

    # Questions.

    @overload
    def ask(
        self, given: Prompt | Sequence[Message], model: str | None = None, *, stream: Literal[False] = False,
        timeout_s: float = ANSWER_S, **sampling: Any,
    ) -> Generated: ...  # fmt: skip
    @overload
    def ask(
        self, given: Prompt | Sequence[Message], model: str | None = None, *, stream: Literal[True],
        timeout_s: float = ANSWER_S, **sampling: Any,
    ) -> Iterator[Delta]: ...  # fmt: skip
    def ask(
        self,
        given: Prompt | Sequence[Message],
        model: str | None = None,
        *,
        stream: bool = False,
        timeout_s: float = ANSWER_S,
        **sampling: Any,
    ) -> Generated | Iterator[Delta]:
        """The answer to one prompt (a text, token ids) or chat (messages) by an adapter, or by the base.

        With `stream` its parts as they are made: what has begun is not asked again. `timeout_s`: for the whole answer,
        or for each next part of it."""
        call = questions.question(given, model, sampling, stream=stream, timeout_s=timeout_s)
        if stream:
            return self._driver.each(questions.streamed(call, self._patience_s))
        return self._driver.run(questions.answered(call, self._patience_s))

    def chat(
        self, model: str | None = None, *, system: str | None = None, timeout_s: float = ANSWER_S, **sampling: Any
    ) -> Chat:
        """A talk of several turns."""
        return Chat(self._driver, questions.begun(model, system, sampling, timeout_s), self._patience_s)


class Chat:
    """A talk: each turn is asked with all that was said before."""

    def __init__(self, driver: Driver, talk: Talk, patience_s: float) -> None:
        self._driver, self._talk, self._patience_s = driver, talk, patience_s

    @property
    def messages(self) -> list[Message]:
        """What was said: turns that were answered."""
        return self._talk.messages

    def say(self, text: str) -> Generated:
        """The answer to the next turn."""
        return self._driver.run(self._talk.say(text, self._patience_s))

    def stream(self, text: str) -> Iterator[Delta]:
        """The same as it is made; it counts as said once all of it was taken."""
        return self._driver.each(self._talk.stream(text, self._patience_s))
