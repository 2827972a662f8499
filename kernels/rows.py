"""Shrink and expand with programs of their own for each row: for a decode step where few rows share an adapter.

Semantics and shapes are those of `shrink` and `expand`. A tile of one row would fill 15 of its 16 rows with nothing;
here a row's products are summed as they are, in float32, so that nothing but the weights' bytes is paid for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton.language as tl
from torch import Tensor

from loramill.kernels.blocks import (
    PLAIN_ROW_EXPAND,
    PLAIN_ROW_SHRINK,
    ROW_EXPAND,
    ROW_SHRINK,
)
from loramill.kernels.bridge import Bridge
from loramill.kernels.expand import columns_of, expand_strides
from loramill.kernels.jit import DTYPES, Variant, kernel, rounded, variants
from loramill.kernels.routing import TileRouting


def _row_shrink(  # type: ignore[no-untyped-def]
    x, a, v, ranks, mix_of_row, mix_slots, mix_members,
    k_size, x_row, v_row, v_member, v_split, siblings, rank, members, n_blocks, split_blocks,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // n_blocks).to(tl.int64)
    mix = tl.load(mix_of_row + row)
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
    split = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    x_at = x + row * x_row + k
    a_at = a + (slot * siblings * rank + n)[:, None] * k_size + k[None, :]
    products = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(k_size, BLOCK_K))
    for block in range(first, last):
        k_from = block * BLOCK_K
        keep_k = k_from + k < k_size
        xs = tl.load(x_at + k_from, mask=keep_k, other=0.0).to(tl.float32)
        weights = tl.load(a_at + k_from, mask=keep_n[:, None] & keep_k[None, :], other=0.0).to(tl.float32)
        products += weights * xs[None, :]
    v_at = v + split.to(tl.int64) * v_split + member.to(tl.int64) * v_member
    tl.store(v_at + row * v_row + n, tl.sum(products, 1), mask=keep_n)


def _row_expand(  # type: ignore[no-untyped-def]
    y, v, b, ranks, mix_of_row, mix_slots, mix_weights, mix_members,
    n_size, y_row, v_row, v_member, v_plane, v_slot, end_0, end_1, end_2,
    siblings, rank, members, planes, n_blocks,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // n_blocks).to(tl.int64)
    mix = tl.load(mix_of_row + row)
    if mix < 0:
        return
    sibling, n, keep_n = columns_of(program % n_blocks, end_0, end_1, end_2, n_size, BLOCK_N)
    products = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    touched = 0
    for member in range(tl.load(mix_members + mix)):
        slot = tl.load(mix_slots + mix * members + member).to(tl.int64)
        weight = tl.load(mix_weights + mix * members + member)
        live = tl.load(ranks + slot * siblings + sibling)
        touched = tl.maximum(touched, live)
        v_at = v + member * v_member.to(tl.int64) + slot * v_slot + sibling * rank + row * v_row
        b_at = b + slot * rank * n_size + n[None, :]
        for r_from in range(0, live, BLOCK_R):
            r = r_from + tl.arange(0, BLOCK_R)
            vs = tl.load(v_at + r, mask=r < live, other=0.0).to(tl.float32)
            for plane in range(1, planes):
                vs += tl.load(v_at + plane * v_plane.to(tl.int64) + r, mask=r < live, other=0.0)
            keep_b = (r < live)[:, None] & keep_n[None, :]
            weights = tl.load(b_at + r.to(tl.int64)[:, None] * n_size, mask=keep_b, other=0.0)
            products += weights.to(tl.float32) * (vs * weight)[:, None]
    if touched == 0:
        return
    y_at = y + row * y_row + n
    base = tl.load(y_at, mask=keep_n, other=0.0).to(tl.float32)
    tl.store(y_at, rounded(base + tl.sum(products, 0), y.dtype.element_ty), mask=keep_n)


ROW_SHRINK_KERNEL = kernel(
    _row_shrink, wide=("x", "a", "v", "k_size", "x_row", "v_row", "v_member", "v_split"), reduced="BLOCK_K"
)
ROW_EXPAND_KERNEL = kernel(
    _row_expand,
    wide=("y", "v", "b", "n_size", "y_row", "v_row", "v_member", "v_plane", "v_slot", "end_0", "end_1", "end_2"),
    reduced="BLOCK_R",
)


def row_shrink(x: Tensor, a: Tensor, ranks: Tensor, routing: TileRouting, v: Tensor) -> None:
    """Fill `v` [splits, members, T, siblings * R], as `shrink` does."""
    siblings, rank, k_size = a.shape[1:]
    splits, members = v.shape[:2]
    wide = {"x": x, "a": a, "v": v, "k_size": k_size, "x_row": x.stride(0)}
    wide |= {"v_row": v.stride(2), "v_member": v.stride(1), "v_split": v.stride(0)}
    blocks = ROW_SHRINK_KERNEL.choose(wide, ROW_SHRINK, (ROW_SHRINK,), PLAIN_ROW_SHRINK)
    n_blocks = -(-siblings * rank // blocks.n)
    k_blocks = -(-k_size // blocks.k)
    table = {
        **routing.arguments(),
        "ranks": ranks,
        "siblings": siblings,
        "rank": rank,
        "n_blocks": n_blocks,
        "split_blocks": -(-k_blocks // splits),
    }
    ROW_SHRINK_KERNEL.launch((routing.rows * n_blocks, splits, members), wide | table, blocks)


def row_expand(
    y: Tensor, bridge: Bridge, b: Tensor, widths: Sequence[int], ranks: Tensor, routing: TileRouting
) -> None:
    """Add each routed row's delta to `y` in place, as `expand` does."""
    wide = expand_strides(y, bridge, b, widths)
    blocks = ROW_EXPAND_KERNEL.choose(wide, ROW_EXPAND, (ROW_EXPAND,), PLAIN_ROW_EXPAND)
    n_blocks = sum(-(-width // blocks.n) for width in widths)
    table = {
        **routing.arguments(),
        "ranks": ranks,
        "siblings": len(widths),
        "rank": b.shape[1],
        "planes": bridge.v.shape[0],
        "n_blocks": n_blocks,
    }
    ROW_EXPAND_KERNEL.launch((routing.rows * n_blocks,), wide | table, blocks)


def row_variants(hip: bool) -> Iterator[Variant]:
    """Every program that `row_shrink` and `row_expand` can launch."""
    for name in DTYPES.values():
        pointers = {"x": name, "a": name, "v": "fp32"}
        yield from variants(ROW_SHRINK_KERNEL, pointers, (ROW_SHRINK,), PLAIN_ROW_SHRINK, hip)
        for v in sorted({"fp32", name}):
            pointers = {"y": name, "v": v, "b": name}
            yield from variants(ROW_EXPAND_KERNEL, pointers, (ROW_EXPAND,), PLAIN_ROW_EXPAND, hip)
