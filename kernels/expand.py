"""The grouped expand: from the ranks up to the outputs, added to the base and rounded once.

Semantics, for each row t, its mix of members e = (slot s, weight w) and each sibling i of columns [from_i, to_i):

    y[t, from_i:to_i] = round(y[t, from_i:to_i] + sum over e of w * B[s, :live, from_i:to_i].T @ v[e, t, i])

with v the sum of its planes, in order. Shapes: y [T, N] (rows may be strided), B [S, R, N], ranks [S, siblings] int32,
v [splits, members, T, columns]; where a member's columns stand is given by strides, so v may be what the shrink left,
one product against every slot's A, or the columns beside the base's in a folded one. All in float32 up to the one
rounding. Rows of the base are neither read nor written. Widths of siblings may differ (grouped-query attention).

v in float32 meets a B of 16 bits as two numbers of 16 bits, the rounded and the rest, so the bridge between the two
products is not rounded to 8 bits: the expand waits for memory, and the second product costs nothing that is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramill.kernels.blocks import HEIGHTS, Blocks, expand_blocks, plain_expand
from loramill.kernels.bridge import Bridge
from loramill.kernels.jit import DTYPES, Variant, dot, kernel, rounded, variants
from loramill.kernels.routing import TileRouting


@triton.jit
def columns_of(block, end_0, end_1, end_2, n_size, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whose columns block `block` holds, which, and which of them are there: blocks are numbered sibling by sibling."""
    blocks_0 = tl.cdiv(end_0, BLOCK_N)
    blocks_1 = blocks_0 + tl.cdiv(end_1 - end_0, BLOCK_N)
    blocks_2 = blocks_1 + tl.cdiv(end_2 - end_1, BLOCK_N)
    in_1, in_2, in_3 = block >= blocks_0, block >= blocks_1, block >= blocks_2
    sibling = in_1.to(tl.int32) + in_2.to(tl.int32) + in_3.to(tl.int32)
    begin = tl.where(in_3, end_2, tl.where(in_2, end_1, tl.where(in_1, end_0, 0)))
    end = tl.where(in_3, n_size, tl.where(in_2, end_2, tl.where(in_1, end_1, end_0)))
    block -= tl.where(in_3, blocks_2, tl.where(in_2, blocks_1, tl.where(in_1, blocks_0, 0)))
    n = begin + block * BLOCK_N + tl.arange(0, BLOCK_N)
    return sibling, n, n < end


