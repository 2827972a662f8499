"""What operators want of a worker's engines beside what it was started with: read from the store, passed on to them."""

from __future__ import annotations

from collections.abc import Sequence

from loramill.store.shelf import Shelf
from loramill.store.wishes import Wish, wishes
from loramill.worker.engine_process import EngineProcess


class AdaptersWanted:
    """The wishes as they were last seen. An engine that starts again hears of all of them."""

    def __init__(self, shelf: Shelf, engines: Sequence[EngineProcess]) -> None:
        self._shelf, self._engines = shelf, engines
        self._wishes: list[Wish] = []

    def look(self) -> None:
        """Reads them, and tells each engine what it has not heard yet. Raises StoreError."""
        self._wishes = list(wishes(self._shelf))
        for engine in self._engines:
            for wish in self._wishes:
                engine.offered.tell(wish)

    @property
    def answered(self) -> dict[str, str]:
        """Names with the stamp of the latest wish, for those that every engine has heeded."""
        return {
            wish.name: wish.stamp
            for wish in self._wishes
            if all(
                (answer := engine.offered.confirmed.get(wish.name)) is not None and answer.stamp == wish.stamp
                for engine in self._engines
            )
        }

    @property
    def refused(self) -> dict[str, str]:
        """Names, and why an engine did not."""
        return {
            name: answer.refused
            for engine in self._engines
            for name, answer in engine.offered.confirmed.items()
            if answer.refused is not None
        }
