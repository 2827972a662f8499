"""Greedy token ids in float32 equal PEFT's `generate`, row by row, whatever is batched together."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers

from loramill.worker.engine import Engine
from loramill.worker.request import Request, Result, Sampling

NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
TOKENS = 20


def peft_answers(one: Any, rows: list[tuple[list[int], int | None]]) -> list[list[int]]:
    """What PEFT generates for each (prompt, adapter number or None for the base)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Eager attention: the only one of transformers' that honours Gemma 2's soft cap.
        base = transformers.AutoModelForCausalLM.from_pretrained(one.folder, attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(base, one.adapter_folders[0], adapter_name="0")
        for number, folder in enumerate(one.adapter_folders[1:], 1):
            model.load_adapter(folder, str(number))
        answers = []
        for prompt, adapter in rows:
            asked = {
                "input_ids": torch.tensor([prompt]),
                "attention_mask": torch.ones(1, len(prompt), dtype=torch.long),
                "max_new_tokens": TOKENS,
                "do_sample": False,
            }
            if adapter is None:
                with model.disable_adapter():
                    output = model.generate(**asked)
            else:
                model.set_adapter(str(adapter))
                output = model.generate(**asked)
            answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("name", NAMES)
def test_mixed_adapters_with_chunks_eviction_and_reuse(
    name: str,
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
) -> None:
    one = family(name)
    draw = random.Random(1)
    rows: list[tuple[list[int], int | None]] = [
        ([draw.randrange(3, 97) for _ in range(draw.choice([1, 2, 7, 30, 59]))], draw.choice([None, 0, 1, 2, 3, 4]))
        for _ in range(24)
    ]
    expected = peft_answers(one, rows)
    # 40 tokens a pass cut the longer prompts; two slots for five adapters evict; the second half uses them again.
    engine = make_engine(name, max_loras_per_batch=2, max_num_seqs=6, max_num_batched_tokens=40)
    requests = [
        Request(key, prompt, Sampling(TOKENS, temperature=0), None if a is None else one.adapters[a].sha256)
        for key, (prompt, a) in enumerate(rows)
    ]
    results = {**answer(engine, requests[:12]), **answer(engine, requests[12:])}
    for key, tokens in enumerate(expected):
        assert results[key].completions[0].token_ids == tokens, f"row {key}, adapter {rows[key][1]}"
    assert engine.stats.adapter_evictions > 0
    assert engine.stats.adapter_loads > len(one.adapters), "some adapter came back"
    assert max(len(prompt) for prompt, _ in rows) > 40, "some prompt was cut"


def test_adapters_do_change_the_answers(
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
) -> None:
    """Parity with PEFT would also hold if neither applied anything."""
    one = family("llama")
    hashes = [None, *(adapter.sha256 for adapter in one.adapters)]
    requests = [Request(k, [5, 9, 11, 40], Sampling(TOKENS, temperature=0), h) for k, h in enumerate(hashes)]
    results = answer(make_engine(max_loras_per_batch=5), requests)
    assert len({tuple(r.completions[0].token_ids) for r in results.values()}) == len(hashes)
