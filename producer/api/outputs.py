"""The files of an ended batch: what was answered and what was not, each in the order of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from tempfile import TemporaryFile
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from loramill.producer.api.batch_book import Batch
from loramill.producer.api.contents import Contents
from loramill.producer.collect import Seen, pick, put, put_never_run
from loramill.producer.spool import Spool, write_all
from loramill.producer.waiting import chunks
from loramill.store.contract import JobStore
from loramill.store.records import Job

OUTPUT, ERROR = "output", "error"


def publish(
    store: JobStore, contents: Contents, batch: Batch, job: Job, go_on: Callable[[], None]
) -> tuple[str | None, str | None]:
    """Writes the files of an ended job, and returns the ids of those that there are: output, errors. A row takes 14
    bytes of memory; its line waits on disk. Raises OSError, StoreError."""
    with TemporaryFile() as file:
        spool, seen = Spool(job.total, cast(BinaryIO, file)), Seen(job.total)
        for chunk in chunks(store, job):
            go_on()
            put(spool, pick(chunk, seen.first(chunk)))
        put_never_run(store, job, spool)
        output = _write(contents, batch, OUTPUT, spool, np.flatnonzero(spool.answered), go_on)
        return output, _write(contents, batch, ERROR, spool, np.flatnonzero(spool.failed), go_on)


def withdraw(contents: Contents, batch: Batch) -> None:
    """Removes whatever the present attempt has published, and all that a dead server left of it."""
    for what in (OUTPUT, ERROR):
        # Begun anew rather than removed: whoever still writes it finds it taken away.
        contents.begin(batch.owner, _name(batch, what), "batch_output", id=batch.file_id(what)).abandon()


def _write(
    contents: Contents, batch: Batch, what: str, spool: Spool, rows: NDArray[np.int64], go_on: Callable[[], None]
) -> str | None:
    if not len(rows):
        return None

    def parts() -> Iterator[bytes]:
        for part in spool.lines(rows):
            go_on()
            yield part

    name, ttl_s = _name(batch, what), batch.data.output_ttl_s
    with contents.begin(batch.owner, name, "batch_output", ttl_s=ttl_s, id=batch.file_id(what)) as writing:
        write_all(parts(), writing.write)
        return writing.finish().id


def _name(batch: Batch, what: str) -> str:
    return f"{batch.id}_{what}.jsonl"
