"""The `loramill` command. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import click

import loramill
from loramill.producer import job_commands, keys_command, queue_commands, serve_command
from loramill.producer.interrupts import held
from loramill.producer.options import RunOptions, list_options, run_options, verify_options
from loramill.producer.store_options import StoreOptions
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.settings import flagged, given_variables
from loramill.worker.worker_settings import STORE_FLAGS, WORKER_FLAGS, WorkerOptions


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(loramill.__version__, prog_name="loramill", message="%(prog)s %(version)s")
def cli() -> None:
    """Bulk inference over one base language model and many LoRA adapters."""


@cli.command()
@run_options
def run(**given: Any) -> ExitCode:
    """Answers every line of a JSONL file, each by the adapter that it names.

    Interrupted, killed or out of disk, the same command again goes on where it stopped and redoes no finished row.
    """
    started_s = time.monotonic()
    with held():
        from loramill.producer.run import run_file  # torch and transformers take seconds, which are the run's too

    return run_file(RunOptions(**given), started_s)


@cli.command()
@flagged(WORKER_FLAGS)
@click.pass_context
def worker(context: click.Context, /, **given: Any) -> ExitCode:
    """Runs shards of queued jobs until it is told to end; a second signal ends it at once.

    The same as `celery -A loramill.worker.app worker -P threads`, with the settings as environment variables.
    """
    with held():
        from loramill.producer.worker_command import run_worker

    return run_worker(WorkerOptions(**given), given_variables(context))


@cli.group()
def adapters() -> None:
    """What adapters hold, whether they fit a base, and which of them running workers serve."""


@adapters.command("list")
@list_options
def list_(**given: Any) -> ExitCode:
    """One line for each adapter that is registered."""
    with held():
        from loramill.producer import catalogue

    return catalogue.show((), **given)


@adapters.command()
@click.argument("name")
@list_options
def inspect(name: str, **given: Any) -> ExitCode:
    """Everything about one adapter."""
    with held():
        from loramill.producer import catalogue

    return catalogue.show((name,), in_full=True, **given)


@adapters.command()
@click.argument("names", nargs=-1)
@verify_options
def verify(names: tuple[str, ...], **given: Any) -> ExitCode:
    """What adapters (all, or the NAMES) change in one answer, and whether PEFT computes the same, in float32."""
    with held():
        from loramill.producer import verify as checks

    return checks.verify(names, **given)


@adapters.command()
@click.argument("name")
@click.argument("path", required=False)
@click.option("--scale", type=click.FloatRange(-1000, 1000), help="Its strength.  [default: 1]")
@flagged(STORE_FLAGS)
def load(name: str, path: str | None, scale: float | None, **given: Any) -> ExitCode:
    """Has the workers of a store load an adapter while they run, or look at its files again.

    PATH is in the workers' --adapters-dir; the default is what they were started with as NAME, else the folder NAME.
    """
    with held():
        from loramill.producer import adapters_wanted_command as module

    return module.load(StoreOptions(**given), name, path, scale)


@adapters.command()
@click.argument("name")
@flagged(STORE_FLAGS)
def unload(name: str, **given: Any) -> ExitCode:
    """Has the workers of a store let go of an adapter, once the rows that run with it are done."""
    with held():
        from loramill.producer import adapters_wanted_command as module

    return module.unload(StoreOptions(**given), name)


for command in (*queue_commands.COMMANDS, *job_commands.COMMANDS, serve_command.serve, keys_command.keys):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with an ExitCode; whatever happens, one clear line and no traceback."""
    sys.exit(_main(arguments))


def _main(arguments: Sequence[str] | None) -> ExitCode:
    try:
        return ExitCode(cli.main(arguments, prog_name="loramill", standalone_mode=False) or ExitCode.OK)
    except click.exceptions.NoArgsIsHelpError as asked:
        click.echo(asked.format_message(), err=True)
        return ExitCode.USAGE
    except Failure as failure:
        _debug()
        return _say(failure.code, *failure.lines)
    except click.ClickException as error:
        return _say(ExitCode.USAGE, error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return _say(ExitCode.INTERRUPTED, "interrupted")
    except Exception as error:
        _debug()
        what = " ".join(str(error).split()) or "no message"
        hint = "LORAMILL_DEBUG=1 shows where; what is committed stays, and the same command resumes"
        return _say(ExitCode.MACHINE, f"{type(error).__name__}: {what} ({hint})")


def _debug() -> None:
    if os.environ.get("LORAMILL_DEBUG"):
        traceback.print_exc()


def _say(code: ExitCode, *lines: str) -> ExitCode:
    for line in lines:
        click.echo(line if code is ExitCode.INTERRUPTED else f"Error: {line}", err=True)
    return code
