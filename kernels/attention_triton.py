"""`attention` on a device. Imports Triton, so import it where it is used; semantics and shapes are at its head.

The query heads of a KV group times query rows are the rows of one product: row m of a sequence is query row m // group,
head m % group. Rows are cut into tiles; sequences with one query row have programs of their own, which a long cache
can be split over: each part leaves a softmax of its own, and a second kernel adds the parts in order, so no atomics.
Grids depend on the packed rows, on sequences and on the width of the page tables, never on lengths: a CUDA graph
captured at any lengths serves all others. Online softmax: 2205.14135; splitting keys at decode: Flash-Decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramill.kernels.attention import Pages
from loramill.kernels.blocks import Blocks
from loramill.kernels.jit import DTYPES, Variant, dot, kernel, rounded, variant

LOG2E = log2(e)
NO_WINDOW = 2**31 - 1
DECODE_ROWS = 16
"""Rows of a tile of a sequence with one query row: the least that tensor cores take, mostly more than a group has."""
MOST_PARTS = 32
"""Parts of a long cache at most: what one program adds."""
PART_KEYS = 128
"""Keys that a part should at least have."""
PROGRAMS = 4
"""Programs for each processor that a split aims at. Two of them are resident at once with 96 KiB of keys and values in
flight, so this is two rounds. Not measured."""


def attend_blocks(dim: int, itemsize: int, aligned: bool, hip: bool, one: bool) -> tuple[int, Blocks]:
    """Rows of a tile, and the keys (n) that are met at once; `dim` is the padded head size.

    What spills nothing: float32 multiplies without tensor cores, and AMD's masked loads take scalar registers by key.
    """
    if not aligned:
        return DECODE_ROWS, Blocks(16, dim, 4, 2)
    if itemsize == 4:
        return 16 if one or dim > 128 else 32, Blocks(32 if dim <= 64 and not hip else 16, dim, 4, 3 if one else 2)
    if one:
        return DECODE_ROWS, Blocks((64 if dim <= 128 else 32) // (2 if hip else 1), dim, 4, 3)
    return 128 if dim <= 128 else 64, Blocks(16 if hip else 64 if dim <= 64 else 32, dim, 8, 3)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """To 1.2e-7 of 1; exact at both infinities."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def sequence_of(program, starts, sequences, group, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sequence that a tile belongs to: sequence i has those from starts[i] * group // BLOCK_M + i on."""
    low, high = 0, sequences
    while low < high:
        middle = (low + high) // 2
        before = tl.load(starts + middle) * group // BLOCK_M + middle <= program
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
    return low - 1


