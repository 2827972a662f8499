"""Adapters that come, go, change and break while the engine runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loramill.worker.adapters import open_adapter
from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.forecast import Forecast
from loramill.worker.request import Mix, Request, Result, Sampling, plain
from loramill.worker.slots import Eviction
from tests.worker.parity import mixed_rows, peft_answers, requests_of

Answer = Callable[[Engine, list[Request]], dict[int, Result]]


def row(key: int, mix: Mix = (), *, merged: bool = False) -> Request:
    return Request(key, [5, 9, 11, 40 + key % 7], Sampling(6, temperature=0, ignore_eos=True), mix, merged)


def said(results: dict[int, Result], key: int) -> list[int]:
    return results[key].completions[0].token_ids


def test_an_adapter_comes_and_goes_while_others_are_in_use(
    family: Callable[[str], Any], make_engine: Callable[..., Engine], answer: Answer
) -> None:
    one = family("llama")
    first, second = one.adapters[:2]
    expected = answer(make_engine(), [row(0, plain(first.sha256)), row(1, plain(second.sha256))])
    engine = Engine(EngineConfig(one.base, dtype="float32", device="cpu"), [first])
    engine.add(row(0, plain(first.sha256)))
    engine.step()
    with pytest.raises(ValueError, match="not registered"):
        engine.add(row(1, plain(second.sha256)))
    engine.register(second)
    engine.add(row(1, plain(second.sha256)))
    with pytest.raises(ValueError, match="in use by rows that are not finished: 1 of them"):
        engine.forget(first.sha256)
    results = answer(engine, [])
    assert [said(results, key) for key in (0, 1)] == [said(expected, key) for key in (0, 1)]
    engine.forget(first.sha256)
    assert engine.stats.resident == 1
    assert engine.stats.adapter_load_s > 0
    with pytest.raises(ValueError, match="not registered"):
        engine.add(row(2, plain(first.sha256)))


@pytest.mark.parametrize("merged", [False, True])
def test_rows_of_an_adapter_that_changed_on_disk_fail_and_the_others_go_on(
    merged: bool, family: Callable[[str], Any], answer: Answer, tmp_path: Path
) -> None:
    one = family("llama")
    folder = shutil.copytree(one.adapter_folders[0], tmp_path / "a")
    bad, good = open_adapter(str(folder), one.base, max_rank=64), one.adapters[1]
    shutil.copytree(one.adapter_folders[2], folder, dirs_exist_ok=True)
    engine = Engine(EngineConfig(one.base, dtype="float32", device="cpu", max_num_seqs=2), [bad, good])
    mixes = [plain(good.sha256), plain(bad.sha256), (), ((good.sha256, 0.5), (bad.sha256, 0.5))]
    rows = [row(key, mixes[key % 4], merged=merged and key % 4 in (1, 3)) for key in range(12)]
    results = answer(engine, rows)
    for key in range(12):
        if key % 4 in (1, 3):
            assert results[key].code == "adapter_unavailable"
            assert "changed" in str(results[key].error)
        else:
            assert results[key].error is None
    expected = answer(Engine(EngineConfig(one.base, dtype="float32", device="cpu"), [good]), rows[::4] + rows[2::4])
    assert all(said(results, key) == said(expected, key) for key in expected)
    with pytest.raises(ValueError, match="changed"):
        engine.add(row(99, plain(bad.sha256)))


@pytest.mark.parametrize("eviction", Eviction)
def test_each_policy_gives_the_same_answers_within_a_small_host_tier(
    eviction: Eviction, family: Callable[[str], Any], make_engine: Callable[..., Engine], answer: Answer
) -> None:
    one = family("llama")
    rows = mixed_rows(seed=1)
    engine = make_engine(
        max_loras_per_batch=2,
        max_num_seqs=6,
        lora_eviction=eviction,
        max_loaded_loras=2,
        pinned=frozenset({one.adapters[3].sha256}),
    )
    engine.preload()
    results = answer(engine, requests_of(one, rows))
    assert [said(results, key) for key in range(len(rows))] == peft_answers(one, rows)
    assert engine.stats.host.most_bytes <= 2 * max(adapter.nbytes(engine._model.dtype) for adapter in one.adapters)
    assert engine.stats.adapter_evictions > 0


def test_a_foreseen_job_loads_each_adapter_once(
    family: Callable[[str], Any], make_engine: Callable[..., Engine], answer: Answer
) -> None:
    one = family("llama")
    hashes = [adapter.sha256 for adapter in one.adapters]
    # Adapter 0 all along, the others one after another: who forgets what comes evicts it.
    order = [number for other in (1, 2, 3, 4) for number in (other, other, 0)]
    engine = make_engine(max_loras_per_batch=2, max_num_seqs=2, max_loaded_loras=3)
    forecast = Forecast(np.array(order, np.int32), [(name,) for name in hashes])
    engine.watch(forecast)
    for key, number in enumerate(order):
        engine.add(row(key, plain(hashes[number])))
        forecast.take(1)
        if key % 3 == 2:
            answer(engine, [])
    engine.unwatch(forecast)
    assert engine.stats.adapter_loads == len(hashes)
    assert engine.stats.host.loads == len(hashes)


def test_logits_of_a_mix_and_of_the_base(family: Callable[[str], Any], make_engine: Callable[..., Engine]) -> None:
    one = family("llama")
    engine = make_engine()
    mix = plain(one.adapters[0].sha256)
    base, adapted = engine.next_logits([5, 9]), engine.next_logits([5, 9], mix)
    assert base.shape == (97,)
    assert (base - adapted).abs().max() > 0.1
    assert (engine.next_logits([5, 9], mix, merged=True) - adapted).abs().max() < 1e-4
    assert bool((engine.next_logits([5, 9]) == base).all())
    engine.add(row(0))
    with pytest.raises(ValueError, match="without work"):
        engine.next_logits([5])
