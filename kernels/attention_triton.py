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
from loramill.kernels.blocks import DECODE_ROWS, MOST_PARTS, attend_blocks, combine_blocks, padded
from loramill.kernels.jit import DTYPES, Variant, dot, kernel, rounded, variant
from loramill.kernels.store_triton import PAGE, check_cache, side_by_side, store_variant

LOG2E = log2(e)
NO_WINDOW = 2**31 - 1
PART_KEYS = 128
"""Keys that a part should at least have."""
PROGRAMS = 4
"""Programs for each processor that a split aims at: as many as an H200 holds at once (126 registers a thread at head
size 128), with 128 KiB of keys and values on their way. Not measured."""


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


ATTEND = kernel(
    _attend,
    wide=(
        *("out", "partial", "softmax", "q", "keys", "values"),
        *("q_row", "q_head", "out_row", "out_head", "key_page", "value_page"),
    ),
    reduced="BLOCK_D",
)
COMBINE = kernel(_combine, wide=("out", "partial", "softmax", "out_row", "out_head"), reduced="BLOCK_D")


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; of the interpreter, as many as make it split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def parts_of(programs: int, keys: int, processors: int) -> int:
    """How many parts the caches of `programs` (sequence, KV head) pairs with room for `keys` keys are cut into."""
    return max(1, min(PROGRAMS * processors // max(1, programs), -(-keys // PART_KEYS), MOST_PARTS))


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
    which = padded(max(key_dim, value_dim)), q.dtype.itemsize, ATTEND.is_aligned(wide), torch.version.hip is not None
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


HEAD_DIMS, CAPPED_DIMS, SMALL_DIM = (64, 80, 96, 128, 256), (128, 256), 16
"""What is compiled ahead of time: the usual head sizes, those of models that cap their scores (Gemma 2), and one that
only toys have, in the plain form."""


def attention_variants(hip: bool) -> Iterator[Variant]:
    """The programs that this module launches for the sizes above; those of float16 are bfloat16's, the type apart."""
    shapes = [(dim, False) for dim in (*HEAD_DIMS, SMALL_DIM)] + [(dim, True) for dim in CAPPED_DIMS]
    for dtype in (torch.float32, torch.bfloat16):
        pointers = dict.fromkeys(("out", "q", "keys", "values"), DTYPES[dtype])
        for dim, capped in shapes:
            size, aligned = padded(dim), dim != SMALL_DIM
            dims = {"KEY_DIM": dim, "VALUE_DIM": dim, "PAGE": PAGE}
            for one in (True, False):
                height, blocks = attend_blocks(size, dtype.itemsize, aligned, hip, one)
                known = dims | {"BLOCK_M": height, "ONE": one, "CAPPED": capped}
                yield variant(ATTEND, aligned, pointers, blocks, hip, **known)
            if not capped:
                yield variant(COMBINE, aligned, pointers, combine_blocks(size), hip, VALUE_DIM=dim)
                yield store_variant(dim, DTYPES[dtype], aligned, hip)
