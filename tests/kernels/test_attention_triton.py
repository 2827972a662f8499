"""Attention over pages on the device, or in Triton's interpreter without one, against the formula in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from loramill.kernels import attention_triton
from loramill.kernels.attention import Pages
from loramill.kernels.attention_triton import PROGRAMS, attend, parts_of
from loramill.kernels.blocks import MOST_PARTS
from loramill.kernels.store_triton import store

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""||out - ref|| / ||ref||: the weights of the keys and the answer are rounded once each."""
PAGE = 16


@dataclass(slots=True, frozen=True)
class Case:
    q: Tensor
    keys: Tensor
    values: Tensor
    pages: Pages
    counts: list[int]

    def expected(self, scale: float, window: int | None, softcap: float | None) -> Tensor:
        out = torch.zeros(self.q.shape[0], self.q.shape[1], self.values.shape[3], dtype=torch.float64)
        q, keys, values = (t.double().cpu() for t in (self.q, self.keys, self.values))
        row = 0
        for i, count in enumerate(self.counts):
            length = int(self.pages.lengths[i])
            j = torch.arange(length)
            page = self.pages.tables[i].long().cpu()[j // PAGE]
            group = q.shape[1] // keys.shape[1]
            k, v = (cache[page, :, j % PAGE].repeat_interleave(group, 1) for cache in (keys, values))
            for t in range(count):
                p = length - count + t
                scores = torch.einsum("hd,jhd->hj", q[row], k) * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                seen = (j <= p) & (j > p - window) if window else j <= p
                weights = scores.masked_fill(~seen, float("-inf")).softmax(1)
                out[row] = torch.einsum("hj,jhd->hd", weights[:, seen], v[seen])
                row += 1
        return out


def make(
    counts: list[int], lengths: list[int], *, heads: int = 6, kv_heads: int = 2, dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32, spare: int = 2,
) -> Case:  # fmt: skip
    """Pages in no order, NaN wherever no sequence has a token and between the rows of q."""
    draw = torch.Generator().manual_seed(sum(lengths))
    needed = [-(-length // PAGE) for length in lengths]
    order = (torch.randperm(sum(needed) + 3, generator=draw) + 1).tolist()
    tables = torch.full((len(lengths), max(needed) + spare), -7, dtype=torch.int32)
    caches = [torch.full((len(order) + 1, kv_heads, PAGE, dim), float("nan")) for dim in dims]
    for i, length in enumerate(lengths):
        mine = [order.pop() for _ in range(needed[i])]
        tables[i, : needed[i]] = torch.tensor(mine, dtype=torch.int32)
        for number, page in enumerate(mine):
            there = min(PAGE, length - number * PAGE)
            for cache, dim in zip(caches, dims, strict=True):
                cache[page, :, :there] = torch.randn(kv_heads, there, dim, generator=draw)
    q = torch.full((sum(counts), heads * dims[0] + 16), float("nan"))
    q[:, : heads * dims[0]] = torch.randn(sum(counts), heads * dims[0], generator=draw)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    pages = Pages(
        starts.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE), tables.to(DEVICE),
        max(counts), max(lengths),
    )  # fmt: skip
    q = q.to(DEVICE, dtype)[:, : heads * dims[0]].unflatten(1, (heads, dims[0]))
    keys, values = (cache.to(DEVICE, dtype) for cache in caches)
    return Case(q, keys, values, pages, counts)


def attended(case: Case, **how: Any) -> Tensor:
    out = torch.full((*case.q.shape[:2], case.values.shape[3]), float("nan"), dtype=case.q.dtype, device=DEVICE)
    attend(out, case.q, case.keys, case.values, case.pages, **how)
    return out


def check(case: Case, scale: float = 0.2, window: int | None = None, softcap: float | None = None) -> None:
    out = attended(case, scale=scale, window=window, softcap=softcap).double().cpu()
    expected = case.expected(scale, window, softcap)
    assert torch.isfinite(out).all()
    assert (out - expected).norm() / expected.norm() < BOUNDS[case.q.dtype]


BATCHES = {
    "decode": ([1] * 5, [1, 15, 16, 17, 70]),
    "prompts": ([40, 3, 17], [40, 3, 17]),
    "chunks with a past": ([20, 2, 33], [75, 64, 34]),
    "all at once": ([1, 37, 1, 2, 1], [33, 37, 1, 40, 64]),
}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch: str, dtype: torch.dtype) -> None:
    check(make(*BATCHES[batch], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (48, 32)], ids=str)
def test_head_sizes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(make([1, 9], [30, 20], heads=2, kv_heads=1, dims=dims, dtype=dtype), scale=dims[0] ** -0.5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (7, 1), (40, 2)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    """Also a group that no tile divides, and one that no tile holds."""
    check(make([1, 21, 1], [40, 21, 3], heads=heads, kv_heads=kv_heads, dims=(16, 16)))


@pytest.mark.parametrize("window", [1, 7, 16, 40, 1000])
def test_windows(window: int) -> None:
    check(make([1, 30, 1, 5], [70, 50, 3, 90]), window=window)


def test_what_left_a_window_may_be_anything() -> None:
    case = make([1, 3], [90, 90], kv_heads=2)
    left = case.pages.tables[:, :4].flatten().long()  # positions 0 to 63; the first that counts is 87 - 20 + 1
    case.keys[left], case.values[left] = float("nan"), float("nan")
    check(case, window=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_capped_scores(dtype: torch.dtype) -> None:
    check(make([1, 12, 1], [40, 30, 70], dtype=dtype), scale=4.0, softcap=5.0)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_long_cache_is_split_the_same_way_every_time(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are more parts than blocks of keys, and beside a prompt."""
    monkeypatch.setattr(attention_triton, "parts_of", lambda *_: count)
    case = make([1, 1, 20], [300, 2, 30], dims=(16, 16))
    check(case)
    check(case, window=70)
    assert torch.equal(attended(case, scale=0.2), attended(case, scale=0.2))


def test_parts_follow_from_shapes_alone() -> None:
    assert parts_of(2048, 8192, 132) == 1
    assert parts_of(8, 8192, 132) == MOST_PARTS
    assert parts_of(100, 8192, 132) == PROGRAMS * 132 // 100
    assert parts_of(8, 200, 132) == 2
    assert parts_of(8, 0, 132) == 1


def test_a_row_of_nan_stays_alone() -> None:
    case = make([1, 20, 1], [40, 20, 30])
    case.q[4] = float("nan")
    out = attended(case, scale=0.2)
    assert out[4].isnan().all()
    assert torch.isfinite(out[torch.arange(22, device=DEVICE) != 4]).all()


def test_a_sequence_without_a_token_reads_nothing() -> None:
    """As padded rows of a graph may be."""
    case = make([1, 1], [40, 3])
    case.pages.lengths[1] = 0
    out = attended(case, scale=0.2)
    assert (out[1] == 0).all()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (80, 80), (24, 8)], ids=str)
def test_store(dims: tuple[int, int], dtype: torch.dtype) -> None:
    kv_heads, rows = 3, 7
    keys, values = (torch.zeros(5, kv_heads, PAGE, dim, dtype=dtype, device=DEVICE) for dim in dims)
    wide = torch.randn(rows, kv_heads * sum(dims) + 16, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    k, v, _ = wide.split([kv_heads * dims[0], kv_heads * dims[1], 16], 1)
    k, v = k.unflatten(1, (kv_heads, -1)), v.unflatten(1, (kv_heads, -1))
    lines = torch.tensor([3, 79, 16, 17, 40, 0, 78], device=DEVICE)
    store(keys, values, k, v, lines)
    for cache, new in ((keys, k), (values, v)):
        places = cache.transpose(1, 2).flatten(0, 1)
        assert torch.equal(places[lines], new)
        assert int((places != 0).any(2).any(1).sum()) == rows, "nothing else is written"


def test_what_a_kernel_cannot_walk_is_refused() -> None:
    case = make([1], [4])
    with pytest.raises(ValueError, match="a page of the cache must be contiguous"):
        store(case.keys.transpose(1, 2), case.values, case.q, case.q, torch.zeros(1))
    with pytest.raises(ValueError, match="contiguous last dimension"):
        attend(case.q, case.q.transpose(1, 2), case.keys, case.values, case.pages, scale=1.0)
