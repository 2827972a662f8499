"""Greedy token ids in float32 equal PEFT's `generate`, row by row, whatever is batched together."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loramill.kernels import native
from loramill.kernels.native_forms import attends
from loramill.kernels.native_lora import NativeLora
from loramill.kernels.on_device import run
from loramill.kernels.plan import Plan
from loramill.kernels.router import Router
from loramill.producer.cli import main
from loramill.worker.engine import Engine
from loramill.worker.request import Request, Result, Sampling, plain
from tests.worker.parity import TOKENS, mixed_rows, peft_answers, requests_of

NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]


@pytest.mark.parametrize("name", NAMES)
def test_mixed_adapters_with_chunks_eviction_and_reuse(
    name: str,
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
) -> None:
    one = family(name)
    rows = mixed_rows(seed=1)
    expected = peft_answers(one, rows)
    # 40 tokens a pass cut the longer prompts; two slots for five adapters evict; the second half uses them again.
    engine = make_engine(name, max_loras_per_batch=2, max_num_seqs=6, max_num_batched_tokens=40)
    requests = requests_of(one, rows)
    results = {**answer(engine, requests[:12]), **answer(engine, requests[12:])}
    for key, tokens in enumerate(expected):
        assert results[key].completions[0].token_ids == tokens, f"row {key}, adapter {rows[key][1]}"
    assert engine.stats.adapter_evictions > 0
    assert engine.stats.adapter_loads > len(one.adapters), "some adapter came back"
    assert max(len(prompt) for prompt, _ in rows) > 40, "some prompt was cut"


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_where_nothing_can_be_compiled(
    name: str,
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loramill.kernels.native.operators", lambda: None)
    one = family(name)
    rows = mixed_rows(seed=3)[:12]
    engine = make_engine(name, max_loras_per_batch=2, max_num_seqs=6, max_num_batched_tokens=40)
    results = answer(engine, requests_of(one, rows))
    for key, tokens in enumerate(peft_answers(one, rows)):
        assert results[key].completions[0].token_ids == tokens, f"row {key}, adapter {rows[key][1]}"
    assert not any(isinstance(p.lora, NativeLora) for p in engine._model.projections)


@pytest.mark.parametrize("name", NAMES)
def test_the_families_that_have_lean_layers(name: str, make_engine: Callable[..., Engine]) -> None:
    model = make_engine(name)._model
    assert (model._lean is None) == name.startswith("gemma")
    keys, values = (torch.empty(1, 1, 16, dim) for dim in next(iter(model.shapes.values()))[1:])
    assert native.operators() is None or attends(keys, values), "the models that answers are compared on go by C++"


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_tiles_as_a_device_takes_them(
    form: str,
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = family("qwen2")
    # The interpreter takes minutes for what torch takes a second for.
    rows = mixed_rows(seed=1)[: 24 if form == "torch" else 4]
    expected = peft_answers(one, rows)
    tokens = TOKENS if form == "torch" else 3
    monkeypatch.setattr("loramill.worker.engine.Router", partial(Router, tiled=True))
    monkeypatch.setattr("loramill.worker.lora.panel_form", lambda *_: None)
    calls = []
    if form == "triton":

        def on_device(*operands: Any) -> None:
            calls.append(1)
            run(*operands, Plan())

        monkeypatch.setattr("loramill.kernels.multi_lora.multi_lora_torch", on_device)
    engine = make_engine("qwen2", max_loras_per_batch=2, max_num_seqs=6, max_num_batched_tokens=40)
    requests = requests_of(one, rows, tokens)
    results = answer(engine, requests)
    for key, answered in enumerate(expected):
        assert results[key].completions[0].token_ids == answered[:tokens], f"row {key}, adapter {rows[key][1]}"
    assert bool(calls) == (form == "triton")
    assert len({a for _, a in rows if a is not None}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_one_file_of_mixed_adapters_through_the_command(
    name: str, family: Callable[[str], Any], byte_tokenizer: Any, tmp_path: Path
) -> None:
    one = family(name)
    byte_tokenizer.save_pretrained(one.folder)  # for the answers' text; the prompts are token ids
    rows = mixed_rows(seed=2)
    lines = [
        {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "model": "" if adapter is None else f"a{adapter}",
                "prompt": prompt,
                "max_tokens": TOKENS,
                "temperature": 0,
                "return_token_ids": True,
            },
        }
        for number, (prompt, adapter) in enumerate(rows)
    ]
    job, answers = tmp_path / "job.jsonl", tmp_path / "answers.jsonl"
    job.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = f"run -i {job} -o {answers} --base-model {one.folder} --adapters-dir {one.folder.parent} --quiet"
    limits = "--dtype float32 --max-loras-per-batch 2 --max-num-seqs 6 --max-num-batched-tokens 40"
    with pytest.raises(SystemExit) as ended:
        main(f"{command} {limits}".split())
    assert ended.value.code == 0
    results = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [result["custom_id"] for result in results] == [line["custom_id"] for line in lines]
    bodies = [result["response"]["body"] for result in results]
    assert [body["choices"][0]["token_ids"] for body in bodies] == peft_answers(one, rows)
    hashes = [None if adapter is None else one.adapters[adapter].sha256 for _, adapter in rows]
    assert [body["loramill"]["adapter_sha256"] for body in bodies] == hashes


def test_adapters_do_change_the_answers(
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
) -> None:
    """Parity with PEFT would also hold if neither applied anything."""
    one = family("llama")
    hashes = [None, *(adapter.sha256 for adapter in one.adapters)]
    requests = [Request(k, [5, 9, 11, 40], Sampling(TOKENS, temperature=0), plain(h)) for k, h in enumerate(hashes)]
    results = answer(make_engine(max_loras_per_batch=5), requests)
    assert len({tuple(r.completions[0].token_ids) for r in results.values()}) == len(hashes)