def _attend(  # type: ignore[no-untyped-def]
    out, partial, softmax, q, keys, values, starts, lengths, tables,
    q_row, q_head, out_row, out_head, key_page, value_page,
    sequences, group, most, window, parts, tiles, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, ONE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    program, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = program // tiles if ONE else sequence_of(program, starts, sequences, group, BLOCK_M)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    if (count == 1) != ONE:
        return
    tile = program % tiles if ONE else program - (start * group // BLOCK_M + sequence)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_m = m < count * group
    if tile * BLOCK_M >= count * group:
        return
    row = (start + m // group).to(tl.int64)
    head = kv_head * group + m % group
    d = tl.arange(0, BLOCK_D)
    q_at = q + row[:, None] * q_row + head[:, None] * q_head + d[None, :]
    qs = tl.load(q_at, mask=keep_m[:, None] & (d < KEY_DIM)[None, :], other=0.0)
    length = tl.load(lengths + sequence)
    position = length - count + m // group
    # What the tile's first row sees no more and its last row not yet is no row's.
    first = tl.maximum(length - count + tile * BLOCK_M // group - window + 1, 0)
    end = length - count + (tl.minimum((tile + 1) * BLOCK_M, count * group) - 1) // group + 1
    block, last = first // BLOCK_N, tl.cdiv(end, BLOCK_N)
    if ONE:
        each = tl.cdiv(last - block, parts)
        block += part * each
        last = tl.minimum(block + each, last)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    answer = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    table = tables + sequence.to(tl.int64) * most
    for number in range(block, last):
        key = number * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = (key >= first) & (key < end)
        page = tl.load(table + key // PAGE, mask=keep, other=0).to(tl.int64)[:, None]
        line = (kv_head * PAGE + key % PAGE)[:, None]
        keep_k = keep[:, None] & (d < KEY_DIM)[None, :]
        ks = tl.load(keys + page * key_page + line * KEY_DIM + d[None, :], mask=keep_k, other=0.0)
        scores = dot(qs, tl.trans(ks), tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)) * scale
        if CAPPED:
            scores = softcap * tanh(scores)
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen & keep[None, :], scores, float("-inf"))
        above = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing yet: -inf minus -inf is no number.
        level = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp2(scores - level[:, None])
        smaller = tl.exp2(peak - level)
        total = total * smaller + tl.sum(weights, 1)
        keep_v = keep[:, None] & (d < VALUE_DIM)[None, :]
        vs = tl.load(values + page * value_page + line * VALUE_DIM + d[None, :], mask=keep_v, other=0.0)
        answer = dot(rounded(weights, values.dtype.element_ty), vs, answer * smaller[:, None])
        peak = above
    keep_out = keep_m[:, None] & (d < VALUE_DIM)[None, :]
    if ONE and parts > 1:
        at = (sequence.to(tl.int64) * (tl.num_programs(1) * group) + head) * parts + part
        tl.store(partial + at[:, None] * VALUE_DIM + d[None, :], answer, mask=keep_out)
        tl.store(softmax + at * 2, peak, mask=keep_m)
        tl.store(softmax + at * 2 + 1, total, mask=keep_m)
    else:
        answer = answer / tl.where(total == 0.0, 1.0, total)[:, None]
        out_at = out + row[:, None] * out_row + head[:, None] * out_head + d[None, :]
        tl.store(out_at, rounded(answer, out.dtype.element_ty), mask=keep_out)


def _combine(  # type: ignore[no-untyped-def]
    out, partial, softmax, starts,
    out_row, out_head, parts,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + sequence)
    if tl.load(starts + sequence + 1) - start != 1:
        return
    part, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    at = (sequence.to(tl.int64) * tl.num_programs(1) + head) * parts + part
    keep = part < parts
    peak = tl.load(softmax + at * 2, mask=keep, other=float("-inf"))
    total = tl.load(softmax + at * 2 + 1, mask=keep, other=0.0)
    # A part that met nothing left 0, and no answer that counts.
    keep_d = (keep & (total != 0.0))[:, None] & (d < VALUE_DIM)[None, :]
    answers = tl.load(partial + at[:, None] * VALUE_DIM + d[None, :], mask=keep_d, other=0.0)
    above = tl.max(peak, 0)
    share = tl.exp2(peak - tl.where(above == float("-inf"), 0.0, above))
    whole = tl.sum(share * total, 0)
    answer = tl.sum(share[:, None] * answers, 0) / tl.where(whole == 0.0, 1.0, whole)
    out_at = out + start.to(tl.int64) * out_row + head * out_head + d
    tl.store(out_at, rounded(answer, out.dtype.element_ty), mask=d < VALUE_DIM)


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


ATTEND = kernel(
    _attend,
    wide=(
        *("out", "partial", "softmax", "q", "keys", "values"),
        *("q_row", "q_head", "out_row", "out_head", "key_page", "value_page"),
    ),
    reduced="BLOCK_D",
)
COMBINE = kernel(_combine, wide=("out", "partial", "softmax", "out_row", "out_head"), reduced="BLOCK_D")
STORE = kernel(
    _store,
    wide=("keys", "values", "k", "v", "k_row", "k_head", "v_row", "v_head", "key_page", "value_page"),
    reduced="BLOCK_D",
)


def padded(*dims: int) -> int:
    """The power of two that a head of these sizes takes."""
    size: int = triton.next_power_of_2(max(*dims, 16))
    return size


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; of the interpreter, as many as make it split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def parts_of(programs: int, keys: int, processors: int) -> int:
    """How many parts the caches of `programs` (sequence, KV head) pairs with room for `keys` keys are cut into."""
    return max(1, min(PROGRAMS * processors // max(1, programs), -(-keys // PART_KEYS), MOST_PARTS))


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lines: Tensor) -> None:
    """`attention.store` on a device."""
    check_cache(keys, values)
    rows, kv_heads, _ = k.shape
    blocks = store_blocks(padded(k.shape[2], v.shape[2]))
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


def attend(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Pages,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """`attention.attend` on a device, whose tables say for how many keys there is room."""
    check_cache(keys, values)
    rows, heads, key_dim = q.shape
    kv_heads, page, value_dim = values.shape[1:]
    group, sequences, most = heads // kv_heads, pages.lengths.shape[0], pages.tables.shape[1]
    tiles = -(-group // DECODE_ROWS)
    parts = parts_of(sequences * kv_heads * tiles, most * page, processors(q.device))
    wide = {
        **{"out": side_by_side(out), "q": side_by_side(q), "keys": keys, "values": values},
        **{
            "partial": scratch(q, sequences * heads, parts, value_dim),
            "softmax": scratch(q, sequences * heads, parts, 2),
        },
        **{"q_row": q.stride(0), "q_head": q.stride(1), "out_row": out.stride(0), "out_head": out.stride(1)},
        **{"key_page": keys.stride(0), "value_page": values.stride(0)},
    }
    given = {
        **wide,
        **{"starts": pages.starts, "lengths": pages.lengths, "tables": side_by_side(pages.tables)},
        **{"sequences": sequences, "group": group, "most": pages.tables.stride(0), "window": window or NO_WINDOW},
        **{"parts": parts, "tiles": tiles, "scale": scale / softcap if softcap else scale * LOG2E},
        "softcap": softcap * LOG2E if softcap else 0.0,
    }
    which = padded(key_dim, value_dim), q.dtype.itemsize, ATTEND.is_aligned(wide), torch.version.hip is not None
    shape = {"KEY_DIM": key_dim, "VALUE_DIM": value_dim, "PAGE": page, "CAPPED": bool(softcap)}
    height, blocks = attend_blocks(*which, one=True)
    ATTEND.launch((sequences * tiles, kv_heads, parts), given, blocks, BLOCK_M=height, ONE=True, **shape)
    if parts > 1:
        COMBINE.launch((sequences, heads), given, combine_blocks(which[0]), VALUE_DIM=value_dim)
    if pages.longest_query > 1:
        height, blocks = attend_blocks(*which, one=False)
        grid = (rows * group // height + sequences, kv_heads, 1)
        ATTEND.launch(grid, given, blocks, BLOCK_M=height, ONE=False, **shape)


def scratch(like: Tensor, rows: int, parts: int, columns: int) -> Tensor:
    """What the parts leave, float32; nothing where there is one."""
    return torch.empty(rows * parts * columns if parts > 1 else 0, dtype=torch.float32, device=like.device)


def combine_blocks(dim: int) -> Blocks:
    """All parts at once."""
    return Blocks(MOST_PARTS, dim, 4, 1)


def store_blocks(dim: int) -> Blocks:
    """Heads that one program stores."""
    return Blocks(max(1, 1024 // dim), dim, 4, 1)


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


HEAD_DIMS, CAPPED_DIMS, SMALL_DIM, PAGE = (64, 80, 96, 128, 256), (128, 256), 16, 16
"""What is compiled ahead of time: the usual head sizes, those of models that cap their scores (Gemma 2), one that only
toys have, in the plain form, and the page of the engine's cache."""


def attention_variants(hip: bool) -> Iterator[Variant]:
    """The programs that this module launches for the sizes above; those of float16 are bfloat16's, the type apart."""
    shapes = [(dim, False) for dim in (*HEAD_DIMS, SMALL_DIM)] + [(dim, True) for dim in CAPPED_DIMS]
    for dtype in (torch.float32, torch.bfloat16):
        pointers = dict.fromkeys(("out", "q", "keys", "values", "k", "v"), DTYPES[dtype])
        for dim, capped in shapes:
            size, aligned = padded(dim), dim != SMALL_DIM
            dims = {"KEY_DIM": dim, "VALUE_DIM": dim, "PAGE": PAGE}
            for one in (True, False):
                height, blocks = attend_blocks(size, dtype.itemsize, aligned, hip, one)
                known = dims | {"BLOCK_M": height, "ONE": one, "CAPPED": capped}
                yield variant(ATTEND, aligned, pointers, blocks, hip, **known)
            if not capped:
                yield variant(COMBINE, aligned, pointers, combine_blocks(size), hip, VALUE_DIM=dim)
                yield variant(STORE, aligned, pointers, store_blocks(size), hip, **dims)
