"""`layer` on a device, each function one pass over memory. Imports Triton, so import it where it is used; semantics and
shapes are at its head, and every rounding is where the plain forms have it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramill.kernels.blocks import GATED_BLOCKS, norm_blocks, rope_blocks
from loramill.kernels.jit import DTYPES, Variant, kernel, rounded, variant
from loramill.kernels.store_triton import PAGE, check_cache, side_by_side

WIDEST = 16384
"""The most columns that one program normalizes: 32 numbers in each of its threads."""
GELU = 0.7978845608028654
"""sqrt(2 / pi)"""


@triton.jit
def normed(wide, weight, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number normed and rounded, then its product with the weight, rounded."""
    near = rounded(wide * scale, dtype).to(tl.float32)
    return rounded(near * weight.to(tl.float32), dtype)


def _add_rms_norm(  # type: ignore[no-untyped-def]
    y, s, x, residual, weight,
    x_row, residual_row, columns, adds, eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    keep = n < columns
    sums = tl.load(x + row * x_row + n, mask=keep, other=0.0)
    if adds:
        old = tl.load(residual + row * residual_row + n, mask=keep, other=0.0)
        sums = rounded(sums.to(tl.float32) + old.to(tl.float32), dtype)
        tl.store(s + row * columns + n, sums, mask=keep)
    wide = sums.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
    tl.store(y + row * columns + n, normed(wide, tl.load(weight + n, mask=keep), scale, dtype), mask=keep)


def _rope_store(  # type: ignore[no-untyped-def]
    q, keys, values, qkv, cos, sin, lines, query_norm, key_norm,
    qkv_row, angle_row, key_page, value_page, heads, kv_heads, norms, eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = qkv.dtype.element_ty
    half: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    is_q, is_k = head < heads, (head >= heads) & (head < heads + kv_heads)
    is_v = (head >= heads + kv_heads) & (head < heads + 2 * kv_heads)
    turns, there = is_q | is_k, d < half
    at = qkv + row * qkv_row + head * DIM + d
    v_first = tl.load(at, mask=(turns | is_v) & there, other=0.0)
    v_second = tl.load(at + half, mask=(turns | is_v) & there, other=0.0)
    first, second = tl.where(turns, v_first, 0.0), tl.where(turns, v_second, 0.0)
    if norms:
        wide, wide_second = first.to(tl.float32), second.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide + wide_second * wide_second, 1) / DIM + eps)[:, None]
        weight = tl.load(query_norm + d + head * 0, mask=is_q & there, other=0.0)
        weight += tl.load(key_norm + d + head * 0, mask=is_k & there, other=0.0)
        first = normed(wide, weight, scale, dtype)
        weight = tl.load(query_norm + half + d + head * 0, mask=is_q & there, other=0.0)
        weight += tl.load(key_norm + half + d + head * 0, mask=is_k & there, other=0.0)
        second = normed(wide_second, weight, scale, dtype)
    c = tl.load(cos + row * angle_row + d, mask=there, other=0.0)
    s = tl.load(sin + row * angle_row + d, mask=there, other=0.0)
    left, right = first.to(tl.float32), second.to(tl.float32)
    first, second = rounded(left * c - right * s, dtype), rounded(right * c + left * s, dtype)
    q_at = q + (row * heads + head) * DIM + d
    tl.store(q_at, first, mask=is_q & there)
    tl.store(q_at + half, second, mask=is_q & there)
    line = tl.load(lines + row)
    page, place = line // PAGE, line % PAGE
    k_at = keys + page * key_page + ((head - heads) * PAGE + place) * DIM + d
    tl.store(k_at, first, mask=is_k & there)
    tl.store(k_at + half, second, mask=is_k & there)
    v_at = values + page * value_page + ((head - heads - kv_heads) * PAGE + place) * DIM + d
    tl.store(v_at, v_first, mask=is_v & there)
    tl.store(v_at + half, v_second, mask=is_v & there)


