"""`loramill run`: one job in this process, from the input file to the output file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loramill.producer.explain import explain
from loramill.producer.index import Index
from loramill.producer.interrupts import Interrupts
from loramill.producer.invalid import InvalidLines, refused
from loramill.producer.local import LocalEngine
from loramill.producer.options import RunOptions
from loramill.producer.outputs import check_outputs, publish, refuse_existing
from loramill.producer.progress import Moment, Progress, counter, note
from loramill.producer.reader import Input, InputError, open_input
from loramill.producer.summary import Summary
from loramill.producer.validate import validate
from loramill.schemas.failures import ExitCode, Failure
from loramill.store.errors import JournalBusy, JournalDamaged, JournalMismatch, StoreError
from loramill.store.journal import DoneRow, Journal, remove_journal
from loramill.worker.base_files import silence_libraries
from loramill.worker.models import Models, open_models

_COMMIT_ROWS = 4096
_RESUMES = "what is committed stays, and the same command resumes"


@dataclass(slots=True, frozen=True)
class _Job:
    """A checked job, and the journal that says how much of it is done."""

    id: str
    options: RunOptions
    models: Models
    source: Input
    index: Index
    journal: Journal


def run_file(options: RunOptions, started_s: float) -> ExitCode:
    """Carries out `loramill run`, begun at `started_s` (time.monotonic). Raises Failure with the exit code of whatever
    went wrong."""
    silence_libraries()
    folder = options.output.parent
    with Interrupts() as interrupts, _as_failures(folder):
        if not options.explain:
            check_outputs(options)
        models = open_models(options, all_or_nothing=options.on_invalid == "fail")
        with open_input(options.input, str(folder)) as source, closing(InvalidLines(folder)) as invalid:
            interrupts.check()
            index = _check(source, models, options, invalid)
            interrupts.check()
            if options.explain:
                return _explain(options, models, source, index)
            with closing(_open_journal(options, source, models, index)) as journal:
                job = _Job(journal.identity_sha256, options, models, source, index, journal)
                summary = _finish(job, invalid, interrupts)
    summary.total_s = time.monotonic() - started_s
    return _report(summary, options)


def _check(source: Input, models: Models, options: RunOptions, invalid: InvalidLines) -> Index:
    """Every line checked. Raises Failure (INPUT) with what is wrong, all of it together."""
    skip = options.on_invalid == "skip"
    index = validate(
        source,
        models.prompter,
        names=models.names,
        max_mix=options.max_loras_per_batch,
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


def _open_journal(options: RunOptions, source: Input, models: Models, index: Index) -> Journal:
    """The journal of this very job. Raises Failure (INPUT) for another's, unless it may be replaced."""
    identity = {
        "input": source.sha256,
        "--limit": str(options.limit),
        "--base-name": models.names.base,
        "--lora-mode": options.lora_mode,
        **models.identity(index.adapters),
    }
    try:
        return Journal(options.journal_path, identity)
    except (JournalMismatch, JournalDamaged) as error:
        if not options.overwrite:
            code = ExitCode.INPUT if isinstance(error, JournalMismatch) else ExitCode.MACHINE
            raise Failure(code, f"{error}; pass --overwrite to start afresh") from error
    remove_journal(options.journal_path)
    return Journal(options.journal_path, identity)


def _finish(job: _Job, invalid: InvalidLines, interrupts: Interrupts) -> Summary:
    """Runs what the journal lacks, and puts the result files in place."""
    journal, options, index = job.journal, job.options, job.index
    summary = Summary(rows=index.total_rows, invalid=index.problem_count, resumed=journal.totals().done)
    try:
        if summary.resumed < summary.rows:
            # Only a finished journal explains an output that is there already: a kill right before its removal.
            refuse_existing(options)
            _commit(journal, invalid.rows(job.id))
            _answer(job, summary, interrupts)
        totals = journal.totals()
        if totals.done < summary.rows:
            raise KeyboardInterrupt
        publish(journal, options)
    except KeyboardInterrupt:
        kept = f"{journal.totals().done:,} of {summary.rows:,} rows are done and kept"
        raise Failure(ExitCode.INTERRUPTED, f"interrupted: {kept}; the same command resumes") from None
    summary.failed, summary.prompt_tokens = totals.failed, totals.prompt_tokens
    summary.completion_tokens = totals.completion_tokens
    summary.output, summary.errors = str(options.output), str(options.errors_path) if totals.failed else None
    return summary


def _answer(job: _Job, summary: Summary, interrupts: Interrupts) -> None:
    """Runs the rows that are not done, until they are or an interrupt asks to stop."""
    index, quiet = job.index, job.options.quiet
    left = np.flatnonzero(~job.journal.done(index.total_rows)[index.row])
    if not len(left):
        return
    before = f", {summary.resumed:,} done before" if summary.resumed else ""
    note(f"{summary.rows:,} rows{before}, {len(index.adapters)} adapters: loading the base", quiet=quiet)
    load_started_s = time.monotonic()
    engine = _load(job.models, job.options, index, left)
    run_started_s = time.monotonic()
    plan = engine.plan(index, left, job.models.names, job.journal.decisions())
    job.journal.decide(plan.decisions)
    for line in plan.summary():
        note(line, quiet=quiet)
    totals = job.journal.totals()
    rows_done, rows_failed = totals.done, totals.failed

    def commit(rows: list[DoneRow]) -> None:
        nonlocal rows_done, rows_failed
        job.journal.commit(rows)
        rows_done += len(rows)
        rows_failed += sum(row.failed for row in rows)

    def show() -> None:
        stats = engine.stats
        tokens = (stats.prompt_tokens, stats.completion_tokens)
        progress.update(Moment(rows_done, rows_failed, *tokens, stats.resident))

    shard = engine.shard(job.source, index, left, plan, names=job.models.names, job_id=job.id, emit=commit)
    with closing(engine), Progress(summary.rows, quiet=quiet) as progress, interrupts.draining():
        engine.run(shard, stopping=lambda: interrupts.requested, on_step=show)
    summary.load_s = run_started_s - load_started_s
    summary.run_s = time.monotonic() - run_started_s
    summary.count(asdict(engine.stats), list(plan.decisions.values()))


def _load(models: Models, options: RunOptions, index: Index, left: NDArray[np.int64]) -> LocalEngine:
    longest = int((index.prompt_tokens + index.max_tokens)[left].max())
    return LocalEngine(models, options, longest_row=longest, adapters=index.adapters)


def _explain(options: RunOptions, models: Models, source: Input, index: Index) -> ExitCode:
    """Prints what the command would do, without doing it: of a job that was begun, with what it has left."""
    left, decided = np.arange(len(index)), dict[str, str]()
    if options.journal_path.exists() and not options.overwrite:
        with closing(_open_journal(options, source, models, index)) as journal:
            left = np.flatnonzero(~journal.done(index.total_rows)[index.row])
            decided = journal.decisions()
    if not len(left):
        raise Failure(ExitCode.INPUT, "there is no row to run")
    with closing(_load(models, options, index, left)) as engine:
        plan = engine.plan(index, left, models.names, decided, timed=True).describe()
    print(json.dumps(plan) if options.json else explain(plan), flush=True)
    return ExitCode.OK


def _commit(journal: Journal, rows: Iterator[DoneRow]) -> None:
    while some := list(islice(rows, _COMMIT_ROWS)):
        journal.commit(some)


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
