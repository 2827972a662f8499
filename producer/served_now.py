"""What can be asked for now, for a process that asks again and again: looked up seldom, opened anew when it changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from loramill.producer.offers import choose, open_offer
from loramill.producer.served import Served, nobody_yet
from loramill.store.contract import JobStore
from loramill.store.wishes import wishes

FRESH_S = 1.0


class ServedNow:
    """Any thread may ask."""

    def __init__(self, store: JobStore, base: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`base`: which one, where workers serve several."""
        self._store, self._base, self._clock = store, base, clock
        self._lock = threading.Lock()
        self._served: Served | None = None
        self._of: object = None
        self._looked_s = 0.0

    def __call__(self, *, fresh: bool = False) -> Served:
        """As it was at most FRESH_S ago, with `fresh` as it is. Raises Failure as `published`, StoreError."""
        with self._lock:
            now_s = self._clock()
            if self._served is None or fresh or now_s >= self._looked_s + FRESH_S:
                self._served = self._look(self._served)
                self._looked_s = now_s
            return self._served

    def _look(self, before: Served | None) -> Served:
        manifests, workers = self._store.manifests(), self._store.workers()
        if not manifests:
            raise nobody_yet()
        chosen = choose(manifests, workers, self._base)
        # Opening tokenizers takes tenths of a second: only what decides the offer counts.
        unwanted = {wish.name for wish in wishes(self._store.shelf) if not wish.wanted}
        of = [manifest.id for manifest in chosen], {worker.manifest for worker in workers}, unwanted
        if before is None or of != self._of:
            offer = open_offer(chosen, workers, self._store.get_blob, unwanted=unwanted)
            self._of = of
        else:
            offer = before.offer
        return Served(offer, manifests, workers, offer.warnings)
