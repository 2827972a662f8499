"""The options of `loramill serve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from loramill.producer.store_options import StoreOptions
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.durations import seconds_of
from loramill.worker.settings import BASE_HELP, FILE, flag, flagged, given_variables, size
from loramill.worker.worker_settings import BROKER, NODE_FLAGS, STORE_FLAGS

EMBEDDED_STORE = "sqlite:///loramill.db"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(StoreOptions):
    """One server, as its operator asked for it."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes one that is free."""
    keys: Path | None = None
    base: str | None = None
    broker: str | None = None
    max_file_bytes: int | None = None
    retention_s: float | None = None
    webhook_url: str | None = None
    """Of a server without keys; with them each key has its own."""
    webhook_secret_file: Path | None = None
    webhook_allow_private: bool = False
    embedded: bool = False
    worker: Mapping[str, str] = field(default_factory=dict)
    """With `embedded`: the worker's settings, as variables."""


_SERVE_FLAGS = [
    flag("--host", default="127.0.0.1", metavar="NAME", help="Where to listen; anything but loopback needs --keys."),
    flag("--port", type=click.IntRange(0, 65535), default=8000, help="0 takes one that is free."),
    flag("--keys", type=FILE, metavar="FILE", help="Who may ask: see `loramill keys`.  [default: anybody, as one]"),
    flag("--base", metavar="NAME", help="Which base rows are for, where workers serve several."),
    BROKER,
    flag("--max-file-bytes", callback=size, default="8GiB", metavar="SIZE", help="Larger files are refused."),
    flag("--retention", dest="retention_s", callback=seconds_of, metavar="TIME",
         help="Files go after so long, unless their owner said when.  [default: never]"),
    flag("--webhook-url", metavar="URL", help="Is told how batches end. With --keys each key has its own."),
    flag("--webhook-secret-file", type=FILE, metavar="FILE", help="Holds whsec_..., which signs what is sent there."),
    flag("--webhook-allow-private", is_flag=True,
         help="Webhooks may go to private networks and this machine, and without TLS."),
    flag("--embedded", is_flag=True,
         help=f"Run a worker too, with the flags below.  [default of --store then: {EMBEDDED_STORE}]"),
    flag("--base-model", metavar="PATH_OR_ID", help=f"With --embedded: {BASE_HELP[0].lower()}{BASE_HELP[1:]}"),
]  # fmt: skip

serve_options = flagged([*STORE_FLAGS, *_SERVE_FLAGS, *NODE_FLAGS])
"""Decorates a click command that takes what `options_of` does."""


def options_of(context: click.Context, given: dict[str, Any]) -> ServeOptions:
    """What a command was given; raises Failure (USAGE) for what cannot be meant."""
    ours = {one.name: given[one.name] for one in fields(ServeOptions) if one.name in given}
    said = given_variables(context)
    if not given["embedded"]:
        theirs = [one.opts[-1] for one in context.command.params if one.name not in ours and str(one.envvar) in said]
        if theirs:
            raise Failure(ExitCode.USAGE, f"{theirs[0]} is for a worker: give --embedded too, or give it to the worker")
        return ServeOptions(**ours)
    store = ours["store"] or EMBEDDED_STORE
    if given["base_model"] is None:
        raise Failure(ExitCode.USAGE, "--embedded runs a worker, which needs --base-model PATH_OR_ID")
    if not store.lower().startswith("sqlite:"):
        raise Failure(
            ExitCode.USAGE, "--embedded is for a store in a file, --store sqlite:///PATH: with Redis, start "
            "`loramill worker` beside the server",
        )  # fmt: skip
    return ServeOptions(**ours | {"store": store}, worker=said | {"LORAMILL_STORE": store})
