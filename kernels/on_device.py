"""The multi-LoRA operator on a device: the plan's decision carried out. Imports Triton, so import it where it is used.

Semantics and shapes are those of `shrink` and `expand`; scratch between them is allocated here, which a CUDA graph
takes into its own pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor

from loramill.kernels.bridge import Bridge, Folded, all_slots
from loramill.kernels.check import LiveRanks, check_mixes, check_outputs
from loramill.kernels.expand import expand
from loramill.kernels.plan import Launch, Plan, Regime, Shape, load_plan
from loramill.kernels.routing import TileRouting
from loramill.kernels.rows import row_expand, row_shrink
from loramill.kernels.shrink import shrink


@cache
def plan_of(device: torch.device) -> Plan:
    """The plan of a CUDA device, read once.

    Raises:
        ValueError: its file cannot be used.
    """
    return load_plan(torch.cuda.get_device_name(device), triton.__version__)


def shape_of(x: Tensor, rank: int, n_size: int, routing: TileRouting) -> Shape:
    """What the plan decides by."""
    return Shape(routing.height, x.shape[0], rank, x.shape[1], n_size, str(x.dtype).removeprefix("torch."))


def run(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    widths: Sequence[int],
    ranks: LiveRanks,
    routing: TileRouting,
    plan: Plan,
) -> None:
    """Add each routed row's delta to `y` in place, as the plan says; operands are checked by the caller."""
    siblings, rank = a.shape[1:3]
    shape = shape_of(x, rank, y.shape[1], routing)
    launch = plan.launch(shape, routing.tiles, siblings * rank)
    carry_out(launch, y, x, a, b, widths, ranks.tensor, routing)


def carry_out(
    launch: Launch,
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    widths: Sequence[int],
    ranks: Tensor,
    routing: TileRouting,
) -> None:
    """One decision, whatever the plan: for the plan's own use and for measuring."""
    siblings, rank = a.shape[1:3]
    shape = shape_of(x, rank, y.shape[1], routing)
    if launch.regime is Regime.ALL_SLOTS:
        bridge = all_slots(x, a)
    else:
        members = routing.mixes.slots.shape[1]
        size = (launch.splits, members, x.shape[0], siblings * rank)
        bridge = Bridge(torch.empty(size, dtype=torch.float32, device=x.device))
    if launch.regime is Regime.ROWS:
        row_shrink(x, a, ranks, routing, bridge.v)
        row_expand(y, bridge, b, widths, ranks, routing)
        return
    if launch.regime is Regime.GROUPED:
        shrink(x, a, ranks, routing, bridge.v, shape.shrink_blocks[launch.shrink])
    expand(y, bridge, b, widths, ranks, routing, shape.expand_blocks[launch.expand])


def folded(
    x: Tensor, base: Folded, b: Tensor, widths: Sequence[int], ranks: LiveRanks, routing: TileRouting, plan: Plan
) -> Tensor:
    """The base's output [T, N] of x [T, K] with each routed row's delta, from one GEMM and one expand.

    Raises:
        ValueError: an operand does not fit.
    """
    slots, siblings, rank, k_size = base.a.shape
    if x.shape != (routing.rows, k_size) or x.dtype is not base.a.dtype or x.device != base.a.device:
        raise ValueError(
            f"x must be [{routing.rows}, {k_size}] {base.a.dtype} on {base.a.device}, "
            f"not {list(x.shape)} {x.dtype} on {x.device}"
        )
    check_mixes(routing.mixes.below, ranks)
    y, bridge = base.product(x)
    check_outputs(y, b, ranks, widths, (slots, siblings, rank), routing.rows, base.a)
    expand_bridge(y, bridge, b, widths, ranks, routing, shape_of(x, rank, y.shape[1], routing), plan)
    return y


def expand_bridge(
    y: Tensor,
    bridge: Bridge,
    b: Tensor,
    widths: Sequence[int],
    ranks: LiveRanks,
    routing: TileRouting,
    shape: Shape,
    plan: Plan,
) -> None:
    """Expand a bridge that something else than the shrink made, with the blocks that the plan has for the shape."""
    launch = plan.launch(shape, routing.tiles, len(widths) * b.shape[1])
    if launch.regime is Regime.ROWS:
        row_expand(y, bridge, b, widths, ranks.tensor, routing)
    else:
        expand(y, bridge, b, widths, ranks.tensor, routing, shape.expand_blocks[launch.expand])
