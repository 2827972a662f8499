"""`loramill submit` and `loramill validate`, as the command line has them."""

from __future__ import annotations

from typing import Any

import click

from loramill.producer.interrupts import held
from loramill.producer.submit_options import options_of, submit_options, validate_options
from loramill.schemas.failures import ExitCode


@click.command()
@submit_options
def submit(**given: Any) -> ExitCode:
    """Hands the job lines of FILE (.jsonl, .jsonl.gz, .jsonl.zst, or - for stdin) to the workers.

    Every line is checked first, against what workers say that they serve. Prints the job's id.
    """
    options = options_of(given)
    with held():
        from loramill.producer.submit_file import submit_file
    return submit_file(options)


@click.command()
@validate_options
def validate(**given: Any) -> ExitCode:
    """Checks the job lines of FILE as submit does, stores nothing, and says which workers could run them."""
    options = options_of(given)
    with held():
        from loramill.producer.submit_file import validate_file
    return validate_file(options)


COMMANDS = (submit, validate)
"""In the order of --help."""
