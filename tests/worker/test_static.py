"""Adapters that can only be served merged, in one job with others: each row by what it names, PEFT's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramill.worker.adapters import open_adapter
from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.request import Request, Result, Sampling, plain
from tests.worker.merging import PROMPT, TOKENS, peft_answer, peft_model, save_trained

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"r": 4, "target_modules": ALL, "use_dora": True},
    "saved": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "bias": {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "plain": {"r": 4, "target_modules": ALL},
}


def test_waves_of_merged_weights_beside_dynamic_rows(
    family: Callable[[str], Any], answer: Callable[[Engine, list[Request]], dict[int, Result]], tmp_path: Path
) -> None:
    one = family("qwen2")
    folders = {name: save_trained(tmp_path / name, one.folder, **config) for name, config in KINDS.items()}
    adapters = {name: open_adapter(str(folder), one.base, max_rank=64) for name, folder in folders.items()}
    expected = {name: peft_answer(peft_model(one.folder, folder), PROMPT)[1] for name, folder in folders.items()}
    engine = Engine(EngineConfig(one.base, dtype="float32", device="cpu", max_num_seqs=3), adapters.values())
    # PEFT's answer was asked for without an end-of-sequence token.
    sampling = Sampling(TOKENS, temperature=0, logit_bias={2: float("-inf")})
    names = [*KINDS, "plain", None] * 3
    rows = []
    for key, name in enumerate(names):
        mix = plain(adapters[name].sha256 if name else None)
        rows.append(Request(key, PROMPT, sampling, mix, merged=bool(name) and (name != "plain" or key % 2 == 0)))
    results = answer(engine, rows)
    for key, name in enumerate(names):
        if name:
            assert results[key].completions[0].token_ids == expected[name], name
    assert engine.stats.merges == len(KINDS)
    base_rows = [results[key].completions[0].token_ids for key, name in enumerate(names) if name is None]
    alone = answer(Engine(EngineConfig(one.base, dtype="float32", device="cpu")), [Request(0, PROMPT, sampling)])
    assert base_rows == [alone[0].completions[0].token_ids] * 3
    with pytest.raises(ValueError, match="can only be served merged: DoRA"):
        engine.add(Request(99, PROMPT, sampling, plain(adapters["dora"].sha256)))
