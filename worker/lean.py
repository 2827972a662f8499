"""Decoder layers of our own for Llama-like models: transformers' weights, and nothing between them that is not needed.

    x += o(attend(rope(q, k, v of norm(x))));   x += down(act(gate) * up of norm(x))

What is fused is in `kernels.layer`. transformers' classes stay: they load the weights, turn positions into angles,
serve every other family, and are what tests hold this against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loramill.kernels.attention import attend
from loramill.kernels.layer import ACTIVATIONS, add_rms_norm
from loramill.worker.batch import Batch, Probe, running
from loramill.worker.lora import FusedLinear

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM")


@dataclass(slots=True, frozen=True)
class _Layer:
    number: int
    first_norm: Any
    qkv: FusedLinear
    query_norm: Any
    key_norm: Any
    out: FusedLinear
    second_norm: Any
    gate_up: FusedLinear
    down: FusedLinear


class Lean:
    """A loaded model of one of FAMILIES, called layer by layer."""

    def __init__(self, model: Any, layers: Sequence[_Layer], head: FusedLinear, probe: Probe) -> None:
        self._model, self._layers, self._head = model.model, layers, head
        self._asked = probe.asked
        self._activation: str = model.config.hidden_act

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [O, vocab] of a packed batch's output rows."""
        x: Tensor = self._model.embed_tokens(batch.tokens)
        # Angles in float32, whatever the model computes in.
        cos, sin = self._model.rotary_emb(x.new_empty(0, dtype=torch.float32), batch.positions[None])
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        y, x = add_rms_norm(x, None, *_of(self._layers[0].first_norm))
        for layer, following in pairwise(self._layers):
            y, x = layer.out.normed(self._attention(layer, y, cos, sin, batch), x, *_of(layer.second_norm))
            y, x = layer.down.normed(layer.gate_up.gated(y, self._activation), x, *_of(following.first_norm))
        last = self._layers[-1]
        attended = self._attention(last, y, cos, sin, batch)
        # All that the other rows were needed for is in the cache now.
        with running(batch.at_outputs()):
            y, x = last.out.normed(attended[batch.outputs], x[batch.outputs], *_of(last.second_norm))
            y, _ = last.down.normed(last.gate_up.gated(y, self._activation), x, *_of(self._model.norm))
            return self._head(y)

    def _attention(self, layer: _Layer, y: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        keys, values = batch.cache.layer(layer.number)
        to = cos, sin, keys, values, batch.lines
        if layer.query_norm is None:
            q = layer.qkv.roped(y, *to)
        else:
            norms = layer.query_norm.weight, layer.key_norm.weight
            q = layer.qkv.roped(y, *to, norms, layer.query_norm.variance_epsilon)
        out = torch.empty_like(q)
        asked = self._asked[layer.number]
        attend(out, q, keys, values, batch.pages, scale=asked.scale, window=asked.window, softcap=asked.softcap)
        return out.view(len(out), -1)


def _of(norm: Any) -> tuple[Tensor, float]:
    return norm.weight, norm.variance_epsilon


def lean_form(model: Any, projections: Sequence[FusedLinear], probe: Probe) -> Lean | None:
    """The lean form of a loaded model, or None where it is not one of FAMILIES or asks for something else."""
    if type(model).__name__ not in FAMILIES or model.config.hidden_act not in ACTIVATIONS:
        return None
    of = {projection.names: projection for projection in projections}
    layers = [_layer(number, layer, of) for number, layer in enumerate(model.model.layers)]
    head = of.get(("lm_head",))
    position = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    angles = model.model.rotary_emb(torch.empty(0, device=model.device), position)[0].shape[-1]
    whole = all(shape.key_dim == shape.value_dim == angles for shape in probe.shapes.values())
    if head is None or not whole or not layers or any(layer is None for layer in layers):
        return None
    return Lean(model, [layer for layer in layers if layer is not None], head, probe)


def _layer(number: int, layer: Any, of: dict[tuple[str, ...], FusedLinear]) -> _Layer | None:
    path = f"model.layers.{number}"

    def found(part: str, *sets: Sequence[str]) -> FusedLinear | None:
        named = (of.get(tuple(f"{path}.{part}.{name}" for name in names)) for names in sets)
        return next((projection for projection in named if projection is not None), None)

    qkv = found("self_attn", ("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
    out = found("self_attn", ("o_proj",))
    gate_up = found("mlp", ("gate_proj", "up_proj"), ("gate_up_proj",))
    down = found("mlp", ("down_proj",))
    if qkv is None or out is None or gate_up is None or down is None:
        return None
    query_norm, key_norm = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    return _Layer(number, first, qkv, query_norm, key_norm, out, second, gate_up, down)
