"""The forms that compute a point: the product's operator, and what plain torch offers. One interface for all."""

from __future__ import annotations

from typing import Protocol

import torch

from bench.clock import Call
from bench.operands import Operands
from loramill.kernels.check import LiveRanks
from loramill.kernels.multi_lora import multi_lora
from loramill.kernels.plan import tile_height
from loramill.kernels.routing import Mixes, TileRouting, route_host

GATHERED_BYTES = 8 << 30
"""Gathered weights take rows times an adapter's bytes; beyond this the gather is left out."""


class AbsentError(Exception):
    """A form that cannot be measured here, or not at this point; the message says why."""


class Form(Protocol):
    """One way to add every row's delta to y."""

    name: str
    title: str

    def prepare(self, operands: Operands) -> Call:
        """Everything that is not timed: layouts of its own, routing. Raises `AbsentError`."""


def routed(operands: Operands) -> tuple[LiveRanks, TileRouting]:
    """The product's tables for the operands."""
    point, device = operands.point, operands.x.device
    ranks = LiveRanks(point.adapters, len(point.projection.widths), device)
    for slot in range(point.adapters):
        ranks.put(slot, [point.rank] * len(point.projection.widths))
    mixes = Mixes.of([((slot, 1.0),) for slot in range(point.adapters)], point.adapters, device)
    present = sum(count > 0 for count in point.counts())
    return ranks, route_host(operands.slots, mixes, tile_height(point.rows, present))


class Ours:
    """The product's operator, with the plan of this device where there is one."""

    name = "loramill"
    title = "loramill"

    def prepare(self, operands: Operands) -> Call:
        ranks, routing = routed(operands)
        widths = operands.point.projection.widths

        def call(number: int) -> None:
            multi_lora(
                operands.y[number], operands.x[number], operands.a[number], operands.b[number], widths, ranks, routing
            )

        return call


class Loop:
    """Two cuBLAS products for each adapter and sibling, one after another."""

    name = "loop"
    title = "cuBLAS, adapter by adapter"

    def prepare(self, operands: Operands) -> Call:
        segments, columns = list(operands.segments()), operands.columns()

        def call(number: int) -> None:
            x, y, a, b = operands.x[number], operands.y[number], operands.a[number], operands.b[number]
            for slot, first, last in segments:
                v = (x[first:last] @ a[slot].flatten(0, 1).t()).unflatten(1, a.shape[1:3])
                for sibling, mine in enumerate(columns):
                    y[first:last, mine].addmm_(v[:, sibling], b[slot, :, mine])

        return call


class Gather:
    """Every row's weights gathered, then `torch.bmm`."""

    name = "bmm"
    title = "torch.bmm over gathered weights"

    def prepare(self, operands: Operands) -> Call:
        gathered = operands.point.rows * (operands.a[0, 0].numel() + operands.b[0, 0].numel()) * operands.a.itemsize
        if gathered > GATHERED_BYTES:
            raise AbsentError(f"the gathered weights would take {gathered / 2**30:.0f} GiB")
        slots = torch.tensor(operands.slots, device=operands.x.device)
        columns = operands.columns()

        def call(number: int) -> None:
            a, b = operands.a[number].index_select(0, slots), operands.b[number].index_select(0, slots)
            v = torch.bmm(a.flatten(1, 2), operands.x[number][:, :, None]).view(a.shape[:3])
            deltas = [torch.bmm(v[:, i : i + 1], b[:, :, mine])[:, 0] for i, mine in enumerate(columns)]
            operands.y[number].add_(torch.cat(deltas, 1))

        return call
