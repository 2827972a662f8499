"""`loramill submit` and `loramill validate`: options in, one line or object on stdout, words on stderr."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from loramill.producer.ask import MAX_JOB_BYTES, MAX_JOB_ROWS, Ask, OnInvalid
from loramill.producer.durations import seconds_of
from loramill.producer.interrupts import Interrupts, held
from loramill.producer.progress import counter, note
from loramill.producer.store_options import STORE_FLAGS, StoreOptions, as_failures, store_of
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.settings import MODEL_FLAGS, POSITIVE, ModelOptions, flag, flagged, size

if TYPE_CHECKING:
    from loramill.producer.served import Served
    from loramill.producer.submit import Checked, Submitted
    from loramill.store.contract import JobStore


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions(StoreOptions):
    """One submit or validate, as the person asked for it."""

    input: str
    base: str | None = None
    limit: int | None = None
    on_invalid: str = "fail"
    job_id: str | None = None
    priority: int = 0
    window_s: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    no_dedupe: bool = False
    max_job_rows: int = MAX_JOB_ROWS
    max_job_bytes: int | None = MAX_JOB_BYTES
    wait: bool = False
    json: bool = False
    quiet: bool = False
    seed: int = 0
    model: ModelOptions | None = None
    """Opened here, where that is asked for."""

    @property
    def ask(self) -> Ask:
        """Raises Failure (USAGE)."""
        named = {} if self.job_id is None else {"id": self.job_id}
        try:
            return Ask(
                **named,
                priority=self.priority,
                window_s=self.window_s,
                metadata=self.metadata,
                seed=self.seed,
                dedupe=not self.no_dedupe,
                on_invalid=cast(OnInvalid, self.on_invalid),
                limit=self.limit,
                max_rows=self.max_job_rows,
                max_bytes=self.max_job_bytes or MAX_JOB_BYTES,
            )
        except ValueError as error:
            raise Failure(ExitCode.USAGE, str(error)) from error


def _options_of(given: dict[str, Any]) -> SubmitOptions:
    """Those of the model, if one is given, in an object of their own."""
    model = {one.name: given.pop(one.name) for one in fields(ModelOptions) if one.name in given}
    if model["base_model"] is None:
        sources = ("adapters", "adapters_json", "adapters_dir", "adapters_file")
        if any(model[name] for name in sources):
            raise Failure(ExitCode.USAGE, "adapters are given without --base-model: what workers serve, they say")
        return SubmitOptions(**given, seed=model["seed"])
    return SubmitOptions(**given, seed=model["seed"], model=ModelOptions(**model))


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Every `KEY=VALUE`."""
    pairs: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or key in pairs:
            why = "is not KEY=VALUE" if not equals else "gives a key twice"
            raise click.BadParameter(f"{value!r} {why}", ctx, param)
        pairs[key] = text
    return pairs


