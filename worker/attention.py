"""Attention over a packed batch and our cache, as transformers' attention interface asks for it.

Per sequence: softmax(q k^T * scaling + mask) v, causal, grouped-query, with the layer's sliding window and soft cap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from loramill.worker.batch import Batch, Decode, Prefill, Probe, current
from loramill.worker.cache import LayerShape

NAME = "loramill"
"""What `attn_implementation` is set to. No mask function is registered under it, so no T x T mask is ever built."""

_INERT = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}
"""Keyword arguments that change nothing here: packing and causality come from the batch itself."""


class UnsupportedAttention(Exception):
    """The model asks its attention for something that we would have to ignore."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **asked: object,
) -> tuple[Tensor, None]:
    """query [1, heads, T, dim], key and value [1, kv_heads, T, dim] of the current batch -> [1, T, heads, dim].

    Raises:
        UnsupportedAttention: an argument that we do not honour, such as attention sinks.
    """
    layer = getattr(module, "layer_idx", None)
    unknown = sorted(name for name, given in asked.items() if given is not None and name not in _INERT)
    if unknown or attention_mask is not None or dropout or not isinstance(layer, int):
        what = ", ".join(unknown) or ("a mask" if attention_mask is not None else "dropout or a layer without a number")
        raise UnsupportedAttention(f"{type(module).__name__} needs {what}, which this engine does not serve")
    batch = current()
    if isinstance(batch, Probe):
        batch.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, dim]
    batch.cache.write(layer, batch.places, k, v)
    out = query.new_empty(q.shape[0], q.shape[1], v.shape[2])
    options = _Options(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    for prefill in batch.prefills:
        out.index_copy_(0, prefill.rows, _prefill(batch, layer, prefill, q, k, v, options))
    if batch.decodes:
        answers = [_decode(batch, layer, decode, q, options) for decode in batch.decodes]
        out.index_copy_(0, batch.decode_rows, torch.cat(answers) if len(answers) > 1 else answers[0])
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)


class _Options:
    __slots__ = ("scale", "softcap", "window")

    def __init__(self, scale: float, window: int | None, softcap: float | None) -> None:
        self.scale, self.window, self.softcap = scale, window, softcap

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q [n, heads, t, dim], k and v [n, heads, length, dim] -> [n, heads, t, dim]."""
        if not self.softcap:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)
        scores = torch.tanh(q @ k.transpose(2, 3) * (self.scale / self.softcap)) * self.softcap
        if causal:
            mask = _causal(q.shape[2], k.shape[2], None, q.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _prefill(batch: Batch, layer: int, prefill: Prefill, q: Tensor, k: Tensor, v: Tensor, options: _Options) -> Tensor:
    """The prompts' queries against their own keys and, for a later chunk, what the cache holds before: [rows, ...]."""
    count, past = prefill.count, prefill.past
    length = past + count
    queries = q.index_select(0, prefill.rows).view(-1, count, *q.shape[1:]).transpose(1, 2)
    if past:
        span = slice(prefill.offset, prefill.offset + length)
        keys, values = batch.cache.keys[layer][None, span], batch.cache.values[layer][None, span]
    else:
        keys = k.index_select(0, prefill.rows).view(-1, count, *k.shape[1:])
        values = v.index_select(0, prefill.rows).view(-1, count, *v.shape[1:])
    group = q.shape[1] // k.shape[1]
    causal = not past and (options.window is None or length <= options.window)
    mask = None if causal else _causal(count, length, options.window, q.device)
    answer = options.attend(queries, _per_query(keys, group), _per_query(values, group), mask, causal)
    return answer.transpose(1, 2).reshape(prefill.rows.shape[0], q.shape[1], -1)


def _decode(batch: Batch, layer: int, decode: Decode, q: Tensor, options: _Options) -> Tensor:
    """One token of each row of a slab. The query heads of a KV group stand as query length: no key is ever repeated."""
    keys, values = (_rows(store[layer], decode) for store in (batch.cache.keys, batch.cache.values))
    n, heads, kv_heads = keys.shape[0], q.shape[1], keys.shape[1]
    queries = q.index_select(0, decode.queries).view(n, kv_heads, heads // kv_heads, -1)
    answer = options.attend(queries, keys, values, decode.mask(options.window), causal=False).reshape(n, heads, -1)
    return answer if decode.answered is None else answer.index_select(0, decode.answered)


def _rows(store: Tensor, decode: Decode) -> Tensor:
    """The slab's rows as a view: [n, heads, longest, dim]."""
    n, heads, dim = decode.queries.shape[0], *store.shape[1:]
    span = store[decode.offset : decode.offset + n * decode.capacity]
    return span.view(n, decode.capacity, heads, dim)[:, : decode.longest].transpose(1, 2)


def _per_query(keys: Tensor, group: int) -> Tensor:
    """[n, length, kv_heads, dim] -> [n, kv_heads * group, length, dim]."""
    n, length, heads, dim = keys.shape
    keys = keys.transpose(1, 2)
    if group == 1:
        return keys
    return keys[:, :, None].expand(n, heads, group, length, dim).reshape(n, heads * group, length, dim)


def _causal(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Who the last `count` of `length` positions may attend to: [count, length] bool."""
    key = torch.arange(length, device=device)
    query = torch.arange(length - count, length, device=device)[:, None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
