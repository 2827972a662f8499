"""`loramill submit` and `loramill validate` carried out: one line or object on stdout, words on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from loramill.producer.announce import announce
from loramill.producer.interrupts import Interrupts
from loramill.producer.invalid import InvalidLines
from loramill.producer.jobs import until_ended
from loramill.producer.outcomes import in_words
from loramill.producer.progress import counter, note
from loramill.producer.reader import Input, InputError, open_input
from loramill.producer.served import Served, opened_here, published
from loramill.producer.store_options import store_of
from loramill.producer.submit import Checked, Submitted, check, submit
from loramill.producer.submit_options import SubmitOptions
from loramill.schemas.failures import ExitCode, Failure
from loramill.store.contract import JobStore
from loramill.worker.base_files import silence_libraries


def submit_file(options: SubmitOptions) -> ExitCode:
    """Carries out `loramill submit`. Raises Failure."""
    ask = options.ask
    with Interrupts() as interrupts, store_of(options, create=True) as store:
        with _input(options) as source:
            interrupts.check()
            done = submit(store, source, ask, lambda: _served(store, options, publish=True), _progress(options))
        hindered = announce(done, store, options.store or "", prefix=options.store_prefix, broker=options.broker)
        if hindered:
            note(hindered, quiet=options.quiet)
        _report(done, options)
        return until_ended(store, done.job.id) if options.wait else ExitCode.OK


def validate_file(options: SubmitOptions) -> ExitCode:
    """Carries out `loramill validate`: without a store, if the model is given. Raises Failure."""
    without = options.model is not None and not options.store
    with Interrupts() as interrupts, nullcontext() if without else store_of(options) as store:
        with _input(options) as source, closing(InvalidLines(Path(gettempdir()))) as invalid:
            interrupts.check()
            served = _served(store, options, publish=False)
            try:
                checked = check(source, served, options.ask, invalid, _progress(options), "nothing is submitted")
            except Failure as failure:
                if options.json:
                    print(json.dumps({"valid": False, "problems": list(failure.lines)}), flush=True)
                raise
        _say(checked, options, f"{source.name}: {len(checked.index):,} rows, all valid")
    if options.json:
        print(json.dumps({"valid": True, **_numbers(checked)}), flush=True)
    return ExitCode.OK


@contextmanager
def _input(options: SubmitOptions) -> Iterator[Input]:
    try:
        with open_input(options.input, gettempdir()) as source:
            yield source
    except InputError as error:
        raise Failure(ExitCode.INPUT, str(error)) from error
    except OSError as error:
        raise Failure(ExitCode.MACHINE, f"{error.filename or gettempdir()}: {error.strerror or error}") from error


def _served(store: JobStore | None, options: SubmitOptions, *, publish: bool) -> Served:
    silence_libraries()
    if options.model is not None:
        served = opened_here(options.model, store, publish=publish)
    else:
        assert store is not None  # only with a model of its own does validate go without
        served = published(store, options.base)
    for warning in served.warnings:
        note(f"Warning: {warning}", quiet=options.quiet)
    return served


def _progress(options: SubmitOptions) -> Callable[[int], None]:
    return counter(f"checked {{}} lines of {options.input}", quiet=options.quiet)


def _report(done: Submitted, options: SubmitOptions) -> None:
    job, checked = done.job, done.checked
    if checked is None:
        note(f"nothing is submitted, it was before: {in_words(job)}", quiet=options.quiet)
    else:
        _say(checked, options, f"job {job.id}: {job.total:,} rows in {job.shards:,} shards")
    if options.json:
        said = {"id": job.id, "rows": job.total, "shards": job.shards, "status": str(job.status)}
        said |= {"submitted_before": checked is None, "invalid": 0 if checked is None else checked.index.problem_count}
        if checked is not None:
            said |= _numbers(checked)
        print(json.dumps(said), flush=True)
    else:
        print(job.id, flush=True)


def _say(checked: Checked, options: SubmitOptions, what: str) -> None:
    invalid = f", {checked.index.problem_count:,} of them invalid" if checked.index.problem_count else ""
    note(f"{what}{invalid}", quiet=options.quiet)
    note(checked.able().in_words(checked.names), quiet=options.quiet)


def _numbers(checked: Checked) -> dict[str, Any]:
    index = checked.index
    return {
        "rows": index.total_rows,
        "invalid": index.problem_count,
        "shards": len(checked.shards),
        "base": checked.served.offer.names.base,
        "adapters": index.adapters,
        "prompt_tokens": int(index.prompt_tokens.sum()),
        "workers": checked.able().as_data(checked.names),
    }
