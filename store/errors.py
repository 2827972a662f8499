"""Why the store could not do its work."""

from __future__ import annotations

from collections.abc import Sequence


class StoreError(Exception):
    """A file of the store cannot be read or written; the message is one sentence that names it."""


class JournalBusy(StoreError):
    """Another process is writing the same journal."""


class JournalDamaged(StoreError):
    """The journal's file is not what was written: nothing in it can be trusted."""


class JournalMismatch(StoreError):
    """The journal was made by another job; `changed` says which parts differ, one phrase each."""

    def __init__(self, path: str, changed: Sequence[str]) -> None:
        super().__init__(f"{path} was made by another job: {'; '.join(changed)}")
        self.changed = list(changed)
