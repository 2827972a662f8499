"""Attention over a packed batch and our cache, as transformers' attention interface asks for it.

Per sequence: softmax(q k^T * scaling + mask) v, causal, grouped-query, with the layer's sliding window and soft cap.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface

from loramill.kernels.attention import attend, store
from loramill.worker.batch import Probe, current
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
    shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
    if isinstance(batch, Probe):
        batch.shapes[layer] = shape
        return query.new_zeros(1, query.shape[2], query.shape[1], shape.value_dim), None
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, dim]
    keys, values = batch.cache.layer(layer)
    # All are there before any is read: rows of one pass may share what one of them computes.
    store(keys, values, k, v, batch.lines)
    out = query.new_empty(q.shape[0], q.shape[1], shape.value_dim)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend(out, q, keys, values, batch.pages, scale=scale, window=sliding_window, softcap=softcap)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)
