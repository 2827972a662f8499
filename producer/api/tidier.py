"""Removes what is left of files and uploads whose time is up."""

from __future__ import annotations

import logging
import threading

from loramill.producer.api.contents import Contents
from loramill.producer.api.parts import Parts
from loramill.producer.api.uploads import KIND
from loramill.store.errors import StoreError
from loramill.store.shelf import Shelf

EVERY_S = 60.0

_log = logging.getLogger("loramill.api")


class Tidier:
    """One thread. Of several servers of a store, one does it at a time."""

    def __init__(self, shelf: Shelf, name: str) -> None:
        """`name`: of this server among them."""
        self._shelf, self._name = shelf, name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tidier", daemon=True)

    def start(self) -> None:
        """Begins at once."""
        self._thread.start()

    def close(self) -> None:
        """Returns when nothing more is removed."""
        self._stop.set()
        self._thread.join()

    def tidy(self) -> int:
        """Once, now; how many were removed. Raises StoreError."""
        if not self._shelf.lock("tidier", self._name, 2 * EVERY_S):
            return 0
        removed = Contents(self._shelf).tidy() + Parts(self._shelf).tidy()
        for upload in self._shelf.overdue(KIND):
            removed += self._shelf.remove(KIND, upload.id)
        return removed

    def _run(self) -> None:
        while True:
            try:
                if removed := self.tidy():
                    _log.info("removed %d files and uploads whose time was up", removed)
            except StoreError as error:
                _log.warning("what is overdue could not be removed, and is tried again: %s", error)
            if self._stop.wait(EVERY_S):
                return
