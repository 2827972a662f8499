"""LoRA's share of a decoder layer: four layers of an 8B model in one CUDA graph, without adapters and with them.

The layer is its four GEMMs, two norms and the activation; attention is left out, which makes the share larger than it
is in a model. Each layer has weights and adapters of its own, 0.44 GB together: nothing is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.clock import Timer
from bench.operands import Operands
from bench.peers.kernel_forms import routed
from bench.points import MODELS, Point, Projection
from loramill.kernels.bridge import fold
from loramill.kernels.check import LiveRanks
from loramill.kernels.multi_lora import multi_lora
from loramill.kernels.routing import TileRouting

LAYERS = 4


def layer_share(
    timer: Timer,
    device: torch.device,
    rank: int,
    rows: int = 256,
    adapters: int = 32,
    projections: tuple[Projection, ...] = MODELS["llama-3-8b"],
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, object]:
    """Seconds of one layer without LoRA, with it, with A folded into the GEMMs (on a device), and of LoRA alone."""
    points = [Point("layer", one, rows, rank, adapters, "zipf") for one in projections]
    operands = [Operands.make(point, LAYERS, device, dtype) for point in points]
    tables = [routed(one) for one in operands]
    weights = [
        [(torch.randn(sum(one.widths), one.k, device=device) * one.k**-0.5).to(dtype) for _ in range(LAYERS)]
        for one in projections
    ]
    hidden = torch.randn(rows, projections[0].k, device=device).to(dtype)
    norm = torch.ones(projections[0].k, device=device, dtype=dtype)

    def lora(number: int, place: int, x: Tensor, y: Tensor) -> None:
        one, (ranks, routing) = operands[place], tables[place]
        multi_lora(y, x, one.a[number], one.b[number], one.point.projection.widths, ranks, routing)

    def base(number: int, place: int, x: Tensor) -> Tensor:
        return F.linear(x, weights[place][number])

    def with_lora(number: int, place: int, x: Tensor) -> Tensor:
        y = base(number, place, x)
        lora(number, place, x, y)
        return y

    def alone(number: int) -> None:
        for place, one in enumerate(operands):
            lora(number, place, one.x[number], one.y[number])

    def layer(project: Callable[[int, int, Tensor], Tensor]) -> Callable[[int], None]:
        def call(number: int) -> None:
            x = F.rms_norm(hidden, norm.shape, norm)
            attended = project(number, 0, x)[:, : projections[1].k].contiguous()
            x = F.rms_norm(hidden + project(number, 1, attended), norm.shape, norm)
            gate, up = project(number, 2, x).chunk(2, 1)
            project(number, 3, F.silu(gate) * up)

        return call

    seconds = {"base": timer(layer(base), LAYERS), "with_lora": timer(layer(with_lora), LAYERS)}
    seconds["lora_alone"] = timer(alone, LAYERS)
    if device.type == "cuda":
        seconds["folded"] = timer(layer(_folded(operands, tables, weights)), LAYERS)
    without = seconds["base"]["median"]
    return {
        "rows": rows,
        "adapters": adapters,
        "rank": rank,
        "seconds": seconds,
        "added_percent": (seconds["with_lora"]["median"] / without - 1) * 100,
        "alone_percent": seconds["lora_alone"]["median"] / without * 100,
    }


def _folded(
    operands: list[Operands], tables: list[tuple[LiveRanks, TileRouting]], weights: list[list[Tensor]]
) -> Callable[[int, int, Tensor], Tensor]:
    from loramill.kernels.on_device import folded, plan_of

    bases = []
    for one, mine in zip(operands, weights, strict=True):
        bases.append([fold(weight, None, *one.a.shape[1:4]) for weight in mine])
        for base, a in zip(bases[-1], one.a, strict=True):
            base.a.copy_(a)

    def project(number: int, place: int, x: Tensor) -> Tensor:
        one, (ranks, routing) = operands[place], tables[place]
        widths = one.point.projection.widths
        return folded(x, bases[place][number], one.b[number], widths, ranks, routing, plan_of(x.device))

    return project
