"""From the runs of a packed batch to the routing that its device takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loramill.kernels.mixes import BASE_MIX
from loramill.kernels.multi_lora import Routing
from loramill.kernels.plan import tile_height
from loramill.kernels.routing import Mixes, TileRouting, route_host
from loramill.kernels.segments import BASE_SLOT, segments_of


class Router:
    """Routes the passes of one engine with `slots` adapter slots: segments on a CPU, tiles on a device.

    `tiled` asks for tiles on a CPU too, whose forms then are the plain ones of the mixes.
    """

    def __init__(self, slots: int, device: torch.device, *, tiled: bool = False) -> None:
        self._device = device
        # Each slot is a mix of its own and of the same number, so the table never changes.
        tiled = tiled or device.type != "cpu"
        self._mixes = Mixes.of([((slot, 1.0),) for slot in range(slots)], slots, device) if tiled else None

    def route(self, runs: Iterable[tuple[int, int]]) -> Routing | TileRouting:
        """The routing of consecutive `(slot, rows)` runs; BASE_SLOT's rows go through no adapter."""
        if self._mixes is None:
            return Routing(segments_of(runs), self._device)
        mix_of_row = [BASE_MIX if slot == BASE_SLOT else slot for slot, rows in runs for _ in range(rows)]
        present = len(set(mix_of_row) - {BASE_MIX})
        return route_host(mix_of_row, self._mixes, tile_height(len(mix_of_row), present))
