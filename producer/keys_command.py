"""`loramill keys`: who may ask the API."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramill.producer.interrupts import held
from loramill.producer.store_options import as_failures
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.settings import FILE, POSITIVE, flag, flagged, size

if TYPE_CHECKING:
    from loramill.producer.api.keys import Key

_FILE = flag("--keys", required=True, type=FILE, metavar="FILE", help="Where they are; the server's --keys.")
_COUNT = click.IntRange(min=0)
# Quotas have no variables: they are one key's.
_NEW = [
    click.argument("name"),
    _FILE,
    click.option("--operator", is_flag=True, help="May see all jobs and the metrics, and load adapters."),
    click.option("--adapters", multiple=True, metavar="PATTERN", help="What it may use; repeat it.  [default: *]"),
    click.option("--stored-bytes", callback=size, default="auto", metavar="SIZE", help="Of files.  [default: 100GiB]"),
    click.option("--open-batches", type=_COUNT, help="That have not ended.  [default: 1000]"),
    click.option("--pending-rows", type=_COUNT, help="Of such batches.  [default: 50000000]"),
    click.option("--requests-per-minute", type=POSITIVE, help="[default: 6000]"),
    click.option("--questions", type=_COUNT, help="At the same time.  [default: 64]"),
    click.option("--webhook-url", metavar="URL", help="Is told how its batches end."),
]


@click.group()
def keys() -> None:
    """Who may ask the API. A running server reads FILE again when it changes."""


@keys.command()
@flagged(_NEW)
def new(name: str, keys: Path, **given: Any) -> ExitCode:
    """Makes the key NAME and prints it, this once; with --webhook-url then also the secret that signs its calls."""
    with held():
        from pydantic import ValidationError

        from loramill.producer.api.keys import NAME, Key, hash_of, new_token, new_webhook_secret, write_keys
    if not re.fullmatch(NAME, name):
        raise Failure(ExitCode.USAGE, f"{name!r} is no key's name: letters, digits, and . _ - within, at most 64")
    known = _read(keys)
    if name in known:
        raise Failure(ExitCode.USAGE, f"there is a key {name!r}; `loramill keys remove {name}` ends it")
    token = new_token()
    fields = {field: value for field, value in given.items() if value not in (None, ())}
    if given["adapters"]:
        fields["adapters"] = list(given["adapters"])
    if given["webhook_url"]:
        fields["webhook_secret"] = new_webhook_secret()
    try:
        known[name] = Key(sha256=hash_of(token), **fields)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise Failure(ExitCode.USAGE, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    with as_failures():
        write_keys(keys, known)
    click.echo(token)
    if given["webhook_url"]:
        click.echo(fields["webhook_secret"])
    return ExitCode.OK


@keys.command("list")
@_FILE
def list_(keys: Path) -> ExitCode:
    """One line for each key: its name, and what it may."""
    for name, key in _read(keys).items():
        said = key.model_dump(exclude_defaults=True, exclude={"sha256", "operator", "webhook_secret"})
        click.echo(
            " ".join([name, *(["operator"] if key.operator else []), *(f"{k}={_shown(v)}" for k, v in said.items())])
        )
    return ExitCode.OK


@keys.command()
@click.argument("name")
@_FILE
def remove(name: str, keys: Path) -> ExitCode:
    """Ends the key NAME. What it made stays, and is its again if there is one of that name."""
    with held():
        from loramill.producer.api.keys import write_keys
    known = _read(keys)
    if known.pop(name, None) is None:
        raise Failure(ExitCode.NOT_FOUND, f"{keys} has no key {name!r}")
    with as_failures():
        write_keys(keys, known)
    return ExitCode.OK


def _read(path: Path) -> dict[str, Key]:
    """Raises Failure."""
    with held():
        from loramill.producer.api.keys import KeysUnreadable, read_keys
    try:
        return read_keys(path) if path.exists() else {}
    except KeysUnreadable as error:
        raise Failure(ExitCode.INPUT, str(error)) from error


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
