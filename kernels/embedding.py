"""LoRA on an embedding: A is looked up where a linear layer multiplies.

Semantics, for each row t of token tok[t] and each member (slot s, weight w) of its mix:

    y[t] = round(y[t] + sum of w * B[s].T @ A[s, tok[t]])

Shapes: y [T, N], tokens [T], A [S, V, R] (a token's numbers stand side by side, so a lookup reads one stretch),
B [S, R, N], ranks [S, 1]. An lm_head is an ordinary linear layer. Formula: PEFT's Embedding layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramill.kernels.bridge import Bridge
from loramill.kernels.check import LiveRanks, check_mixes, check_outputs, check_weights
from loramill.kernels.plan import Plan, Shape
from loramill.kernels.routing import TileRouting
from loramill.kernels.torch_forms import embedding_torch


def embedding_lora(
    y: Tensor, tokens: Tensor, a: Tensor, b: Tensor, ranks: LiveRanks, routing: TileRouting, plan: Plan | None = None
) -> None:
    """Add each routed row's delta to `y` in place. Tokens must lie below V: as in any lookup, a device cannot say so.

    Raises:
        ValueError: an operand does not fit; the message names it.
    """
    if a.ndim != 3 or 0 in a.shape:
        raise ValueError(f"a must be [S, V, R], not {list(a.shape)}")
    slots, vocabulary, rank = a.shape
    check_weights("a", a, (slots, vocabulary, rank), a)
    check_outputs(y, b, ranks, [y.shape[-1]], (slots, 1, rank), routing.rows, a)
    check_mixes(routing.mixes.below, ranks)
    if tokens.shape != (routing.rows,) or tokens.dtype not in (torch.int32, torch.int64) or tokens.device != a.device:
        raise ValueError(
            f"tokens must be [{routing.rows}] int32 or int64 on {a.device}, "
            f"not {list(tokens.shape)} {tokens.dtype} on {tokens.device}"
        )
    if y.is_cuda:
        from loramill.kernels.on_device import expand_bridge, plan_of

        dtype = str(a.dtype).removeprefix("torch.")
        shape = Shape(routing.height, routing.rows, rank, rank, y.shape[1], dtype)
        plan = plan_of(y.device) if plan is None else plan
        expand_bridge(y, looked_up(tokens, a, routing), b, [y.shape[1]], ranks, routing, shape, plan)
    else:
        embedding_torch(y, tokens, a, b, [y.shape[1]], ranks, routing)


def looked_up(tokens: Tensor, a: Tensor, routing: TileRouting) -> Bridge:
    """The bridge [1, members, T, R]: each row's token in each of its slots, in the dtype of `a`.

    Rows of the base, and members that a mix does not have, look into slot 0; nothing reads what they find.
    """
    slots = routing.mixes.slots[routing.mix_of_row.clamp(min=0)].long()
    return Bridge(a[slots, tokens.long()[:, None]].transpose(0, 1)[None])
