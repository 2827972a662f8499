"""`loramill run`: one job, from the input file to the output file, by engines of this process's own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from loramill.producer.explain import explain
from loramill.producer.index import Index
from loramill.producer.interrupts import Interrupts
from loramill.producer.invalid import InvalidLines, refused
from loramill.producer.options import RunOptions
from loramill.producer.outputs import check_outputs, refuse_existing
from loramill.producer.progress import counter, note
from loramill.producer.reader import Input, InputError, open_input
from loramill.producer.run_devices import OnDevices
from loramill.producer.run_engines import devices_of
from loramill.producer.run_here import Here
from loramill.producer.run_job import RunJob, Way, open_journal
from loramill.producer.summary import Summary
from loramill.producer.validate import validate
from loramill.schemas.failures import ExitCode, Failure
from loramill.store.errors import JournalBusy, StoreError
from loramill.worker.base_files import silence_libraries
from loramill.worker.devices import Device
from loramill.worker.models import Models, open_models

_RESUMES = "what is committed stays, and the same command resumes"


def run_file(options: RunOptions, started_s: float) -> ExitCode:
    """Carries out `loramill run`, begun at `started_s` (time.monotonic). Raises Failure with the exit code of whatever
    went wrong."""
    silence_libraries()
    folder = options.output.parent
    with Interrupts() as interrupts, _as_failures(folder):
        devices = devices_of(options)
        if not options.explain:
            check_outputs(options)
        models = open_models(options, all_or_nothing=options.on_invalid == "fail")
        with open_input(options.input, str(folder)) as source, closing(InvalidLines(folder)) as invalid:
            interrupts.check()
            index = _check(source, models, options, invalid)
            interrupts.check()
            job = RunJob(options, models, source, index, invalid)
            with closing(_way(job, devices)) as way:
                if options.explain:
                    return _explain(job, way)
                summary = _finish(job, way, interrupts)
    summary.total_s = time.monotonic() - started_s
    return _report(summary, options)


def _check(source: Input, models: Models, options: RunOptions, invalid: InvalidLines) -> Index:
    """Every line checked. Raises Failure (INPUT) with what is wrong, all of it together."""
    skip = options.on_invalid == "skip"
    index = validate(
        source,
        models.prompter,
        names=models.names,
        max_mix=models.slots,
        max_rows=options.limit,
        on_invalid=invalid.add if skip else None,
        on_progress=counter(f"checked {{}} lines of {source.name}", quiet=options.quiet),
    )
    if index.problem_count and not skip:
        raise refused(index, source.name, "nothing was run; --on-invalid skip runs the others")
    for warning in models.warnings:
        note(f"Warning: {warning}", quiet=options.quiet)
    for name, problems in models.unusable.items():
        rows = "the rows that name it are invalid" if skip else "no row names it"
        note(f"Warning: adapter `{name}` cannot be served, {rows}: {'; '.join(problems)}", quiet=options.quiet)
    return index


def _way(job: RunJob, devices: Sequence[Device]) -> Way:
    """Here, or on the devices. Raises Failure, StoreError."""
    options = job.options
    # What is only explained, and was not begun or is to begin afresh, has no journal.
    has_none = options.explain and (options.overwrite or not options.journal_path.exists())
    journal = None if has_none else open_journal(job)
    if not options.devices:
        return Here(job, journal)
    try:
        return OnDevices(job, journal, devices)
    except BaseException:
        if journal is not None:
            journal.close()
        raise


def _finish(job: RunJob, way: Way, interrupts: Interrupts) -> Summary:
    """Runs what is not finished, and puts the result files in place."""
    options, index = job.options, job.index
    summary = Summary(rows=index.total_rows, invalid=index.problem_count, resumed=way.totals().done)
    try:
        if summary.resumed < summary.rows:
            # Only a finished job explains an output that is there already: a kill right before the end.
            refuse_existing(options)
            way.answer(summary, interrupts)
        totals = way.totals()
        if totals.done < summary.rows:
            raise KeyboardInterrupt
        way.publish()
    except KeyboardInterrupt:
        kept = f"{way.totals().done:,} of {summary.rows:,} rows are done and kept"
        raise Failure(ExitCode.INTERRUPTED, f"interrupted: {kept}; the same command resumes") from None
    summary.failed, summary.prompt_tokens = totals.failed, totals.prompt_tokens
    summary.completion_tokens = totals.completion_tokens
    summary.output, summary.errors = str(options.output), str(options.errors_path) if totals.failed else None
    return summary


def _explain(job: RunJob, way: Way) -> ExitCode:
    """Prints what the command would do, without doing it: of a job that was begun, with what it has left."""
    left = np.flatnonzero(~way.done()[job.index.row])
    if not len(left):
        raise Failure(ExitCode.INPUT, "there is no row to run")
    plan = way.describe(left)
    print(json.dumps(plan) if job.options.json else explain(plan), flush=True)
    return ExitCode.OK


def _report(summary: Summary, options: RunOptions) -> ExitCode:
    where = f" -> {summary.errors}" if summary.errors else ""
    done = f"{summary.rows:,} rows in {summary.total_s:,.1f} s -> {summary.output}; {summary.failed:,} failed{where}"
    note(done, quiet=options.quiet)
    if options.json:
        print(summary.as_json(), flush=True)
    return ExitCode.ROWS_FAILED if summary.failed and not options.allow_failures else ExitCode.OK


@contextmanager
def _as_failures(folder: Path) -> Iterator[None]:
    """What can go wrong below, as the exit code and the one line that a person needs; files are written in `folder`."""
    try:
        yield
    except InputError as error:
        raise Failure(ExitCode.INPUT, str(error)) from error
    except JournalBusy as error:
        raise Failure(ExitCode.MACHINE, str(error)) from error
    except StoreError as error:
        raise Failure(ExitCode.MACHINE, f"{error}; {_RESUMES}") from error
    except OSError as error:
        where = error.filename or folder
        raise Failure(ExitCode.MACHINE, f"{where}: {error.strerror or error}; {_RESUMES}") from error
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; torch itself is the worker's.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            advice = "try a smaller --max-num-seqs, --max-num-batched-tokens or --kv-cache-memory"
            raise Failure(ExitCode.MACHINE, f"out of memory: {_first_line(error)}; {advice}; {_RESUMES}") from error
        raise Failure(ExitCode.MACHINE, f"the device failed: {_first_line(error)}; {_RESUMES}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
