"""`attention.store` on a device, and what it shares with the other kernels that walk a cache of pages.

Imports Triton, so import it where it is used; semantics and shapes are those of `attention`.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from loramill.kernels.blocks import padded, store_blocks
from loramill.kernels.jit import Variant, kernel, variant

PAGE = 16
"""Tokens of a page as they are compiled for ahead of time: those of the engine's cache."""


def _store(  # type: ignore[no-untyped-def]
    keys, values, k, v, lines,
    k_row, k_head, v_row, v_head, key_page, value_page, kv_heads,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    line = tl.load(lines + row)
    page, place = line // PAGE, line % PAGE
    keep_k, keep_v = (head < kv_heads) & (d < KEY_DIM), (head < kv_heads) & (d < VALUE_DIM)
    new_k = tl.load(k + row * k_row + head * k_head + d, mask=keep_k)
    tl.store(keys + page * key_page + (head * PAGE + place) * KEY_DIM + d, new_k, mask=keep_k)
    new_v = tl.load(v + row * v_row + head * v_head + d, mask=keep_v)
    tl.store(values + page * value_page + (head * PAGE + place) * VALUE_DIM + d, new_v, mask=keep_v)


STORE = kernel(
    _store,
    wide=("keys", "values", "k", "v", "k_row", "k_head", "v_row", "v_head", "key_page", "value_page"),
    reduced="BLOCK_D",
)


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lines: Tensor) -> None:
    """`attention.store` on a device."""
    check_cache(keys, values)
    rows, kv_heads, _ = k.shape
    blocks = store_blocks(padded(max(k.shape[2], v.shape[2])))
    STORE.launch(
        (rows, -(-kv_heads // blocks.n)),
        {
            **{"keys": keys, "values": values, "k": side_by_side(k), "v": side_by_side(v), "lines": lines},
            **{"k_row": k.stride(0), "k_head": k.stride(1), "v_row": v.stride(0), "v_head": v.stride(1)},
            **{"key_page": keys.stride(0), "value_page": values.stride(0), "kv_heads": kv_heads},
        },
        blocks,
        KEY_DIM=k.shape[2],
        VALUE_DIM=v.shape[2],
        PAGE=keys.shape[2],
    )


def side_by_side(x: Tensor) -> Tensor:
    """The same tensor.

    Raises:
        ValueError: the numbers of its last dimension do not stand side by side.
    """
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"a kernel wants a contiguous last dimension, not strides {x.stride()} for {list(x.shape)}")
    return x


def check_cache(keys: Tensor, values: Tensor) -> None:
    """A layer's cache as the kernels walk it.

    Raises:
        ValueError: a page is not contiguous, or the two are of different pages.
    """
    for cache_of in (keys, values):
        _, _, size, dim = cache_of.shape
        if cache_of.stride()[1:] != (size * dim, dim, 1):
            raise ValueError(f"a page of the cache must be contiguous, not with strides {cache_of.stride()}")
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"keys and values must be of the same pages, not {list(keys.shape)} and {list(values.shape)}")


def store_variant(dim: int, dtype: str, aligned: bool, hip: bool) -> Variant:
    """The program for heads of one size."""
    pointers = dict.fromkeys(("keys", "values", "k", "v"), dtype)
    blocks = store_blocks(padded(dim))
    return variant(STORE, aligned, pointers, blocks, hip, KEY_DIM=dim, VALUE_DIM=dim, PAGE=PAGE)
