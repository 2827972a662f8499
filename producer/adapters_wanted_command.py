"""`loramill adapters load` and `unload`: what running workers serve, changed from the command line."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from loramill.producer.adapter_wishes import ANSWER_S, LOOK_S, Catalogue, Heard, check_source, heard, look, workers_of
from loramill.producer.store_options import StoreOptions, store_of
from loramill.schemas.adapter_objects import AdapterWish
from loramill.schemas.failures import ExitCode, Failure
from loramill.store.contract import JobStore
from loramill.store.wishes import Wish, find_wish, say, take_back
from loramill.worker.specs import check_name


def load(options: StoreOptions, name: str, path: str | None, scale: float | None) -> ExitCode:
    """Has every worker of a store load an adapter. Raises Failure: INPUT if none could."""
    try:
        check_name(name)
        source = None if path is None else check_source(path)
    except ValueError as error:
        raise Failure(ExitCode.USAGE, str(error)) from error
    with store_of(options, create=True) as store:
        wish = say(store.shelf, name, AdapterWish(wanted=True, source=source, scale=scale))
        said = _answer(store, wish, lambda said: bool(said.heeded or (said.refused and not said.waiting)))
        if said.refused and not said.heeded:
            raise Failure(ExitCode.INPUT, f"adapter `{name}`: {said.why}")
        if not said.heeded:
            click.echo(f"adapter `{name}`: no worker has answered yet; those that run next will load it", err=True)
        else:
            [served] = look(store, None).objects({name}, operator=True)
            digest = (served.sha256 or "")[:12]
            click.echo(f"adapter `{name}` ({digest}) is served by {', '.join(served.workers)}", err=True)
            _say_refused(said, name)
    return ExitCode.OK


def unload(options: StoreOptions, name: str) -> ExitCode:
    """Has every worker of a store let go of an adapter. Raises Failure: INPUT if there is none, or it has to stay."""
    with store_of(options) as store:
        catalogue = look(store, None)
        _check_can_go(catalogue, name)
        former = find_wish(store.shelf, name)
        wish = say(store.shelf, name, AdapterWish(wanted=False))
        said = _answer(store, wish, lambda said: bool(said.refused) or not said.waiting)
        if said.refused:
            take_back(store.shelf, wish, former)
            raise Failure(ExitCode.INPUT, f"adapter `{name}`: {said.why}")
        late = f"; not answered yet: {', '.join(said.waiting)}" if said.waiting else ""
        click.echo(f"adapter `{name}` is let go of{late}", err=True)
    return ExitCode.OK


def _check_can_go(catalogue: Catalogue, name: str) -> None:
    if name not in catalogue.adapters:
        raise Failure(ExitCode.INPUT, f"no worker serves an adapter `{name}`")
    if leading := catalogue.leading_to(name):
        raise Failure(ExitCode.INPUT, f"adapter `{name}`: {leading} leads to it")


def _answer(store: JobStore, wish: Wish, enough: Callable[[Heard], bool]) -> Heard:
    until_s = time.monotonic() + ANSWER_S
    while True:
        workers = workers_of(store, None)
        said = heard(wish, workers)
        if enough(said) or not workers or time.monotonic() >= until_s:
            return said
        time.sleep(LOOK_S)


def _say_refused(said: Heard, name: str) -> None:
    if said.refused:
        click.echo(f"Warning: adapter `{name}`: {said.why}", err=True)
