"""The grouped shrink: rows down to their adapters' ranks, all sibling projections in one launch.

Semantics, for each row t, member e = (slot s, weight w) of its mix, sibling i and rank column r below the live rank:

    sum over splits p of v[p, e, t, i * R + r] = A[s, i, r] @ x[t]

Shapes: x [T, K] (rows may be strided), A [S, siblings, R, K], ranks [S, siblings] int32, v [splits, members, T,
siblings * R] float32. Accumulated in float32; the K dimension may be split, each part into a plane of its own, which
the expand adds in order: no atomics, so the same bits every time. What no row's live rank needs is neither read nor
written. Formula: LoRA (2106.09685); splitting K into planes: SGLang's LoRA kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from loramill.kernels.blocks import HEIGHTS, Blocks, plain_shrink, shrink_blocks
from loramill.kernels.jit import DTYPES, Variant, dot, kernel, variants
from loramill.kernels.routing import TileRouting


def _shrink(  # type: ignore[no-untyped-def]
    x, a, v, ranks, order, tile_mix, tile_start, tile_rows, mix_slots, mix_members,
    k_size, x_row, v_row, v_member, v_split, siblings, rank, members, n_blocks, split_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Blocks of one tile are neighbours, so that they find its rows of x in the cache.
    program = tl.program_id(0)
    tile = program // n_blocks
    mix = tl.load(tile_mix + tile)
    if mix < 0:
        return
    member = tl.program_id(2)
    if member >= tl.load(mix_members + mix):
        return
    slot = tl.load(mix_slots + mix * members + member).to(tl.int64)
    n = (program % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    sibling = n // rank
    live = tl.load(ranks + slot * siblings + sibling, mask=sibling < siblings, other=0)
    keep_n = n % rank < live
    if tl.max(keep_n.to(tl.int32), 0) == 0:
        return
    m = tl.arange(0, BLOCK_M)
    keep_m = m < tl.load(tile_rows + tile)
    rows = tl.load(order + tl.load(tile_start + tile) + m, mask=keep_m, other=0).to(tl.int64)
    split = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    x_at = x + rows[:, None] * x_row + k[None, :]
    a_at = a + (slot * siblings * rank + n)[None, :] * k_size + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(k_size, BLOCK_K))
    for block in range(first, last):
        k_from = block * BLOCK_K
        keep_k = k_from + k < k_size
        xs = tl.load(x_at + k_from, mask=keep_m[:, None] & keep_k[None, :], other=0.0)
        weights = tl.load(a_at + k_from, mask=keep_k[:, None] & keep_n[None, :], other=0.0)
        total = dot(xs, weights, total)
    v_at = v + split.to(tl.int64) * v_split + member.to(tl.int64) * v_member
    tl.store(v_at + rows[:, None] * v_row + n[None, :], total, mask=keep_m[:, None] & keep_n[None, :])


SHRINK = kernel(_shrink, wide=("x", "a", "v", "k_size", "x_row", "v_row", "v_member", "v_split"), reduced="BLOCK_K")


def shrink(x: Tensor, a: Tensor, ranks: Tensor, routing: TileRouting, v: Tensor, blocks: Blocks) -> None:
    """Fill `v` [splits, members, T, siblings * R] with the planes of the shrink; shapes are at the head."""
    siblings, rank, k_size = a.shape[1:]
    splits, members = v.shape[:2]
    wide = {"x": x, "a": a, "v": v, "k_size": k_size, "x_row": x.stride(0)}
    wide |= {"v_row": v.stride(2), "v_member": v.stride(1), "v_split": v.stride(0)}
    blocks = SHRINK.choose(wide, blocks, shrink_blocks(routing.height, x.dtype.itemsize), plain_shrink(routing.height))
    n_blocks = -(-siblings * rank // blocks.n)
    k_blocks = -(-k_size // blocks.k)
    SHRINK.launch(
        (routing.tiles * n_blocks, splits, members),
        {
            **wide,
            **routing.arguments(),
            "ranks": ranks,
            "siblings": siblings,
            "rank": rank,
            "n_blocks": n_blocks,
            "split_blocks": -(-k_blocks // splits),
        },
        blocks,
        BLOCK_M=routing.height,
    )


def shrink_variants(hip: bool) -> Iterator[Variant]:
    """Every program that `shrink` can launch."""
    for dtype, name in DTYPES.items():
        for height in HEIGHTS:
            listed = shrink_blocks(height, dtype.itemsize)
            pointers = {"x": name, "a": name, "v": "fp32"}
            yield from variants(SHRINK, pointers, listed, plain_shrink(height), hip, BLOCK_M=height)


def shrink_reference(x: Tensor, a: Tensor, ranks: Tensor, slots: Tensor) -> Tensor:
    """The same in float64, for rows of one slot each: [T, siblings, R], 0 above the live rank."""
    v = torch.einsum("tk,tirk->tir", x.double(), a[slots].double())
    dead = torch.arange(a.shape[2], device=a.device) >= ranks[slots][..., None]
    return v.masked_fill(dead, 0.0)
