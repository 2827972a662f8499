"""From a batch's file to its accepted job."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from loramill.producer.api.asking import served_now
from loramill.producer.api.batch_book import Batch, Book, now_ms
from loramill.producer.api.contents import Contents
from loramill.producer.api.context import Api
from loramill.producer.ask import Ask
from loramill.producer.invalid import InvalidLines, Refused
from loramill.producer.reader import Input, InputError, open_input
from loramill.producer.retry import input_of, without_answer
from loramill.producer.served import Served
from loramill.producer.submit import Checked, Submitted, check, put_job
from loramill.schemas.errors import ErrorCode
from loramill.schemas.failures import Failure
from loramill.schemas.job import JobError
from loramill.store.errors import JobNotFound
from loramill.store.records import Job
from loramill.store.shelf import RecordNotFound

GoOn = Callable[[], None]
"""Called now and then; what it raises ends the work."""


class NotYet(Exception):
    """Nobody has said yet what is served, or not for whom: the batch waits."""


def served_to(api: Api, batch: Batch) -> Served:
    """What the batch's rows may ask for. Raises NotYet, StoreError."""
    try:
        served = served_now(api)(fresh=True)
    except Failure as failure:
        raise NotYet(str(failure)) from None
    patterns = batch.data.adapters
    names = served.offer.names.seen_by(lambda name: any(fnmatchcase(name, pattern) for pattern in patterns))
    return replace(served, offer=replace(served.offer, names=names))


def take_in(api: Api, batch: Batch, served: Served, go_on: GoOn) -> Submitted:
    """The accepted job of the batch, under its `job_id`; whole, or not there. Raises Refused for an input that cannot
    be run, OSError for want of room here, StoreError."""
    data = batch.data
    assert batch.job_id is not None
    parent = _job_retried(api, batch)
    ask = Ask(
        id=batch.job_id,
        priority=data.priority,
        window_s=max((batch.deadline_ms - now_ms(batch)) / 1000, 1.0),
        metadata=data.metadata or {},
        on_invalid=data.on_invalid,
        retry_of=parent.id if parent else None,
        owner=batch.owner,
        endpoint=data.endpoint,
    )
    with (
        _given(api, batch, go_on) if parent is None else _again(api, batch, parent) as source,
        closing(InvalidLines(Path(tempfile.gettempdir()))) as invalid,
    ):
        try:
            checked = check(source, served, ask, invalid, lambda rows: go_on())
        except InputError as error:
            raise _refused(error.code, str(error)) from None
        _check_room(api, batch, checked)
        return Submitted(put_job(api.store, checked, ask, invalid, go_on), checked)


def model_of(done: Submitted) -> str | None:
    """What answers every row of a job, if that is one thing, and can be told."""
    names = done.job.spec.names
    if done.checked is None:  # another server submitted it
        return None if names.adapters else names.base
    index = done.checked.index
    used = [*index.adapters, *([names.base] if (index.mix < 0).any() else [])]
    return used[0] if len(used) == 1 else None


@contextmanager
def _given(api: Api, batch: Batch, go_on: GoOn) -> Iterator[Input]:
    """The uploaded file, which is read twice and so copied to this machine."""
    contents = Contents(api.shelf)
    try:
        file = contents.find(batch.owner, batch.data.input_file_id)
    except RecordNotFound:
        raise _refused(ErrorCode.INVALID_REQUEST, "the input file was deleted before it was read") from None
    with tempfile.TemporaryDirectory() as folder:
        # Of its name only the end matters, and no more of it may become a path.
        path = Path(folder, "input").with_suffix("".join(s for s in (".gz", ".zst") if file.filename.endswith(s)))
        with path.open("wb") as copy:
            for piece in contents.read(file):
                go_on()
                copy.write(piece)
        try:
            with open_input(str(path), folder, max_bytes=api.limits.unpacked_bytes) as source:
                source.name = file.filename
                yield source
        except InputError as error:
            raise _refused(error.code, str(error).replace(str(path), file.filename)) from None


@contextmanager
def _again(api: Api, batch: Batch, parent: Job) -> Iterator[Input]:
    """The rows of the batch that this one retries."""
    wanted = without_answer(api.store, parent, failed_only=batch.data.failed_only)
    with input_of(api.store, parent, wanted) as (source, rows):
        if not rows:
            message = "the rows that failed were invalid lines, and are not kept: correct them and submit them again"
            raise _refused(ErrorCode.EMPTY_FILE, message)
        yield source


def _job_retried(api: Api, batch: Batch) -> Job | None:
    if batch.data.retry_of is None:
        return None
    try:
        return api.store.job(Book(api.shelf).get(batch.data.retry_of).job_id or "")
    except (RecordNotFound, JobNotFound):
        raise _refused(ErrorCode.INVALID_REQUEST, "the rows to be retried are not kept any more") from None


def _check_room(api: Api, batch: Batch, checked: Checked) -> None:
    """Raises Refused for more rows than the owner may have waiting."""
    others, most, rows = Book(api.shelf).usage(batch.owner).size, batch.data.pending_rows, checked.index.total_rows
    if others + rows > most:
        message = f"{rows:,} rows and {others:,} of your other open batches are more than the {most:,} that may be open"
        raise _refused(ErrorCode.TOO_MANY_TASKS, message)


def _refused(code: ErrorCode, message: str) -> Refused:
    return Refused([JobError(code=code, message=message)], message)
