"""Adapters as host memory holds them: in the form that a model's slots are filled from.

In panels a rank below 16 takes the memory of 16 for its A. That buys slots that cost nothing to fill and no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loramill.kernels.panels import Filling, Panels
from loramill.worker.lora import FusedLinear
from loramill.worker.packed import Packed

if TYPE_CHECKING:
    from loramill.worker.adapters import Adapter


@dataclass(slots=True, frozen=True)
class Laid:
    """An adapter in panels, all in one stretch of memory: a slot is filled by pointing into it."""

    flat: Tensor
    panels: Mapping[tuple[str, ...], Panels]
    """By the projections' names."""

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.itemsize


Held = Packed | Laid


class HostForm:
    """Reads adapters for these projections: in panels where all that an adapter changes take them, otherwise packed."""

    def __init__(self, projections: Iterable[FusedLinear], dtype: torch.dtype, *, pin: bool) -> None:
        """`pin` packed ones, for copies to a device."""
        self._projections = list(projections)
        self._takes_panels = {name for one in self._projections if one.form is not None for name in one.names}
        self._dtype, self._pin = dtype, pin

    def nbytes(self, adapter: Adapter) -> int:
        """What `read` will take."""
        if not self._is_laid(adapter):
            return adapter.nbytes(self._dtype)
        return sum(self._sizes(adapter)) * self._dtype.itemsize

    def read(self, adapter: Adapter) -> Held:
        """An adapter from its files.

        Raises:
            AdapterError: they are no longer what they were when it was checked.
        """
        if not self._is_laid(adapter):
            return adapter.packed(self._dtype, pin=self._pin)
        pairs, sizes, filling = adapter.pairs(), self._sizes(adapter), Filling(self._dtype)
        flat = torch.empty(sum(sizes), dtype=self._dtype)
        rooms = zip(self._projections, flat.split(sizes), strict=True)
        panels = {one.names: one.panels(pairs, room, filling) for one, room in rooms}
        filling.run()
        return Laid(flat, {names: found for names, found in panels.items() if found is not None})

    def _sizes(self, adapter: Adapter) -> list[int]:
        """How many numbers each projection takes of it."""
        ranks = {name: target.rank for name, target in adapter.targets.items()}
        return [one.panel_size(ranks) for one in self._projections]

    def _is_laid(self, adapter: Adapter) -> bool:
        return self._takes_panels.issuperset(adapter.targets)
