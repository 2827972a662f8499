"""Which store a command talks to, and how it ends when the store cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loramill.schemas.failures import ExitCode, Failure
from loramill.store.errors import JobNotFound, StoreError

if TYPE_CHECKING:
    from loramill.store.contract import JobStore


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """Where jobs are. Options of commands inherit it, as their flags hold STORE_FLAGS."""

    store: str | None = None
    files: str | None = None
    """Where rows and results are, if not in the store itself."""
    store_prefix: str = "loramill"


@contextmanager
def store_of(options: StoreOptions, *, create: bool = False) -> Iterator[JobStore]:
    """The store, for a command: what goes wrong with it is a Failure. With `create` it may be new; else one to which
    nothing was ever submitted is an error."""
    if not options.store:
        how = "--store redis://host:6379/0 or --store sqlite:///path, or LORAMILL_STORE"
        raise Failure(ExitCode.USAGE, f"no store is given: {how}")
    with as_failures():
        from loramill.store.opening import open_store

        try:
            store = open_store(options.store, files=options.files, prefix=options.store_prefix, create=create)
        except ValueError as error:
            raise Failure(ExitCode.USAGE, str(error)) from error
        with store:
            yield store


@contextmanager
def as_failures() -> Iterator[None]:
    """What a store can raise, as the exit code and the one line that a person needs."""
    try:
        yield
    except JobNotFound as error:
        raise Failure(ExitCode.NOT_FOUND, str(error)) from error
    except StoreError as error:
        raise Failure(ExitCode.MACHINE, str(error)) from error
