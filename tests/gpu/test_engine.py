"""Greedy token ids in float32 on CUDA equal PEFT's `generate` there, with mixed adapters and few slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loramill.worker.engine import Engine
from loramill.worker.request import Request, Result, Sampling, plain
from tests.worker.parity import TOKENS, mixed_rows, peft_answers, requests_of


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
    one, rows = family(name), mixed_rows(seed=3, count=48)
    expected = peft_answers(one, rows, "cuda")
    engine = make_engine(name, device="cuda", **limits)
    requests = requests_of(one, rows)
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
    requests = [Request(k, [5, 9, 11, 40], Sampling(TOKENS, temperature=0), plain(h)) for k, h in enumerate(hashes)]
    results = answer(make_engine(device="cuda", max_loras_per_batch=5), requests)
    assert len({tuple(r.completions[0].token_ids) for r in results.values()}) == len(hashes)