_CHECK_FLAGS = [
    flag("--base", metavar="NAME", help="Which base the rows are for, where workers serve several."),
    flag("--limit", type=POSITIVE, metavar="N", help="Only the first N rows."),
    flag("--max-job-rows", type=POSITIVE, default=MAX_JOB_ROWS, help="Jobs of more rows are refused."),
    flag("--max-job-bytes", callback=size, default="64GiB", metavar="SIZE", help="Jobs of more bytes are refused."),
    flag("--json", is_flag=True, help="Print one JSON object on stdout."),
    flag("--quiet", is_flag=True, help="No progress."),
]
_MODEL_FLAGS = [
    flag("--base-model", metavar="PATH_OR_ID",
         help="Check against this model and publish what it offers, before any worker does; no weights are loaded."),
    *MODEL_FLAGS[1:],
]  # fmt: skip
_SUBMIT_FLAGS = [
    flag("--wait", is_flag=True, help="Wait until it has ended; the exit code says how."),
    flag("--priority", type=int, default=0, help="Higher goes first; from -100 to 100."),
    flag("--window", dest="window_s", callback=seconds_of, metavar="TIME",
         help="What is not finished after so long (4h, 90m) expires."),
    flag("--metadata", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Kept with the job; repeat it."),
    flag("--on-invalid", type=click.Choice(["fail", "skip"]), default="fail",
         help="Invalid lines refuse the whole input, or go to the error file."),
    flag("--no-dedupe", is_flag=True, help="Compute identical rows again and again."),
    flag("--id", dest="job_id", metavar="ID", help="The job's. The same submit again is then the same job."),
]  # fmt: skip
_INPUT = click.argument("input", metavar="FILE")


@click.command()
@_INPUT
@flagged([*STORE_FLAGS, *_SUBMIT_FLAGS, *_CHECK_FLAGS, *_MODEL_FLAGS])
def submit(**given: Any) -> ExitCode:
    """Hands the job lines of FILE (.jsonl, .jsonl.gz, .jsonl.zst, or - for stdin) to the workers.

    Every line is checked first, against what workers say that they serve. Prints the job's id.
    """
    options = _options_of(given)
    ask = options.ask
    with Interrupts() as interrupts, _opened(interrupts), store_of(options, create=True) as store:
        from loramill.producer.reader import open_input
        from loramill.producer.submit import submit as put

        with open_input(options.input, tempfile.gettempdir()) as source:
            done = put(store, source, ask, lambda: _served(store, options, publish=True), _progress(options))
        _report(done, options)
        return _wait(store, done) if options.wait else ExitCode.OK


@click.command()
@_INPUT
@flagged([*STORE_FLAGS, *_CHECK_FLAGS, *_MODEL_FLAGS])
def validate(**given: Any) -> ExitCode:
    """Checks the job lines of FILE as submit does, stores nothing, and says which workers could run them."""
    options = _options_of(given)
    alone = options.model is not None and not options.store
    with Interrupts() as interrupts, _opened(interrupts), nullcontext() if alone else store_of(options) as store:
        from loramill.producer.invalid import InvalidLines
        from loramill.producer.reader import open_input
        from loramill.producer.submit import check

        served = _served(store, options, publish=False)
        folder = tempfile.gettempdir()
        with open_input(options.input, folder) as source, closing(InvalidLines(Path(folder))) as invalid:
            try:
                checked = check(source, served, options.ask, invalid, _progress(options), "the others are valid")
            except Failure as failure:
                if options.json:
                    print(json.dumps({"valid": False, "problems": list(failure.lines)}), flush=True)
                raise
        _say(checked, options, f"{len(checked.index):,} rows are valid")
        if options.json:
            print(json.dumps({"valid": True, **_numbers(checked)}), flush=True)
    return ExitCode.OK


@contextmanager
def _opened(interrupts: Interrupts) -> Iterator[None]:
    """What an input and a tokenizer can end with, as Failures; with the libraries that both need."""
    from loramill.producer.reader import InputError

    with held():
        from loramill.producer import submit as _submit  # noqa: F401 (the import is what may be slow)
    interrupts.check()
    try:
        with as_failures():
            yield
    except InputError as error:
        raise Failure(ExitCode.INPUT, str(error)) from error
    except OSError as error:
        raise Failure(ExitCode.MACHINE, f"{error.filename or tempfile.gettempdir()}: {error.strerror}") from error


def _served(store: JobStore | None, options: SubmitOptions, *, publish: bool) -> Served:
    from loramill.producer.served import opened_here, published
    from loramill.worker.base_files import silence_libraries

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
        note(f"job {job.id} was submitted before, with this very input: it is {job.status}", quiet=options.quiet)
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


def _wait(store: JobStore, done: Submitted) -> ExitCode:
    from loramill.producer.outcomes import exit_code, in_words
    from loramill.producer.waiting import wait_for

    try:
        job = wait_for(store, done.job.id, say=note)
    except KeyboardInterrupt:
        raise Failure(ExitCode.INTERRUPTED, f"interrupted; job {done.job.id} goes on") from None
    note(in_words(job))
    return exit_code(job)
