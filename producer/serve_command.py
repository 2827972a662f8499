"""`loramill serve`, as the command line has it."""

from __future__ import annotations

from typing import Any

import click

from loramill.producer.interrupts import held
from loramill.producer.serve_options import options_of, serve_options
from loramill.schemas.failures import ExitCode


@click.command()
@serve_options
@click.pass_context
def serve(context: click.Context, /, **given: Any) -> ExitCode:
    """Serves the HTTP API over a store: OpenAI's Files and Batches, single questions, metrics, and a page to watch.

    With --embedded it runs a worker too: one command, and no Redis.
    """
    options = options_of(context, given)
    with held():
        from loramill.producer.api.server import run_server  # FastAPI takes a second
    return run_server(options)
