"""Adapters in host memory, between disk and the device's slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from loramill.worker.adapters import Adapter
from loramill.worker.packed import Packed
from loramill.worker.request import HostStats
from loramill.worker.slots import Eviction, NextUse


class HostTier:
    """Packed adapters within `max_count` and `max_bytes`; a thread reads those that are needed next."""

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        pin: bool,
        max_count: int | None,
        max_bytes: int,
        eviction: Eviction,
        next_use: NextUse,
        pinned: frozenset[str] = frozenset(),
    ) -> None:
        """`pin` the memory, for copies to a device; `next_use` counts rows that wait as well as rows to come."""
        self.stats = HostStats()
        self.dtype = dtype
        self.max_count, self.max_bytes = max_count, max_bytes
        self._pin = pin
        self._eviction = eviction
        self._next_use = next_use
        self._pinned = pinned
        self._held: dict[str, Packed] = {}  # least recently used first
        self._came: dict[str, None] = {}  # first come first
        self._coming: dict[str, tuple[Future[tuple[Packed, float]], int]] = {}
        self._reader = ThreadPoolExecutor(1, "loramill-adapters")

    def refuses(self, adapter: Adapter) -> str | None:
        """Why an adapter can never be held."""
        size = adapter.nbytes(self.dtype)
        return (
            f"its {size:,} bytes are more than the {self.max_bytes:,} of --lora-host-bytes"
            if size > self.max_bytes
            else None
        )

    def take(self, adapter: Adapter) -> Packed:
        """The adapter's weights, read now if they are not here.

        Raises:
            AdapterError: its files are no longer what they were when it was checked.
        """
        began_s = time.perf_counter()
        self._collect()
        packed = self._held.get(adapter.sha256)
        if packed is not None:
            self.stats.hits += 1
        else:
            coming = self._coming.pop(adapter.sha256, None)
            self._make_room(adapter, must=True)
            packed, seconds = coming[0].result() if coming else _read(adapter, self.dtype, self._pin)
            self._keep(adapter.sha256, packed, seconds)
        self._held[adapter.sha256] = self._held.pop(adapter.sha256)
        self.stats.waited_s += time.perf_counter() - began_s
        return packed

    def prefetch(self, adapters: Iterable[Adapter]) -> None:
        """Have the thread read these, the most urgent first, as far as there is room for them."""
        self._collect()
        for adapter in adapters:
            name = adapter.sha256
            if name in self._held or name in self._coming:
                continue
            if not self._make_room(adapter, must=False):
                return
            read = self._reader.submit(_read, adapter, self.dtype, self._pin)
            self._coming[name] = (read, adapter.nbytes(self.dtype))

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

    def _keep(self, name: str, packed: Packed, seconds: float) -> None:
        self._held[name] = packed
        self._came[name] = None
        self.stats.loads += 1
        self.stats.bytes_read += packed.nbytes
        self.stats.read_s += seconds
        self.stats.most_bytes = max(self.stats.most_bytes, sum(one.nbytes for one in self._held.values()))

    def _make_room(self, adapter: Adapter, *, must: bool) -> bool:
        """Evict until `adapter` fits; what is needed sooner stays, unless it `must` fit."""
        size = adapter.nbytes(self.dtype)
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


def _read(adapter: Adapter, dtype: torch.dtype, pin: bool) -> tuple[Packed, float]:
    began_s = time.perf_counter()
    with torch.inference_mode():
        packed = adapter.packed(dtype, pin=pin)
    return packed, time.perf_counter() - began_s
