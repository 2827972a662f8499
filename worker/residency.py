"""Adapters where the model computes with them: in its slots, or merged into its weights."""

from __future__ import annotations

import time
from itertools import islice
from math import inf

from loramill.worker.adapters import Adapter, AdapterError
from loramill.worker.config import EngineConfig
from loramill.worker.forecast import Forecast
from loramill.worker.host_form import HostForm
from loramill.worker.host_tier import HostTier
from loramill.worker.memory import free_memory
from loramill.worker.merge import MergeError
from loramill.worker.model import Model
from loramill.worker.request import AdapterUnavailable, EngineStats, Mix
from loramill.worker.scheduler import Scheduler
from loramill.worker.sequence import Step
from loramill.worker.slots import Load, Slots

_HOST_SHARE = 0.25
"""How much of the memory that is free `lora_host_bytes=None` may take."""


class Residency:
    """Carries out what the scheduler decides about adapters, and reads ahead of it."""

    def __init__(self, model: Model, config: EngineConfig, stats: EngineStats) -> None:
        self.slots = Slots(config.max_loras_per_batch, config.lora_eviction, config.pinned, self._next_row)
        self._model = model
        self._pinned = config.pinned
        self._host = HostTier(
            HostForm(model.projections, model.dtype, pin=model.device.type == "cuda"),
            max_count=config.max_loaded_loras,
            max_bytes=config.lora_host_bytes or int(free_memory("cpu") * _HOST_SHARE),
            eviction=config.lora_eviction,
            next_use=self._next_use,
            pinned=config.pinned,
        )
        self.count_in(stats)
        self._adapters: dict[str, Adapter] = {}
        self._broken: dict[str, str] = {}
        self._forecasts: list[Forecast] = []
        self._wanted: dict[str, None] = {}
        self._merged: Mix = ()

    def count_in(self, stats: EngineStats) -> None:
        """From now on these counters count."""
        self._stats = stats
        self._host.stats = stats.host

    def register(self, adapter: Adapter) -> None:
        """Rows may ask for it from now on; the same content again changes nothing.

        Raises:
            ValueError: it is larger than the host memory for adapters.
        """
        if not adapter.static_only and (why := self._host.refuses(adapter)):
            raise ValueError(f"{adapter.path}: {why}")
        self._adapters[adapter.sha256] = adapter
        self._broken.pop(adapter.sha256, None)

    def forget(self, sha256: str) -> None:
        """Rows may no longer ask for it; no row that does may be left."""
        if any(sha256 == adapter for adapter, _ in self._merged):
            self._set_weights(())
        self._adapters.pop(sha256, None)
        self.slots.drop(sha256)
        self._host.drop(sha256)

    def check(self, mix: Mix, *, merged: bool) -> None:
        """That rows can be answered by this mix.

        Raises:
            ValueError: they cannot.
            AdapterUnavailable: they could, before one of its adapters was lost.
        """
        for adapter, _ in mix:
            if adapter not in self._adapters:
                raise ValueError(f"adapter {adapter} is not registered with this engine")
            if adapter in self._broken:
                raise AdapterUnavailable(self._broken[adapter])
            if not merged and (reasons := self._adapters[adapter].static_only):
                raise ValueError(f"adapter {adapter} can only be served merged: {', '.join(reasons)}")
        if not merged and not self.slots.fits([adapter for adapter, _ in mix]):
            slots = f"the {self.slots.capacity} slots beside those pinned"
            raise ValueError(f"a mix of {len(mix)} adapters does not fit {slots}")

    def watch(self, forecast: Forecast) -> None:
        """Take account of the rows that it says will come."""
        self._forecasts.append(forecast)
        self._read_ahead()

    def unwatch(self, forecast: Forecast) -> None:
        """They have come, or will not."""
        if forecast in self._forecasts:
            self._forecasts.remove(forecast)

    def preload(self) -> None:
        """Read every adapter that there is room for, pinned ones first.

        Raises:
            AdapterError: one is no longer what it was when it was checked.
        """
        dynamic = [adapter for adapter in self._adapters.values() if not adapter.static_only]
        self._host.preload(sorted(dynamic, key=lambda one: one.sha256 not in self._pinned))

    def prepare(self, step: Step, scheduler: Scheduler) -> dict[str, str]:
        """See that the weights and slots are as `step` says: the adapters that cannot be had any more, and why."""
        failed: dict[str, str] = {}
        began_s = time.perf_counter()
        if step.chunks and step.weights != self._merged:
            failed |= self._set_weights(step.weights)
            self._stats.waves += 1
            self._stats.merges += bool(self._merged)
            self._stats.merge_s += time.perf_counter() - began_s
        if step.loads:
            self._wanted = dict.fromkeys(load.adapter for load in step.loads) | scheduler.waiting.wanted
            for load in step.loads:
                failed |= self._load(load)
                self._wanted.pop(load.adapter)
            self._stats.waves += 1
            self._stats.adapter_load_s += time.perf_counter() - began_s
            self._read_ahead()
        self._broken |= failed
        for adapter in failed:
            self.slots.drop(adapter)
        return failed

    def close(self) -> None:
        """End the thread that reads."""
        self._host.close()

    def _load(self, load: Load) -> dict[str, str]:
        try:
            held = self._host.take(self._adapters[load.adapter])
        except AdapterError as error:
            return {load.adapter: str(error)}
        self._model.put(load.slot, held)
        self._stats.adapter_loads += 1
        self._stats.adapter_evictions += load.evicted is not None
        return {}

    def _set_weights(self, mix: Mix) -> dict[str, str]:
        self._model.restore()
        self._merged = ()
        patches = []
        for adapter, strength in mix:
            try:
                patches.append((self._adapters[adapter].patch(), strength))
            except AdapterError as error:
                return {adapter: str(error)}
        if patches:
            try:
                self._model.merge(patches)
            except MergeError as error:
                return {adapter: str(error) for adapter, _ in mix}
            self._merged = mix
        return {}

    def _read_ahead(self) -> None:
        """Have the host tier read what the next wave of rows asks for."""
        coming = dict.fromkeys(a for a in self._wanted if self.slots.slot(a) is None)
        for forecast in self._forecasts:
            # Rows of one adapter can be in many runs: look only some way ahead.
            some = islice(forecast.coming(), 4 * self.slots.capacity)
            coming |= dict.fromkeys(a for a in some if self.slots.slot(a) is None)
        next_wave = islice((a for a in coming if a in self._adapters and a not in self._broken), self.slots.capacity)
        self._host.prefetch(self._adapters[a] for a in next_wave)

    def _next_row(self, adapter: str) -> float:
        return min((forecast.next_use(adapter) for forecast in self._forecasts), default=inf)

    def _next_use(self, adapter: str) -> float:
        """For the host tier: rows that wait come before those still to come, and what has a slot is not needed."""
        if adapter in self._wanted:
            return -1
        return inf if self.slots.slot(adapter) is not None else self._next_row(adapter)
