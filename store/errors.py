"""Why the store could not do its work."""

from __future__ import annotations

from collections.abc import Sequence


class StoreError(Exception):
    """The store cannot be read or written; the message is one sentence that names it."""


class StoreUnreachable(StoreError):
    """Nobody answers, or not in time: trying again may help."""


class StoreFull(StoreError):
    """No memory or no disk is left: trying again helps once there is."""


class StoreRefused(StoreError):
    """It answers and cannot be used: wrong password, no rights, read-only, too old, evicting, of another format."""


class StoreLost(StoreError):
    """It is not the store that it was: a restart came back without the data; or nothing was ever submitted there."""


class JobNotFound(StoreError):
    """No job has that id."""


class Fenced(StoreError):
    """The lease was lost, and with it the right to commit."""


class JournalBusy(StoreError):
    """Another process is writing the same journal."""


class JournalDamaged(StoreError):
    """The journal's file is not what was written: nothing in it can be trusted."""


class JournalMismatch(StoreError):
    """The journal was made by another job; `changed` says which parts differ, one phrase each."""

    def __init__(self, path: str, changed: Sequence[str]) -> None:
        super().__init__(f"{path} was made by another job: {'; '.join(changed)}")
        self.changed = list(changed)
