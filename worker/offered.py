"""What one engine serves, as its worker knows it: under which manifest it claims, and what may still be sent there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from loramill.schemas.manifest import Manifest
from loramill.store.wishes import Wish
from loramill.worker.frames import Kind


@dataclass(slots=True, frozen=True)
class Answer:
    """What an engine made of a wish about an adapter."""

    stamp: str
    """The wish's."""
    refused: str | None = None


class Offered:
    """Changes come from the child at any time; the worker claims under the latest manifest that the store knows.

    A shard that was claimed under an earlier one runs as well: the child keeps what such shards need until it is told
    to drop it, which is once no shard needs it and no more will be sent.
    """

    def __init__(
        self, lock: threading.Lock, send: Callable[..., None], in_use: Callable[[], Iterable[Collection[str]]]
    ) -> None:
        """`lock` is held while shards are sent; `in_use` has the keys of the adapters of each that is in the child."""
        self.manifest: Manifest | None = None
        """What is claimed under."""
        self.settled = False
        """Whether the child serves that: one that has just started knows no more than at first."""
        self.confirmed: Mapping[str, Answer] = {}
        """What became of wishes, by name, as far as the store knows the manifest that came of them."""
        self._lock, self._send, self._in_use = lock, send, in_use
        self._announced: Manifest | None = None
        self._blobs: Mapping[str, bytes] = {}
        self._told: dict[str, str] = {}
        self._answers: dict[str, Answer] = {}
        self._keys: set[str] = set()
        """Adapters that the child can resolve."""

    def announce(self, manifest: Manifest, blobs: Mapping[str, bytes]) -> None:
        """The child serves this from now on."""
        with self._lock:
            self._announced, self._blobs = manifest, blobs
            self._keys |= _keys_of(manifest)

    def tell(self, wish: Wish) -> None:
        """Passes a wish on to the child, unless it has heard of it, or is not there to hear."""
        with self._lock:
            if self._announced is None or self._told.get(wish.name) == wish.stamp:
                return
            self._told[wish.name] = wish.stamp
            if wish.wanted:
                self._send(Kind.LOAD, name=wish.name, source=wish.source, scale=wish.scale, stamp=wish.stamp)
            else:
                self._send(Kind.UNLOAD, name=wish.name, stamp=wish.stamp)

    def settle(self, publish: Callable[[Manifest, Mapping[str, bytes]], object]) -> None:
        """Has what the child said last published, if that was not done, and claimed under from then on."""
        with self._lock:
            said, blobs, answers = self._announced, self._blobs, dict(self._answers)
        if said is None:
            return
        if not self.settled or said is not self.manifest:
            publish(said, blobs)
        with self._lock:
            if self._announced is not None:  # the child has not died meanwhile
                self.manifest, self.confirmed, self.settled = said, answers, True
                self.drop()

    # Within the lock.

    def answer(self, name: str, answer: Answer) -> None:
        """The child has heeded a wish, or refused to."""
        self._answers[name] = answer

    def admits(self, adapters: Collection[str]) -> bool:
        """Whether a shard that needs these can still be sent."""
        return self._keys.issuperset(adapters)

    def drop(self) -> None:
        """Lets the child drop adapters that are neither offered nor in use. None that needs them is sent any more."""
        offered = [_keys_of(manifest) for manifest in (self.manifest, self._announced) if manifest]
        gone = self._keys.difference(*offered, *self._in_use()) if self.settled else set()
        self._keys -= gone
        for key in gone:
            self._send(Kind.DROP, key=key)

    def died(self) -> None:
        """The child is gone, with all that it was told. What it served is still what the worker is known for."""
        self.settled = False
        self._announced = None
        self._told, self._answers, self.confirmed, self._keys = {}, {}, {}, set()


def _keys_of(manifest: Manifest) -> set[str]:
    return {offer.key for offer in manifest.adapters}
