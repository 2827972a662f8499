"""`loramill retry`: the rows of a job that have no answer, as a new job."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from typing import BinaryIO, cast

import click
import numpy as np
from numpy.typing import NDArray

from loramill.producer.ask import Ask
from loramill.producer.collect import Seen, batches, put_lines, retries_of, stored_lines
from loramill.producer.interrupts import Interrupts
from loramill.producer.outcomes import in_words, why_refused
from loramill.producer.progress import note
from loramill.producer.reader import Input
from loramill.producer.served import published
from loramill.producer.spool import Spool, write_all
from loramill.producer.store_options import StoreOptions, store_of
from loramill.producer.submit import submit
from loramill.producer.waiting import chunks
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.records import Job


def retry_command(options: StoreOptions, job_id: str, *, failed_only: bool, json: bool) -> ExitCode:
    """Carries out `loramill retry`: prints the new job's id. Raises Failure."""
    with store_of(options) as store, Interrupts():
        job = store.job(job_id)
        if before := earlier(store, job):
            note(before)
        new = retry(store, job, failed_only=failed_only)
    if new is None:
        note(f"{in_words(job)}; there is nothing to retry")
    else:
        note(f"{new.total:,} rows of job {job.id} are submitted again as job {new.id}")
    if json:
        click.echo(dumps({"id": new and new.id, "rows": new.total if new else 0, "retry_of": job.id}))
    elif new is not None:
        click.echo(new.id)
    return ExitCode.OK


def retry(store: JobStore, job: Job, *, failed_only: bool = False) -> Job | None:
    """A new job of the rows without an answer, checked against what is served today; None if there is no such row.

    It has the same seed, so rows that are sampled get the tokens that they would have got. Raises Failure (INPUT) for
    a job that has not ended, or whose lines are not valid any more; StoreError.
    """
    check_retry(job)
    with input_of(store, job, without_answer(store, job, failed_only=failed_only)) as (source, rows):
        if not rows:
            return None
        spec = job.spec
        ask = Ask(
            priority=spec.priority, window_s=spec.window_s, metadata=spec.metadata, seed=spec.seed,
            dedupe=spec.dedupe, retry_of=job.id,
        )  # fmt: skip
        return submit(store, source, ask, lambda: published(store, spec.names.base)).job


def check_retry(job: Job) -> None:
    """Raises Failure (INPUT) for a job that cannot be retried."""
    if job.status is JobStatus.FAILED:
        raise Failure(ExitCode.INPUT, *why_refused(job), f"{in_words(job)}: correct its lines and submit them again")
    if not job.status.ended:
        raise Failure(ExitCode.INPUT, f"{in_words(job)}: only a job that has ended can be retried; cancel it, or wait")


def without_answer(store: JobStore, job: Job, *, failed_only: bool) -> NDArray[np.bool_]:
    """(rows of the job,) whether the row failed or, without `failed_only`, never ran."""
    seen = Seen(job.total)
    failed, answered = np.zeros(job.total, np.bool_), np.zeros(job.total, np.bool_)
    for chunk in chunks(store, job):
        index = chunk.index[seen.first(chunk)]
        failed[index["row"]] = index["failed"] != 0
        answered[index["row"]] = index["failed"] == 0
    return failed if failed_only else ~answered


@contextmanager
def input_of(store: JobStore, job: Job, wanted: NDArray[np.bool_]) -> Iterator[tuple[Input, int]]:
    """The lines of the `wanted` rows in the job's order, as an input to submit, and how many there are. Lines that were
    skipped as invalid are not stored, and not among them."""
    with tempfile.TemporaryFile() as any_order, tempfile.TemporaryFile() as in_order:
        spool = Spool(job.total, cast(BinaryIO, any_order))
        for batch in batches(stored_lines(store, job, wanted)):
            put_lines(spool, batch, failed=False)
        rows = np.flatnonzero(spool.has)
        write_all(spool.lines(rows), in_order.write)
        in_order.flush()
        yield Input(f"retry of {job.id}", in_order), len(rows)


def earlier(store: JobStore, job: Job) -> str | None:
    """What is to be said of a job that was retried before."""
    ids = [one.id for one in retries_of(store, job) if one.spec.retry_of == job.id]
    if not ids:
        return None
    return f"job {job.id} was retried before, as {', '.join(ids)}: rows that those answer are run again"
