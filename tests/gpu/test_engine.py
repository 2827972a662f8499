"""Greedy token ids in float32 on CUDA equal PEFT's `generate` there, with mixed adapters and few slots."""

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

TOKENS = 20


def mixed_rows(seed: int) -> list[tuple[list[int], int | None]]:
    """(prompt, adapter number or None for the base), shuffled."""
    draw = random.Random(seed)
    return [
        ([draw.randrange(3, 97) for _ in range(draw.choice([1, 2, 7, 30, 59]))], draw.choice([None, 0, 1, 2, 3, 4]))
        for _ in range(48)
    ]


def peft_answers(one: Any, rows: list[tuple[list[int], int | None]]) -> list[list[int]]:
    """What PEFT generates on CUDA, row by row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained(one.folder, attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(base, one.adapter_folders[0], adapter_name="0")
        for number, folder in enumerate(one.adapter_folders[1:], 1):
            model.load_adapter(folder, str(number))
        model.to("cuda", torch.float32).eval()
        answers = []
        for prompt, adapter in rows:
            prompts = torch.tensor([prompt], device="cuda")
            asked = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "do_sample": False}
            if adapter is None:
                with model.disable_adapter():
                    output = model.generate(**asked, max_new_tokens=TOKENS)
            else:
                model.set_adapter(str(adapter))
                output = model.generate(**asked, max_new_tokens=TOKENS)
            answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_loras_per_batch": 2, "max_num_seqs": 6, "max_num_batched_tokens": 40},  # cuts prompts, evicts
        {"max_loras_per_batch": 3, "max_num_seqs": 48},  # many rows a pass, evicts
        {"max_loras_per_batch": 5, "max_num_seqs": 48},  # every adapter in one pass
    ],
    ids=["tight", "few slots", "all slots"],
)
def test_answers_equal_pefts(
    name: str,
    limits: dict[str, int],
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
) -> None:
    one, rows = family(name), mixed_rows(seed=3)
    expected = peft_answers(one, rows)
    engine = make_engine(name, device="cuda", **limits)
    requests = [
        Request(key, prompt, Sampling(TOKENS, temperature=0), None if a is None else one.adapters[a].sha256)
        for key, (prompt, a) in enumerate(rows)
    ]
    results = {**answer(engine, requests[:24]), **answer(engine, requests[24:])}
    for key, tokens in enumerate(expected):
        assert results[key].completions[0].token_ids == tokens, f"row {key}, adapter {rows[key][1]}"
    if limits["max_loras_per_batch"] < len(one.adapters):
        assert engine.stats.adapter_evictions > 0
    assert engine.device == "cuda"


def test_adapters_do_change_the_answers(
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
) -> None:
    """Parity with PEFT would also hold if neither applied anything."""
    one = family("llama")
    hashes = [None, *(adapter.sha256 for adapter in one.adapters)]
    requests = [Request(k, [5, 9, 11, 40], Sampling(TOKENS, temperature=0), h) for k, h in enumerate(hashes)]
    results = answer(make_engine(device="cuda", max_loras_per_batch=5), requests)
    assert len({tuple(r.completions[0].token_ids) for r in results.values()}) == len(hashes)
