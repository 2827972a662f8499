"""The commands about jobs that were submitted, as the command line has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from loramill.producer.interrupts import held
from loramill.producer.store_options import StoreOptions
from loramill.schemas.failures import ExitCode
from loramill.worker.durations import seconds_of
from loramill.worker.settings import ADAPTER_FLAGS, ALLOW_NOOP, DEVICE, FILE, MAX_RANK, POSITIVE, flag, flagged
from loramill.worker.worker_settings import STORE_FLAGS

_Command = TypeVar("_Command", bound=Callable[..., Any])
_JSON = click.option("--json", is_flag=True, help="Print one JSON object on stdout.")
_EACH_JSON = click.option("--json", is_flag=True, help="Print a JSON object a line on stdout.")
_ID = click.argument("job_id", metavar="ID")
_QUIET = click.option("--quiet", is_flag=True, help="No progress.")


def _about_jobs(*more: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    return flagged([*more, *STORE_FLAGS])


def _store(given: dict[str, Any]) -> StoreOptions:
    """Takes the store's flags out of what was given."""
    return StoreOptions(**{name: given.pop(name) for name in ("store", "files", "store_prefix")})


@click.command()
@_about_jobs(_ID, _JSON)
def status(**given: Any) -> ExitCode:
    """How far a job is: rows, tokens, rates, who runs it."""
    with held():
        from loramill.producer import jobs
    return jobs.status(_store(given), **given)


@click.command("list")
@_about_jobs(click.option("--limit", type=POSITIVE, default=20, show_default=True, help="At most so many."), _EACH_JSON)
def list_(**given: Any) -> ExitCode:
    """The jobs, the newest first."""
    with held():
        from loramill.producer import jobs
    return jobs.list_(_store(given), **given)


@click.command()
@_about_jobs(_ID, click.option("--json", is_flag=True, help="Print every change as a JSON object a line on stdout."))
def watch(**given: Any) -> ExitCode:
    """Shows a job until it has ended. Exits as `wait` does."""
    with held():
        from loramill.producer import jobs
    return jobs.watch(_store(given), **given)


@click.command()
@_about_jobs(
    _ID,
    click.option("--timeout", "timeout_s", callback=seconds_of, metavar="TIME",
                 help="Give up after that, such as 90, 90s, 5m, 4h or 1d: exit code 124."),
    _JSON,
)  # fmt: skip
def wait(**given: Any) -> ExitCode:
    """Returns when a job has ended: 0 all rows answered, 3 some failed, 4 its input was refused, 5 cancelled,
    6 expired."""
    with held():
        from loramill.producer import jobs
    return jobs.wait(_store(given), **given)


@click.command()
@_about_jobs(_ID, _JSON)
def cancel(**given: Any) -> ExitCode:
    """Starts no more rows of a job. What is finished stays."""
    with held():
        from loramill.producer import jobs
    return jobs.cancel(_store(given), **given)


@click.command()
@_about_jobs(
    _ID,
    click.option("-o", "--output", type=FILE, default=Path("-"), metavar="OUT",
                 help="Result lines, in input order; .gz and .zst are compressed.  [default: -, which is stdout]"),
    click.option("--errors", type=FILE, metavar="FILE",
                 help="Failed rows.  [default: OUT with .errors before .jsonl; none with -o -]"),
    click.option("--follow", is_flag=True,
                 help="Write rows as they finish, to stdout or OUT.part, until the job has ended; then OUT, in order."),
    click.option("--partial", is_flag=True, help="What there is of a job that goes on."),
    click.option("--errors-only", is_flag=True, help="Only the failed rows, to OUT."),
    click.option("--with-retries", is_flag=True, help="With the answers of the job's retries in their places."),
    click.option("--overwrite", is_flag=True, help="Replace files that exist."),
    click.option("--json", is_flag=True, help="Print one JSON object with the counts on stdout at the end."),
    _QUIET,
)  # fmt: skip
def results(**given: Any) -> ExitCode:
    """The rows of a job that has ended. Exits as `wait` does."""
    with held():
        from loramill.producer import results as module
    return module.results(module.ResultsOptions(**given))


@click.command()
@_about_jobs(
    _ID,
    click.option("--failed-only", is_flag=True, help="Not those that a cancelled or expired job never ran."),
    _JSON,
)  # fmt: skip
def retry(**given: Any) -> ExitCode:
    """Submits the rows of an ended job that have no answer as a new job, and prints its id."""
    with held():
        from loramill.producer import retry as module
    return module.retry_command(_store(given), **given)


@click.command()
@flagged(
    [
        *STORE_FLAGS,
        *ADAPTER_FLAGS,
        flag("--base-model", metavar="PATH_OR_ID", help="Open it too: a model folder, or an id on the hub."),
        flag("--chat-template", type=FILE, metavar="FILE", help="A Jinja chat template in place of the base's own."),
        ALLOW_NOOP, MAX_RANK, DEVICE,
        click.option("--output-folder", type=click.Path(path_type=Path), default=Path(), metavar="DIR",
                     help="Where results will go.  [default: here]"),
        _JSON,
    ]
)  # fmt: skip
def doctor(output_folder: Path, json: bool, **given: Any) -> ExitCode:
    """What works here, what does not, and what to do: exit code 1 if something fails."""
    with held():
        from loramill.producer import doctor as module
    return module.doctor(_store(given), output_folder, json=json, **given)


COMMANDS = (status, watch, wait, results, cancel, retry, list_, doctor)
