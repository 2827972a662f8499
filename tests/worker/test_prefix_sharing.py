"""What prompts have in common is computed once, and every row says what it says alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loramill.worker import room
from loramill.worker.adapters import AdapterError
from loramill.worker.engine import Engine
from loramill.worker.request import Request, Result, Sampling, plain
from tests.worker.parity import TOKENS, peft_answers, requests_of

Answer = Callable[[Engine, list[Request]], dict[int, Result]]
Make = Callable[..., Engine]
Rows = list[tuple[list[int], int | None]]
PAGE = 16


def alike(seed: int, count: int = 18, prefix: int = 40) -> Rows:
    """Rows of the base and five adapters that all begin with the same tokens."""
    draw = random.Random(seed)
    common = [draw.randrange(3, 97) for _ in range(prefix)]
    return [
        (common + [draw.randrange(3, 97) for _ in range(draw.randint(1, 9))], [None, 0, 1, 2, 3, 4][key % 6])
        for key in range(count)
    ]


def said(results: dict[int, Result]) -> dict[int, list[list[int]]]:
    return {key: [one.token_ids for one in result.completions] for key, result in results.items()}


def check(results: dict[int, Result], expected: list[list[int]]) -> None:
    assert said(results) == {key: [tokens] for key, tokens in enumerate(expected)}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2"])
def test_rows_of_an_adapter_share_and_those_of_another_do_not(
    name: str, family: Callable[[str], Any], make_engine: Make, answer: Answer
) -> None:
    one, rows = family(name), alike(seed=1)
    expected, requests = peft_answers(one, rows), requests_of(one, rows)
    # All in one pass: the first row of each adapter computes what the two others read in the same pass.
    wide = make_engine(name, max_loras_per_batch=5, max_num_seqs=18)
    check(answer(wide, requests), expected)
    assert wide.stats.prompt_tokens_shared == 6 * 2 * (40 // PAGE * PAGE)
    assert wide.stats.prompt_tokens + wide.stats.prompt_tokens_shared == sum(len(prompt) for prompt, _ in rows)
    # Once more: all of it is there, but for what rows must compute, and for pages of their own ends.
    check(answer(wide, requests), expected)
    assert wide.stats.prompt_tokens_shared >= (12 + 18) * (40 // PAGE * PAGE)
    chunked = make_engine(name, max_loras_per_batch=2, max_num_seqs=6, max_num_batched_tokens=23)
    check(answer(chunked, requests), expected)
    assert chunked.stats.prompt_tokens_shared > 0
    off = make_engine(name, max_loras_per_batch=2, max_num_seqs=6, max_num_batched_tokens=23, prefix_sharing=False)
    check(answer(off, requests), expected)
    assert off.stats.prompt_tokens_shared == 0


def test_merged_and_dynamic_rows_of_one_adapter_share_among_themselves(
    family: Callable[[str], Any], make_engine: Make, answer: Answer
) -> None:
    one, rows = family("llama"), alike(seed=2, count=24)
    expected = peft_answers(one, rows)
    requests = [
        Request(r.key, r.prompt, r.sampling, r.mix, merged=bool(r.mix) and r.key % 12 >= 6)
        for r in requests_of(one, rows)
    ]
    engine = make_engine("llama", max_loras_per_batch=5)
    check(answer(engine, requests), expected)
    assert engine.stats.merges == 5
    groups = 6 + 5
    assert engine.stats.prompt_tokens_shared == (len(rows) - groups) * (40 // PAGE * PAGE)


def test_the_samples_of_a_row_share_its_prompt(family: Callable[[str], Any], make_engine: Make, answer: Answer) -> None:
    one, (prompt, _) = family("llama"), alike(seed=3, prefix=48)[0]
    mix = plain(one.adapters[0].sha256)
    sampling = Sampling(TOKENS, temperature=0.9, seed=5, n=4)
    engine = make_engine()
    shared = said(answer(engine, [Request(0, prompt, sampling, mix)]))
    assert engine.stats.prompt_tokens_shared == 3 * 48
    assert shared == said(answer(make_engine(prefix_sharing=False), [Request(0, prompt, sampling, mix)]))
    # A prompt of whole pages: its last token is computed by each.
    engine = make_engine()
    answer(engine, [Request(0, prompt[:48], sampling, mix)])
    assert engine.stats.prompt_tokens_shared == 3 * 32


def test_rows_that_give_way_find_what_they_had(
    make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        Request(key, prompt, Sampling(150, temperature=0, ignore_eos=True))
        for key, (prompt, _) in enumerate(alike(seed=4, count=8))
    ]
    expected = said(answer(make_engine(prefix_sharing=False), rows))
    monkeypatch.setattr(room, "GROWTH_TOKENS", 16)
    tight = make_engine(kv_cache_memory=28 * PAGE * 3 * 2 * (16 + 16) * 4)
    assert said(answer(tight, rows)) == expected
    assert tight.stats.preemptions > 0
    assert tight.stats.prompt_tokens_shared > 0


def test_what_a_row_computed_that_failed_is_read_by_nobody(make_engine: Make, answer: Answer) -> None:
    rows = [Request(k, p, Sampling(9, temperature=0, ignore_eos=True)) for k, (p, _) in enumerate(alike(5, count=4))]
    expected = said(answer(make_engine(), rows))
    engine = make_engine()
    weight = engine._model._model.get_input_embeddings().weight
    healthy = weight.detach().clone()
    with torch.no_grad():
        weight[rows[0].prompt[3]] = float("nan")
        assert all("not finite" in str(result.error) for result in answer(engine, rows[:2]).values())
        weight.copy_(healthy)
    assert said(answer(engine, rows)) == expected


def test_what_a_pass_did_not_come_to_compute_is_read_by_nobody(
    make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Request(k, p, Sampling(9, temperature=0, ignore_eos=True)) for k, (p, _) in enumerate(alike(6, count=6))]
    expected = said(answer(make_engine(), rows))
    engine = make_engine(max_num_batched_tokens=60)
    forward, passes = engine._model.forward, 0

    def short(batch: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes in (1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch)

    monkeypatch.setattr(engine._model, "forward", short)
    assert said(answer(engine, rows)) == expected
    assert engine.stats.out_of_memory == 2
    assert engine.stats.prompt_tokens_shared > 0


def test_what_an_adapter_that_was_lost_was_to_compute_is_read_by_nobody(
    family: Callable[[str], Any], make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = family("llama")
    rows = requests_of(one, [(prompt, 0) for prompt, _ in alike(seed=7, count=4)])
    expected = said(answer(make_engine(), rows))
    engine = make_engine()
    with monkeypatch.context() as broken:

        def lost(adapter: Any) -> Any:
            raise AdapterError("it changed")

        broken.setattr(engine._residency._host, "take", lost)
        assert {result.code for result in answer(engine, rows[:3]).values()} == {"adapter_unavailable"}
    engine.register(one.adapters[0])
    assert said(answer(engine, rows)) == expected


def test_another_adapter_in_the_same_slot_finds_nothing_of_the_last(
    family: Callable[[str], Any], make_engine: Make, answer: Answer
) -> None:
    one, (prompt, _) = family("llama"), alike(seed=8)[0]
    rows = [(prompt, adapter) for adapter in (0, 1, 0, 2, None, 1)]
    expected, requests = peft_answers(one, rows), requests_of(one, rows)
    engine = make_engine(max_loras_per_batch=1, max_num_seqs=1)
    check({key: result for request in requests for key, result in answer(engine, [request]).items()}, expected)
    assert engine.stats.adapter_evictions > 2
    engine.forget(one.adapters[0].sha256)
    engine.register(one.adapters[0])
    check(answer(engine, requests), expected)


def test_rows_dropped_amid_their_prompts_leave_nothing_half_computed(make_engine: Make, answer: Answer) -> None:
    rows = [Request(k, p, Sampling(9, temperature=0, ignore_eos=True)) for k, (p, _) in enumerate(alike(9, count=4))]
    expected = said(answer(make_engine(), rows))
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=20)
    engine.add(rows[0])
    engine.step()
    engine.cancel([0])
    assert said(answer(engine, rows)) == expected
    assert engine.stats.kv_used == 0
