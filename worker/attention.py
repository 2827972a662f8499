"""Attention over a packed batch and our cache, as transformers' attention interface asks for it.

Per sequence: softmax(q k^T * scaling + mask) v, causal, grouped-query, with the layer's sliding window and soft cap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from loramill.worker.batch import Batch, Decode, Prefill, Probe, current, seen
from loramill.worker.cache import LayerShape

NAME = "loramill"
"""What `attn_implementation` is set to. No mask function is registered under it, so no T x T mask is ever built."""

_INERT = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}
"""Keyword arguments that change nothing here: packing and causality come from the batch itself."""

PRODUCTS_LENGTH = 512
"""Up to which length prompts in bfloat16 attend on a CPU by plain products instead of the fused operator.

Measured on two AVX512-BF16 cores, 12 heads of 64 over 4, ms against the fused operator's: 55 prompts of 147 tokens 23
against 42, 32 of 256 34 against 51, 8 of 512 41 against 48; 6 of 640 50 against 48, 4 of 1024 85 against 64.
"""

SCORES_AT_ONCE = 1 << 20
"""How many scores are held between the products: from 2^18 on alike, at 2^21 they fall out of the processor's cache."""


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
    shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
    if isinstance(batch, Probe):
        batch.shapes[layer] = shape
        return query.new_zeros(1, query.shape[2], query.shape[1], shape.value_dim), None
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, dim]
    batch.write(layer, shape, k, v)
    out = query.new_empty(q.shape[0], q.shape[1], shape.value_dim)
    how = _How(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    for prefill in batch.prefills:
        out.index_copy_(0, prefill.rows, _prefill(batch, layer, prefill, q, k, v, how))
    if batch.decodes:
        answers = [_decode(batch, layer, decode, q, how) for decode in batch.decodes]
        out.index_copy_(0, batch.decode_rows, torch.cat(answers) if len(answers) > 1 else answers[0])
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)


class _How(NamedTuple):
    scale: float
    window: int | None
    softcap: float | None


def _prefill(batch: Batch, layer: int, prefill: Prefill, q: Tensor, k: Tensor, v: Tensor, how: _How) -> Tensor:
    """The prompts' queries against their own keys and, for a later chunk, what the cache holds before: [rows, ...]."""
    count, length = prefill.count, prefill.past + prefill.count
    queries = q.index_select(0, prefill.rows).view(-1, count, *q.shape[1:]).transpose(1, 2)
    if prefill.past:
        keys, values = (t[:, :, :length] for t in batch.cache.rows(layer, prefill.room))
    else:
        keys = k.index_select(0, prefill.rows).view(-1, count, *k.shape[1:]).transpose(1, 2)
        values = v.index_select(0, prefill.rows).view(-1, count, *v.shape[1:]).transpose(1, 2)
    if how.softcap or _by_products(q, length):
        answer = _products(queries, keys, values, prefill.bias(how.window, q.shape[1] // k.shape[1]), how)
    else:
        group = q.shape[1] // k.shape[1]
        plain = not prefill.past and (how.window is None or length <= how.window)
        mask = None if plain else seen(count, length, how.window, q.device)
        keys, values = _per_query_head(keys, group), _per_query_head(values, group)
        answer = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=plain, scale=how.scale)
        answer = answer.transpose(1, 2)
    return answer.reshape(prefill.rows.shape[0], q.shape[1], -1)


def _by_products(q: Tensor, length: int) -> bool:
    return q.device.type == "cpu" and q.dtype is torch.bfloat16 and length <= PRODUCTS_LENGTH


def _products(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, how: _How) -> Tensor:
    """[n, heads, count, dim] queries, [n, kv_heads, length, dim] keys and values -> [n, count, heads, dim].

    A few sequences at a time, so that their scores stay in the processor's cache.
    """
    n, heads, count, _ = queries.shape
    kv_heads, length = keys.shape[1:3]
    out = queries.new_empty(n, count, heads, values.shape[3])
    step = max(1, SCORES_AT_ONCE // (heads * count * length))
    for first in range(0, n, step):
        part = slice(first, first + step)
        mine = queries[part].reshape(-1, heads // kv_heads * count, queries.shape[3])
        scores = torch.bmm(mine, keys[part].flatten(0, 1).transpose(1, 2))
        answer = torch.bmm(_weights(scores, bias, how).to(queries.dtype), values[part].flatten(0, 1))
        out[part] = answer.view(-1, heads, count, values.shape[3]).transpose(1, 2)
    return out


def _decode(batch: Batch, layer: int, decode: Decode, q: Tensor, how: _How) -> Tensor:
    """One token of each row of a slab. The query heads of a KV group stand as query length: no key is ever repeated."""
    n, heads = decode.queries.shape[0], q.shape[1]
    keys, values = batch.cache.rows(layer, decode.room, n)
    kv_heads = keys.shape[1]
    queries = q.index_select(0, decode.queries).view(n * kv_heads, heads // kv_heads, -1)
    # In bfloat16 the scores are rounded once before the softmax, as in transformers' eager attention.
    scores = torch.bmm(queries, keys.flatten(0, 1)[:, : decode.span].transpose(1, 2))
    weights = _weights(scores.view(n, kv_heads, heads // kv_heads, -1), decode.bias(how.window), how)
    answer = torch.bmm(weights.to(q.dtype).flatten(0, 1), values.flatten(0, 1)[:, : decode.span])
    answer = answer.view(n, heads, -1)
    return answer if decode.answered is None else answer.index_select(0, decode.answered)


def _weights(scores: Tensor, bias: Tensor, how: _How) -> Tensor:
    """softmax(cap(scores * scale) + bias) in float32."""
    if how.softcap:
        scores = torch.tanh(scores.float() * (how.scale / how.softcap))
        return torch.softmax(torch.add(bias, scores, alpha=how.softcap), dim=-1)
    return torch.softmax(torch.add(bias, scores, alpha=how.scale), dim=-1)


def _per_query_head(keys: Tensor, group: int) -> Tensor:
    """[n, kv_heads, length, dim] -> [n, kv_heads * group, length, dim]."""
    return keys if group == 1 else keys.repeat_interleave(group, dim=1)