def _gated(  # type: ignore[no-untyped-def]
    y, gate_up,
    gate_up_row, columns,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    keep = n < columns
    at = gate_up + row * gate_up_row + n
    gate = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(at + columns, mask=keep, other=0.0).to(tl.float32)
    inner = gate if SILU else 2.0 * GELU_SCALE * (gate + 0.044715 * gate * gate * gate)
    # Half of 1 + tanh(z) is the logistic function of 2z.
    acted = rounded(gate / (1.0 + tl.exp(-inner)), dtype).to(tl.float32)
    tl.store(y + row * columns + n, rounded(acted * up, dtype), mask=keep)


GELU_SCALE = tl.constexpr(GELU)
NORM = kernel(
    _add_rms_norm,
    wide=("y", "s", "x", "residual", "weight", "x_row", "residual_row", "columns"),
    reduced="BLOCK_D",
)
ROPE = kernel(
    _rope_store,
    wide=(
        *("q", "keys", "values", "qkv", "cos", "sin", "query_norm", "key_norm"),
        *("qkv_row", "angle_row", "key_page", "value_page"),
    ),
    reduced="BLOCK_D",
)
GATED = kernel(_gated, wide=("y", "gate_up", "gate_up_row", "columns"), reduced="BLOCK_D")


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`layer.add_rms_norm` on a device.

    Raises:
        ValueError: a row is wider than one program takes.
    """
    rows, columns = x.shape
    if columns > WIDEST:
        raise ValueError(f"a row must have at most {WIDEST} columns, not {columns}")
    y = x.new_empty(rows, columns)
    s = x if residual is None else x.new_empty(rows, columns)
    old = x if residual is None else side_by_side(residual)
    NORM.launch(
        (rows,),
        {
            **{"y": y, "s": s, "x": side_by_side(x), "residual": old, "weight": weight, "eps": eps},
            **{"x_row": x.stride(0), "residual_row": old.stride(0), "columns": columns},
            "adds": int(residual is not None),
        },
        norm_blocks(columns),
    )
    return y, s


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lines: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`layer.rope_store` on a device."""
    check_cache(keys, values)
    kv_heads, page, dim = keys.shape[1:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q = qkv.new_empty(qkv.shape[0], heads, dim)
    query_norm, key_norm = norms or (qkv, qkv)
    blocks = rope_blocks(dim)
    ROPE.launch(
        (qkv.shape[0], -(-(heads + 2 * kv_heads) // blocks.n)),
        {
            **{"q": q, "keys": keys, "values": values, "qkv": side_by_side(qkv), "cos": side_by_side(cos)},
            **{"sin": side_by_side(sin), "lines": lines, "query_norm": query_norm, "key_norm": key_norm},
            **{"qkv_row": qkv.stride(0), "angle_row": cos.stride(0), "key_page": keys.stride(0)},
            **{"value_page": values.stride(0), "heads": heads, "kv_heads": kv_heads},
            **{"norms": int(norms is not None), "eps": eps},
        },
        blocks,
        DIM=dim,
        PAGE=page,
    )
    return q


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`layer.gated` on a device."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, columns)
    GATED.launch(
        (rows, -(-columns // GATED_BLOCKS.k)),
        {"y": y, "gate_up": side_by_side(gate_up), "gate_up_row": gate_up.stride(0), "columns": columns},
        GATED_BLOCKS,
        SILU={"silu": True, "gelu_pytorch_tanh": False}[activation],
    )
    return y


def layer_variants(hip: bool) -> Iterator[Variant]:
    """The programs that this module launches for hidden sizes of up to 16,384 and the usual head sizes, and the plain
    forms of a small one."""
    for dtype in (DTYPES[torch.float32], DTYPES[torch.bfloat16]):
        names = ("y", "s", "x", "residual", "weight", "q", "keys", "values", "qkv", "query_norm", "key_norm", "gate_up")
        pointers = dict.fromkeys(names, dtype)
        for size, aligned in ((1024, True), (2048, True), (4096, True), (8192, True), (WIDEST, True), (64, False)):
            yield variant(NORM, aligned, pointers, norm_blocks(size), hip)
        for dim, aligned in ((64, True), (96, True), (128, True), (256, True), (16, False)):
            yield variant(ROPE, aligned, pointers, rope_blocks(dim), hip, DIM=dim, PAGE=PAGE)
        for silu in (True, False):
            for aligned in (True, False):
                yield variant(GATED, aligned, pointers, GATED_BLOCKS, hip, SILU=silu)
