"""Strengths and mixes of adapters, in the same batches as plain rows, held against PEFT in float32."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from peft.tuners.lora.layer import LoraLayer

from loramill.kernels.router import Router
from loramill.worker.engine import Engine
from loramill.worker.request import Request, Result, Sampling
from tests.worker.parity import TOKENS, generate, peft_model

Numbered = tuple[tuple[int, float], ...]
MIXES: list[Numbered] = [
    (),
    ((0, 1.0),),
    ((1, 1.0),),
    ((0, 0.5),),
    ((0, -1.5),),
    ((0, 1.0), (1, 1.0)),
    ((2, 0.7), (1, -0.4)),
    ((1, 0.3), (3, 2.0), (4, 0.5)),
]


def in_peft(model: Any, mix: Numbered, prompt: list[int]) -> list[int]:
    """Several adapters active at once, each at its strength: PEFT adds their deltas."""
    if not mix:
        with model.disable_adapter():
            return generate(model, prompt)
    model.base_model.set_adapter([str(adapter) for adapter, _ in mix])
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    scales = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        for adapter, strength in mix:
            if str(adapter) in layer.scaling:
                layer.scaling[str(adapter)] *= strength
    try:
        return generate(model, prompt)
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling = scale


def rows_of(seed: int, count: int) -> list[tuple[list[int], Numbered]]:
    draw = random.Random(seed)
    return [
        ([draw.randrange(3, 97) for _ in range(draw.choice([1, 2, 7, 30, 59]))], MIXES[k % len(MIXES)])
        for k in range(count)
    ]


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("how", ["segments", "tiles", "merged"])
def test_mixes_beside_plain_rows_are_what_peft_says(
    name: str,
    how: str,
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = family(name)
    rows = rows_of(seed=5, count=24)
    model = peft_model(one)
    expected = [in_peft(model, mix, prompt) for prompt, mix in rows]
    if how == "tiles":
        monkeypatch.setattr("loramill.worker.engine.Router", partial(Router, tiled=True))
        monkeypatch.setattr("loramill.worker.lora.panel_form", lambda *_: None)
    # Three slots for five adapters evict; 40 tokens a pass cut the longer prompts.
    engine = make_engine(name, max_loras_per_batch=3, max_num_seqs=6, max_num_batched_tokens=40)
    requests = [
        Request(
            key,
            prompt,
            Sampling(TOKENS, temperature=0),
            tuple((one.adapters[adapter].sha256, strength) for adapter, strength in mix),
            merged=how == "merged" and key % 3 != 0 and bool(mix),
        )
        for key, (prompt, mix) in enumerate(rows)
    ]
    results = answer(engine, requests)
    for key, tokens in enumerate(expected):
        assert results[key].error is None
        assert results[key].completions[0].token_ids == tokens, f"row {key}, {rows[key][1]}"
    assert engine.stats.adapter_evictions > 0
    assert (engine.stats.merges > 0) == (how == "merged")


def test_a_mix_is_what_peft_makes_of_add_weighted_adapter(
    family: Callable[[str], Any], make_engine: Callable[..., Engine]
) -> None:
    one = family("llama")
    model = peft_model(one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["0", "2"], [0.6, 1.4], "both", combination_type="cat")
    model.set_adapter("both")
    prompt = [5, 9, 11, 40]
    mix = ((one.adapters[0].sha256, 0.6), (one.adapters[2].sha256, 1.4))
    sampling = Sampling(TOKENS, temperature=0)
    engine = make_engine("llama")
    engine.add(Request(0, prompt, sampling, mix))
    results: list[Result] = []
    while not results:
        results = engine.step()
    assert results[0].completions[0].token_ids == generate(model, prompt)


def test_a_mix_beyond_the_slots_is_refused(family: Callable[[str], Any], make_engine: Callable[..., Engine]) -> None:
    one = family("llama")
    mix = tuple((adapter.sha256, 1.0) for adapter in one.adapters[:3])
    with pytest.raises(ValueError, match="a mix of 3 adapters does not fit the 2 slots"):
        make_engine("llama", max_loras_per_batch=2).add(Request(0, [5], Sampling(3), mix))
