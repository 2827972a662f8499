"""From the runs of a packed batch to the routing that its device takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loramill.kernels.mixes import BASE_MIX, Mix, number_mixes, only
from loramill.kernels.multi_lora import Routing
from loramill.kernels.plan import tile_height
from loramill.kernels.routing import Mixes, TileRouting, route_host
from loramill.kernels.segments import segments_of


class Router:
    """Routes the passes of one engine with `slots` adapter slots: segments on a CPU, tiles on a device.

    `tiled` asks for tiles on a CPU too, whose forms then are the plain ones of the mixes.
    """

    def __init__(self, slots: int, device: torch.device, *, tiled: bool = False) -> None:
        self._slots, self.device = slots, device
        # Each slot is a mix of its own and of the same number: the table of every pass without a real mix.
        tiled = tiled or device.type != "cpu"
        self.plain = Mixes.of([only(slot) for slot in range(slots)], slots, device) if tiled else None

    def route(self, runs: Iterable[tuple[Mix, int]]) -> Routing | TileRouting:
        """The routing of consecutive `(mix, rows)` runs; the rows of the mix () go through no adapter."""
        if self.plain is None:
            return Routing(segments_of(runs), self.device)
        runs = list(runs)
        numbers, mixes = number_mixes([mix for mix, _ in runs])
        table = self.plain
        if all(len(mix) == 1 and mix[0][1] == 1.0 for mix in mixes):
            numbers = [mix[0][0] if mix else BASE_MIX for mix, _ in runs]
        else:
            table = Mixes.of(mixes, self._slots, self.device)
        mix_of_row = [number for number, (_, rows) in zip(numbers, runs, strict=True) for _ in range(rows)]
        present = len(set(mix_of_row) - {BASE_MIX})
        return route_host(mix_of_row, table, tile_height(len(mix_of_row), present))
