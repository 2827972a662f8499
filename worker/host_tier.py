"""Adapters in host memory, between disk and the device's slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from loramill.worker.adapters import Adapter
from loramill.worker.host_form import Held, HostForm
from loramill.worker.request import HostStats
from loramill.worker.slots import Eviction, NextUse


class HostTier:
    """Held adapters within `max_count` and `max_bytes`; a thread reads those that are needed next."""

    def __init__(
        self,
        form: HostForm,
        *,
        max_count: int | None,
        max_bytes: int,
        eviction: Eviction,
        next_use: NextUse,
        pinned: frozenset[str] = frozenset(),
    ) -> None:
        """`next_use` counts rows that wait as well as rows to come."""
        self.stats = HostStats()
        self.max_count, self.max_bytes = max_count, max_bytes
        self._form = form
        self._eviction = eviction
        self._next_use = next_use
        self._pinned = pinned
        self._held: dict[str, Held] = {}  # least recently used first
        self._came: dict[str, None] = {}  # first come first
        self._coming: dict[str, tuple[Future[tuple[Held, float]], int]] = {}
        self._reader = ThreadPoolExecutor(1, "loramill-adapters")

    def refuses(self, adapter: Adapter) -> str | None:
        """Why an adapter can never be held."""
        size = self._form.nbytes(adapter)
        return (
            f"its {size:,} bytes are more than the {self.max_bytes:,} of --lora-host-bytes"
            if size > self.max_bytes
            else None
        )

    def take(self, adapter: Adapter) -> Held:
        """The adapter's weights, read now if they are not here.

        Raises:
            AdapterError: its files are no longer what they were when it was checked.
        """
        began_s = time.perf_counter()
        self._collect()
        held = self._held.get(adapter.sha256)
        if held is not None:
            self.stats.hits += 1
        else:
            coming = self._coming.pop(adapter.sha256, None)
            self._make_room(adapter, must=True)
            held, seconds = coming[0].result() if coming else _read(adapter, self._form)
            self._keep(adapter.sha256, held, seconds)
        self._held[adapter.sha256] = self._held.pop(adapter.sha256)
        self.stats.waited_s += time.perf_counter() - began_s
        return held

    def prefetch(self, adapters: Iterable[Adapter]) -> None:
        """Have the thread read these, the most urgent first, as far as there is room for them."""
        self._collect()
        for adapter in adapters:
            name = adapter.sha256
            if name in self._held or name in self._coming:
                continue
            if not self._make_room(adapter, must=False):
                return
            read = self._reader.submit(_read, adapter, self._form)
            self._coming[name] = (read, self._form.nbytes(adapter))

    def preload(self, adapters: Iterable[Adapter]) -> None:
        """As `prefetch`, and wait for them.

        Raises:
            AdapterError: as for `take`.
        """
        self.prefetch(adapters)
        for name, (read, _) in list(self._coming.items()):
            del self._coming[name]
            self._keep(name, *read.result())

    def drop(self, sha256: str) -> None:
        """Hold an adapter no longer."""
        coming = self._coming.pop(sha256, None)
        if coming is not None and not coming[0].cancel():
            wait([coming[0]])  # its memory goes when it is read
        if self._held.pop(sha256, None) is not None:
            del self._came[sha256]

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _collect(self) -> None:
        for name, (read, _) in list(self._coming.items()):
            if read.done():
                del self._coming[name]
                if read.exception() is None:  # a bad one is read again by whoever takes it, and told
                    self._keep(name, *read.result())

    def _keep(self, name: str, held: Held, seconds: float) -> None:
        self._held[name] = held
        self._came[name] = None
        self.stats.loads += 1
        self.stats.bytes_read += held.nbytes
        self.stats.read_s += seconds
        self.stats.most_bytes = max(self.stats.most_bytes, sum(one.nbytes for one in self._held.values()))

    def _make_room(self, adapter: Adapter, *, must: bool) -> bool:
        """Evict until `adapter` fits; what is needed sooner stays, unless it `must` fit."""
        size = self._form.nbytes(adapter)
        soon = self._next_use(adapter.sha256)
        while not self._fits(size):
            leaving = self._leaving()
            if must and leaving is None and self._coming:
                leaving = next(reversed(self._coming))  # the least urgent of those that are being read
            if leaving is None or (not must and self._next_use(leaving) <= soon):
                return False
            self.stats.evictions += leaving in self._held
            self.drop(leaving)
        return True

    def _fits(self, size: int) -> bool:
        count = len(self._held) + len(self._coming) + 1
        held = sum(one.nbytes for one in self._held.values()) + sum(size for _, size in self._coming.values())
        return held + size <= self.max_bytes and (self.max_count is None or count <= self.max_count)

    def _leaving(self) -> str | None:
        order = self._came if self._eviction is Eviction.FIFO else self._held
        free = [name for name in order if name not in self._pinned]
        key: Callable[[str], float] = self._next_use if self._eviction is Eviction.PLAN else lambda name: 0
        return max(free, key=key, default=None)


def _read(adapter: Adapter, form: HostForm) -> tuple[Held, float]:
    began_s = time.perf_counter()
    with torch.inference_mode():
        held = form.read(adapter)
    return held, time.perf_counter() - began_s
