"""`loramill status`, `watch`, `wait`, `cancel` and `list`: what is asked of jobs that were submitted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import click

from loramill.producer import status as screens
from loramill.producer.interrupts import Interrupts
from loramill.producer.outcomes import as_data, exit_code, in_words, why_refused
from loramill.producer.progress import Moment, Progress, note
from loramill.producer.store_options import StoreOptions, store_of
from loramill.producer.waiting import Patience, looks, wait_for
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.records import Job


def status(options: StoreOptions, job_id: str, *, json: bool) -> ExitCode:
    """Prints how far a job is. Raises Failure."""
    with store_of(options) as store:
        seen = screens.look(store, job_id)
    for line in [screens.as_json(seen)] if json else screens.as_lines(seen):
        click.echo(line)
    return ExitCode.OK


def list_(options: StoreOptions, *, limit: int, json: bool) -> ExitCode:
    """Prints the jobs, the newest first. Raises Failure."""
    with store_of(options) as store:
        jobs = store.jobs(limit=limit)
    for line in map(_json, jobs) if json else screens.table(jobs):
        click.echo(line)
    return ExitCode.OK


def cancel(options: StoreOptions, job_id: str, *, json: bool) -> ExitCode:
    """Asks for a job's end, and says what is kept. Raises Failure."""
    with store_of(options) as store:
        before = store.job(job_id).status
        job = store.cancel(job_id)
    if json:
        click.echo(_json(job))
    done = f"{job.completed + job.failed:,} of {job.total:,} rows are finished and kept"
    if before.ended or before is JobStatus.FINALIZING:
        note(f"{in_words(job)}; there is nothing to cancel")
    elif job.status.ended:
        note(f"job {job.id} is cancelled: {done}; `loramill results {job.id} -o OUT` writes them")
    else:
        note(f"job {job.id} is being cancelled: {done}; rows that run now end within seconds")
    return ExitCode.OK


def wait(options: StoreOptions, job_id: str, *, timeout_s: float | None, json: bool) -> ExitCode:
    """Returns when a job has ended, as it did. Raises Failure."""
    with store_of(options) as store:
        return until_ended(store, job_id, timeout_s, json=json)


def until_ended(store: JobStore, job_id: str, timeout_s: float | None = None, *, json: bool = False) -> ExitCode:
    """Waits for a job, and says how it ended. Raises Failure (WAITED, INTERRUPTED); StoreError like `wait_for`."""
    with _waiting(job_id):
        job = wait_for(store, job_id, timeout_s, say=note)
    return _ended(job, json=json)


def watch(options: StoreOptions, job_id: str, *, json: bool) -> ExitCode:
    """Shows a job until it has ended: a live line on a terminal, else a line now and then; what happens as it does.
    With `json` every change as an object a line. Raises Failure."""
    with store_of(options) as store, _waiting(job_id):
        job = store.job(job_id)
        patience = Patience(say=note)
        with Progress(job.total, quiet=json) as progress:
            said = max((event.number for event in store.events(job_id)), default=0) - screens.EVENTS
            before: Job | None = None
            for job in looks(store, job_id, patience):
                if json and job != before:
                    click.echo(_json(job))
                for event in patience.read(partial(store.events, job_id, max(said, 0))):
                    progress.say(screens.event_line(event))
                    said = event.number
                progress.update(
                    Moment(job.completed + job.failed, job.failed, job.prompt_tokens, job.completion_tokens)
                )
                before = job
    return _ended(job, json=False)


@contextmanager
def _waiting(job_id: str) -> Iterator[None]:
    """What can end a wait that is not the job's end, as a Failure; the job goes on."""
    try:
        with Interrupts():
            yield
    except TimeoutError as error:
        raise Failure(ExitCode.WAITED, str(error)) from None
    except KeyboardInterrupt:
        raise Failure(ExitCode.INTERRUPTED, f"interrupted: job {job_id} goes on") from None


def _ended(job: Job, *, json: bool) -> ExitCode:
    for line in why_refused(job):
        note(line)
    note(in_words(job))
    if json:
        click.echo(_json(job))
    return exit_code(job)


def _json(job: Job) -> str:
    return json.dumps(as_data(job))
