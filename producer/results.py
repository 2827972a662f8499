"""`loramill results`: a job's rows into files in input order, or as they come."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from loramill.producer.collect import Seen, assemble, assemble_errors, pick, put, put_never_run, put_retries, retries_of
from loramill.producer.interrupts import Interrupts
from loramill.producer.outcomes import as_data, exit_code, in_words, why_refused
from loramill.producer.progress import Moment, Progress, note
from loramill.producer.spool import Spool, write_all
from loramill.producer.store_options import StoreOptions, as_failures, store_of
from loramill.producer.targets import check_target, errors_beside, refuse_clashes, refuse_existing
from loramill.producer.waiting import Patience, chunks, follow
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.packing import Chunk
from loramill.store.records import Job

Rows = NDArray[np.int64]
_STDOUT = Path("-")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsOptions(StoreOptions):
    """Which rows of which job go where."""

    job_id: str
    output: Path = _STDOUT
    errors: Path | None = None
    follow: bool = False
    errors_only: bool = False
    partial: bool = False
    with_retries: bool = False
    overwrite: bool = False
    json: bool = False
    quiet: bool = False

    @property
    def to_stdout(self) -> bool:
        """Whether there is no output file."""
        return self.output == _STDOUT

    @property
    def errors_path(self) -> Path | None:
        """Where failed rows go, if not to the output."""
        if self.errors is not None or self.to_stdout or self.errors_only:
            return self.errors
        return errors_beside(self.output)

    @property
    def follows_file(self) -> bool:
        """Whether rows go to `part` as they come."""
        return self.follow and not self.to_stdout

    @property
    def part(self) -> Path:
        """What is followed: lines as they were committed, until the output is whole."""
        output = self.output.resolve()
        return output.with_name(output.name + ".part")


def results(options: ResultsOptions) -> ExitCode:
    """Carries out `loramill results`. Raises Failure."""
    _check_flags(options)
    with store_of(options) as store, Interrupts():
        job = store.job(options.job_id)
        _check_job(job, options)
        _check_files(options)
        try:
            with _spooled(options) as file:
                spool = Spool(job.total, file)
                job = _gather(store, job, spool, options)
                retries = retries_of(store, job) if options.with_retries else []
                for said in put_retries(store, job, spool, retries):
                    note(said, quiet=options.quiet)
                never_run = put_never_run(store, job, spool)
                _write(spool, never_run, options)
        except KeyboardInterrupt:
            kept = f"; the rows so far are in {options.part}" if options.follows_file and options.part.exists() else ""
            goes_on = "" if job.status.ended else f": job {job.id} goes on"
            raise Failure(ExitCode.INTERRUPTED, f"interrupted{goes_on}{kept}") from None
    return _report(job, spool, len(never_run), options)


def _check_flags(options: ResultsOptions) -> None:
    for one, other in (("follow", "partial"), ("follow", "with_retries"), ("errors_only", "errors")):
        if getattr(options, one) and getattr(options, other):
            flags = " and ".join("--" + name.replace("_", "-") for name in (one, other))
            raise Failure(ExitCode.USAGE, f"{flags} do not go together")
    if options.json and options.to_stdout:
        raise Failure(ExitCode.USAGE, "--json prints on stdout: give -o OUT for the rows")


def _check_job(job: Job, options: ResultsOptions) -> None:
    if job.status is JobStatus.FAILED:
        raise Failure(ExitCode.INPUT, *why_refused(job), in_words(job))
    if job.status is JobStatus.VALIDATING:
        raise Failure(ExitCode.INPUT, f"job {job.id} is still being submitted: there are no results yet")
    if not job.status.ended and not options.follow and not options.partial:
        how = f"--follow writes rows as they finish, --partial those that have, `loramill wait {job.id}` waits"
        raise Failure(ExitCode.INPUT, f"{in_words(job)}: {how}")


def _check_files(options: ResultsOptions) -> None:
    files = {} if options.to_stdout else {"--output": options.output}
    if options.errors_path is not None:
        files["--errors"] = options.errors_path
    refuse_clashes(files)
    for flag, path in files.items():
        check_target(flag, path)
    refuse_existing(files.values(), overwrite=options.overwrite)


@contextmanager
def _spooled(options: ResultsOptions) -> Iterator[BinaryIO]:
    """The file that rows gather in, beside the output: a disk that has room for the one is wanted anyway. What goes
    wrong with the disk is a Failure (MACHINE)."""
    folder = Path(tempfile.gettempdir()) if options.to_stdout else options.output.resolve().parent
    try:
        with (
            as_failures(),
            options.part.open("w+b") if options.follows_file else tempfile.TemporaryFile(dir=folder) as file,
        ):
            yield cast(BinaryIO, file)
    except BrokenPipeError:
        # Whoever read our stdout has seen enough; what Python would flush at its end has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Failure(ExitCode.MACHINE, "stdout was closed before all rows were written") from None
    except OSError as error:
        raise Failure(ExitCode.MACHINE, f"{error.filename or folder}: {error.strerror or error}") from error


def _gather(store: JobStore, job: Job, spool: Spool, options: ResultsOptions) -> Job:
    """Reads every chunk into the spool, and on while the job does with --follow; the job as it was last seen."""
    seen, last = Seen(job.total), job
    tell = _tell_stdout(options) if options.follow and options.to_stdout else None
    # On a terminal the rows themselves are the progress.
    silent = options.quiet or not options.follow or (options.to_stdout and sys.stdout.isatty())
    with Progress(job.total, quiet=silent) as progress:

        def look(now: Job) -> None:
            nonlocal last
            last = now
            progress.update(Moment(now.completed + now.failed, now.failed, now.prompt_tokens, now.completion_tokens))

        if options.follow:
            patience = Patience(say=lambda text: note(text, quiet=options.quiet))
            source = follow(store, job.id, patience, look)
        else:
            source = chunks(store, job)
        for chunk in source:
            new = pick(chunk, seen.first(chunk))
            put(spool, new)
            if tell:
                tell(new)
    return last


def _tell_stdout(options: ResultsOptions) -> Callable[[Chunk], None]:
    out = sys.stdout.buffer

    def tell(chunk: Chunk) -> None:
        wanted = (chunk.index["failed"] != 0) == options.errors_only
        out.write(pick(chunk, wanted).lines)
        out.flush()

    return tell


def _write(spool: Spool, never_run: Rows, options: ResultsOptions) -> None:
    """Puts the error file and then the output in place, each whole."""
    failed, answered = np.flatnonzero(spool.failed), np.flatnonzero(spool.answered)
    errors = options.errors_path
    if errors is not None:
        assemble_errors(spool, errors)
    wanted = failed if options.errors_only else answered
    if not options.to_stdout:
        assemble(spool, wanted, options.output)
        return
    if options.follow:  # all others went out as they came
        wanted = never_run if options.errors_only else wanted[:0]
    write_all(spool.lines(wanted), sys.stdout.buffer.write)
    sys.stdout.buffer.flush()


def _report(job: Job, spool: Spool, never_run: int, options: ResultsOptions) -> ExitCode:
    failed, answered = int(spool.failed.sum()) - never_run, int(spool.answered.sum())
    has_errors = options.errors_path is not None and failed + never_run > 0
    if options.json:
        said = as_data(job) | {
            "answered": answered,
            "failed": failed,
            "never_run": never_run,
            "output": str(options.output),
            "errors_output": str(options.errors_path) if has_errors else None,
        }
        print(json.dumps(said), flush=True)
    where = "" if options.to_stdout else f" -> {options.output}"
    rest = [f"{failed:,} failed"] + [f"{never_run:,} never ran ({job.status})"] * bool(never_run)
    errors = f" -> {options.errors_path}" if has_errors else ""
    if options.errors_only:
        note(f"{', '.join(rest)}{where}", quiet=options.quiet)
    else:
        hint = "; --errors-only prints them" if options.to_stdout and not errors and failed + never_run else ""
        note(f"{answered:,} answered{where}; {', '.join(rest)}{errors}{hint}", quiet=options.quiet)
    if options.with_retries and not never_run:
        return ExitCode.ROWS_FAILED if failed else ExitCode.OK
    return exit_code(job)
