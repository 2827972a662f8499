"""Attention over a paged cache: one packed batch of sequences, each with pages of its own, some of them shared.

Semantics, for query row t of sequence i, which is position p = lengths[i] - starts[i + 1] + t of it, and its head h:

    out[t, h] = sum_j softmax_j(cap(scale * q[t, h] . K[j, h / group])) V[j, h / group]    max(0, p-window+1) <= j <= p

with cap(s) = softcap * tanh(s / softcap) where there is one, else s. Position j of sequence i lies in page
tables[i, j // size] at place j % size.

Shapes: q [T, heads, key_dim], out [T, heads, value_dim], keys [pages, kv_heads, size, key_dim], values [pages,
kv_heads, size, value_dim]; heads = group * kv_heads. What lies beyond a sequence's length counts for nothing and may be
NaN. Paged attention: 2309.06180.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from loramill.kernels import native, native_forms


@dataclass(slots=True, frozen=True)
class Pages:
    """Where n sequences of one packed batch have their queries, keys and values."""

    starts: Tensor
    """The first query row of each, and T: [n + 1] int32, growing."""
    lengths: Tensor
    """Tokens in the cache when the new ones are in it: [n] int32."""
    tables: Tensor
    """Pages in order, anything after the last one: [n, most] int32."""
    longest_query: int
    """The most query rows that a sequence has."""
    longest: int
    """The largest of `lengths`, or more."""
    _kept: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What a form makes of these numbers once for all layers."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lines: Tensor) -> None:
    """Put k [T, kv_heads, key_dim] and v [T, kv_heads, value_dim] at `lines` [T] int64 of the cache, each page * size +
    place."""
    if keys.is_cuda:
        from loramill.kernels import store_triton

        return store_triton.store(keys, values, k, v, lines)
    if native.serves(keys, values, k, v):
        native_forms.store_native(keys, values, k, v, lines)
        return
    size = keys.shape[2]
    page, place = lines // size, lines % size
    keys[page, :, place] = k
    values[page, :, place] = v


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
    """Write the attention of every query row to `out`; formula and shapes at the head of this module."""
    if q.is_cuda:
        from loramill.kernels import attention_triton

        return attention_triton.attend(out, q, keys, values, pages, scale=scale, window=window, softcap=softcap)
    if native.serves(q, keys, values) and native_forms.attends(keys, values):
        form = native_forms.attend_native
    else:
        form = attend_torch
    form(out, q, keys, values, pages, scale=scale, window=window, softcap=softcap)


def attend_torch(
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
    """The form in plain torch: every sequence's pages are gathered; those with one query row go together."""
    starts = pages.starts.tolist()
    counts = [end - start for start, end in pairwise(starts)]
    ones = [i for i, count in enumerate(counts) if count == 1]
    parts = [([i], counts[i]) for i in range(len(counts)) if counts[i] > 1]
    for members, count in ([(ones, 1)] if ones else []) + parts:
        rows = torch.tensor([starts[i] + t for i in members for t in range(count)], device=q.device)
        lengths = pages.lengths[torch.tensor(members, device=q.device)]
        tables = pages.tables[torch.tensor(members, device=q.device)]
        k, v = (_gathered(cache, tables, int(lengths.max())) for cache in (keys, values))
        n, kv_heads, longest, _ = k.shape
        # The query heads of a KV group stand as query length: no key is repeated.
        mine = q.index_select(0, rows).view(n, count, kv_heads, -1, q.shape[2]).permute(0, 2, 3, 1, 4)
        scores = (mine.reshape(n, kv_heads, -1, q.shape[2]) @ k.transpose(2, 3)).float() * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        key = torch.arange(longest, device=q.device)
        query = (lengths[:, None] - count + torch.arange(count, device=q.device))[..., None]  # [n, count, 1]
        seen = key <= query if window is None else (key <= query) & (key > query - window)
        hidden = ~seen[:, None, None]  # [n, 1, 1, count, longest]
        scores = scores.view(n, kv_heads, -1, count, longest).masked_fill_(hidden, float("-inf"))
        weights = torch.softmax(scores, -1).to(q.dtype).view(n, kv_heads, -1, longest)
        # A place that nobody wrote may hold NaN, and 0 * NaN is NaN.
        v.masked_fill_((key >= lengths[:, None])[:, None, :, None], 0)
        answer = (weights @ v).view(n, kv_heads, -1, count, v.shape[3]).permute(0, 3, 1, 2, 4)
        out.index_copy_(0, rows, answer.reshape(len(rows), q.shape[1], -1))


def _gathered(cache: Tensor, tables: Tensor, longest: int) -> Tensor:
    """A copy [n, kv_heads, longest, dim] of what the tables name."""
    size = cache.shape[2]
    used = tables[:, : -(-longest // size)].long()
    found = cache.index_select(0, used.reshape(-1)).view(*used.shape, *cache.shape[1:])
    return found.transpose(1, 2).flatten(2, 3)[:, :, :longest]