def _expand(  # type: ignore[no-untyped-def]
    y, v, b, ranks, order, tile_mix, tile_start, tile_rows, mix_slots, mix_weights, mix_members,
    n_size, y_row, v_row, v_member, v_plane, v_slot, end_0, end_1, end_2,
    siblings, rank, members, planes, n_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program // n_blocks
    mix = tl.load(tile_mix + tile)
    if mix < 0:
        return
    sibling, n, keep_n = columns_of(program % n_blocks, end_0, end_1, end_2, n_size, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    keep_m = m < tl.load(tile_rows + tile)
    rows = tl.load(order + tl.load(tile_start + tile) + m, mask=keep_m, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    touched = 0
    for member in range(tl.load(mix_members + mix)):
        slot = tl.load(mix_slots + mix * members + member).to(tl.int64)
        weight = tl.load(mix_weights + mix * members + member)
        live = tl.load(ranks + slot * siblings + sibling)
        touched = tl.maximum(touched, live)
        v_at = v + member * v_member.to(tl.int64) + slot * v_slot + sibling * rank + rows[:, None] * v_row
        b_at = b + slot * rank * n_size + n[None, :]
        for r_from in range(0, live, BLOCK_R):
            r = r_from + tl.arange(0, BLOCK_R)
            keep_v = keep_m[:, None] & (r < live)[None, :]
            vs = tl.load(v_at + r[None, :], mask=keep_v, other=0.0).to(tl.float32)
            for plane in range(1, planes):
                vs += tl.load(v_at + plane * v_plane.to(tl.int64) + r[None, :], mask=keep_v, other=0.0)
            vs *= weight
            keep_b = (r < live)[:, None] & keep_n[None, :]
            weights = tl.load(b_at + r.to(tl.int64)[:, None] * n_size, mask=keep_b, other=0.0)
            if weights.dtype == tl.float32:
                total = dot(vs, weights, total)
            elif weights.dtype == tl.bfloat16:
                near = rounded(vs, tl.bfloat16)
                total = dot(near, weights, total)
                total = dot(rounded(vs - near.to(tl.float32), tl.bfloat16), weights, total)
            else:
                # float16 has the digits and not the range: each row is brought to at most 1 first.
                largest = tl.max(tl.abs(vs), 1)
                scale = tl.where(largest > 0, largest, 1.0)[:, None]
                vs = vs / scale
                near = vs.to(tl.float16)
                part = dot(near, weights, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32))
                part = dot((vs - near.to(tl.float32)).to(tl.float16), weights, part)
                total += part * scale
    if touched == 0:
        return
    y_at = y + rows[:, None] * y_row + n[None, :]
    keep = keep_m[:, None] & keep_n[None, :]
    base = tl.load(y_at, mask=keep, other=0.0).to(tl.float32)
    tl.store(y_at, rounded(base + total, y.dtype.element_ty), mask=keep)


EXPAND = kernel(
    _expand,
    wide=("y", "v", "b", "n_size", "y_row", "v_row", "v_member", "v_plane", "v_slot", "end_0", "end_1", "end_2"),
    reduced="BLOCK_R",
)


def expand(
    y: Tensor, bridge: Bridge, b: Tensor, widths: Sequence[int], ranks: Tensor, routing: TileRouting, blocks: Blocks
) -> None:
    """Add each routed row's delta to `y` in place; shapes are at the head."""
    wide = expand_strides(y, bridge, b, widths)
    blocks = EXPAND.choose(wide, blocks, expand_blocks(routing.height, b.dtype.itemsize), plain_expand(routing.height))
    n_blocks = sum(-(-width // blocks.n) for width in widths)
    EXPAND.launch(
        (routing.tiles * n_blocks,),
        {
            **wide,
            **routing.arguments(),
            "ranks": ranks,
            "siblings": len(widths),
            "rank": b.shape[1],
            "planes": bridge.v.shape[0],
            "n_blocks": n_blocks,
        },
        blocks,
        BLOCK_M=routing.height,
    )


def expand_strides(y: Tensor, bridge: Bridge, b: Tensor, widths: Sequence[int]) -> dict[str, Any]:
    """The arguments of an expand whose alignment matters."""
    ends = [*accumulate(widths), *[y.shape[1]] * 3]
    v_plane, v_member, v_row, _ = bridge.v.stride()
    wide = {"y": y, "v": bridge.v, "b": b, "n_size": y.shape[1], "y_row": y.stride(0), "v_row": v_row}
    wide |= {"v_member": 0 if bridge.slot_columns else v_member, "v_plane": v_plane, "v_slot": bridge.slot_columns}
    return wide | {"end_0": ends[0], "end_1": ends[1], "end_2": ends[2]}


def expand_variants(hip: bool) -> Iterator[Variant]:
    """Every program that `expand` can launch: v in float32, or in the dtype of a folded product."""
    for dtype, name in DTYPES.items():
        for height in HEIGHTS:
            listed = expand_blocks(height, dtype.itemsize)
            for v in sorted({"fp32", name}):
                pointers = {"y": name, "v": v, "b": name}
                yield from variants(EXPAND, pointers, listed, plain_expand(height), hip, BLOCK_M=height)


def expand_reference(v: Tensor, b: Tensor, widths: Sequence[int], slots: Tensor) -> Tensor:
    """The delta in float64, for rows of one slot each: v [T, siblings, R] to [T, N]."""
    parts = b.double().split(list(widths), 2)
    return torch.cat([torch.einsum("tr,trn->tn", v[:, i].double(), p[slots]) for i, p in enumerate(parts)], 1)
