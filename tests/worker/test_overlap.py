"""A pass that is launched before the tokens of the one before it are known: answers stay what they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from loramill.worker import room, sampling
from loramill.worker.engine import Engine
from loramill.worker.flight import Flight
from loramill.worker.request import Request, Result, Sampling, plain
from tests.worker.parity import mixed_rows, peft_answers, requests_of

Answer = Callable[[Engine, list[Request]], dict[int, Result]]
Make = Callable[..., Engine]

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.3},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 30},
    "with log probabilities": {"temperature": 1.0, "top_p": 0.8, "logprobs": 3},
    "that look back": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "several answers": {"temperature": 1.2, "n": 3},
    "stopped": {"temperature": 0, "stop": ("Q", "fg")},
    "biased": {"temperature": 0, "logit_bias": {2: 2.0}},
}


def as_text(ids: list[int]) -> str:
    return "".join(chr(ord("A") + token) for token in ids)


def rows_of(kinds: list[str], hashes: list[str | None], count: int) -> list[Request]:
    """Rows that end wherever they do: by length, token or text."""
    draw = random.Random(5)
    return [
        Request(
            key,
            [draw.randrange(3, 97) for _ in range(draw.randint(1, 50))],
            Sampling(draw.randint(1, 24), seed=key, stop_token_ids=(7, 11, 40), **KINDS[kinds[key % len(kinds)]]),
            plain(draw.choice(hashes)),
            decode=as_text,
        )
        for key in range(count)
    ]


def said(results: dict[int, Result]) -> dict[int, Any]:
    """All of the answers but the log probabilities' last digits."""
    return {
        key: [
            (one.token_ids, one.finish_reason, one.stop_string, one.logprobs and [p.token_id for p in one.logprobs])
            for one in result.completions
        ]
        for key, result in results.items()
    }


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in which order: passes launched, and waited for."""
    order: list[str] = []
    launched, settle = Flight.launched, Flight.settle
    monkeypatch.setattr(Flight, "launched", lambda *given: order.append("launched") or launched(*given))
    monkeypatch.setattr(Flight, "settle", lambda flight: order.append("settled") or settle(flight))
    return order


def test_the_next_pass_is_launched_before_the_tokens_of_the_last_are_known(
    make_engine: Make, answer: Answer, waits: list[str]
) -> None:
    row = Request(0, [5, 9], Sampling(5, temperature=0, ignore_eos=True))
    apart = answer(make_engine(overlap=False), [row])
    assert waits == ["launched", "settled"] * 5
    waits.clear()
    assert said(answer(make_engine(overlap=True), [row])) == said(apart)
    assert waits == ["launched", *["launched", "settled"] * 4, "settled"], "and none is launched for what has ended"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3"])
def test_mixed_adapters_equal_peft(name: str, family: Callable[[str], Any], make_engine: Make, answer: Answer) -> None:
    one, rows = family(name), mixed_rows(seed=1)
    limits = {"max_loras_per_batch": 2, "max_num_seqs": 6, "max_num_batched_tokens": 40}
    engine = make_engine(name, overlap=True, **limits)
    results = answer(engine, requests_of(one, rows))
    for key, tokens in enumerate(peft_answers(one, rows)):
        assert results[key].completions[0].token_ids == tokens, f"row {key}, adapter {rows[key][1]}"
    assert engine.stats.adapter_evictions > 0


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [list(KINDS)], ids=lambda kinds: ", ".join(kinds[:2]))
def test_every_kind_of_row_says_the_same(
    kinds: list[str], family: Callable[[str], Any], make_engine: Make, answer: Answer, waits: list[str]
) -> None:
    hashes = [None, *(adapter.sha256 for adapter in family("llama").adapters)]
    rows = rows_of(kinds, hashes, 40)
    limits = {"max_loras_per_batch": 3, "max_num_seqs": 7, "max_num_batched_tokens": 64}
    expected = answer(make_engine(overlap=False, **limits), rows)
    assert len({len(one.token_ids) for result in expected.values() for one in result.completions}) > 5
    waits.clear()
    results = answer(make_engine(overlap=True, **limits), rows)
    assert said(results) == said(expected)
    overlapped = sum(pair == ("launched", "launched") for pair in pairwise(waits))
    assert (overlapped > 0) == (kinds != ["that look back"])
    for key, result in results.items():
        for mine, other in zip(result.completions, expected[key].completions, strict=True):
            for one, two in zip(mine.logprobs or [], other.logprobs or [], strict=True):
                assert abs(one.logprob - two.logprob) < 1e-4


def test_what_was_drawn_from_too_few_is_drawn_again_and_what_went_on_from_it_computed_again(
    make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_CANDIDATES", 2)
    rows = rows_of(["filtered", "with log probabilities", "greedy"], [None], 24)
    expected = said(answer(make_engine(overlap=False, max_num_seqs=5), rows))
    redrawn = 0
    settle = Flight.settle

    def counted(flight: Flight) -> Any:
        nonlocal redrawn
        found = settle(flight)
        redrawn += sum(draw.redrawn for _, draw in found)
        return found

    monkeypatch.setattr(Flight, "settle", counted)
    assert said(answer(make_engine(overlap=True, max_num_seqs=5), rows)) == expected
    assert redrawn > 20


def test_rows_give_way_amid_what_overlaps(make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Request(k, [5 + k] * 9, Sampling(200, temperature=0, ignore_eos=True)) for k in range(6)]
    expected = said(answer(make_engine(overlap=False), rows))
    monkeypatch.setattr(room, "GROWTH_TOKENS", 16)
    tight = make_engine(overlap=True, kv_cache_memory=3 * 256 * 3 * 2 * (16 + 16) * 4)
    assert said(answer(tight, rows)) == expected
    assert tight.stats.preemptions > 0, "the cache was meant to be too small for all"
    assert tight.stats.kv_used == 0


def test_rows_are_dropped_while_their_tokens_are_drawn(make_engine: Make, answer: Answer) -> None:
    rows = [Request(k, [5 + k], Sampling(9, temperature=0, ignore_eos=True)) for k in range(4)]
    expected = said(answer(make_engine(overlap=False), rows))
    engine = make_engine(overlap=True, max_num_seqs=3)
    for row in rows:
        engine.add(row)
    engine.step()
    engine.step()
    engine.cancel([0, 3])
    engine.add(rows[0])  # the key anew: what is under way for the old one is not its
    assert said(answer(engine, [])) == {key: expected[key] for key in (0, 1, 2)}
    engine.add(rows[1])
    engine.step()
    engine.cancel([1])
    assert not engine.has_work
    assert said(answer(engine, rows)) == expected


def test_a_row_that_turns_to_nan_fails_alone(make_engine: Make, answer: Answer) -> None:
    fine = [Request(key, [7, 8 + key], Sampling(30, temperature=0, ignore_eos=True)) for key in (1, 2, 3)]
    healthy = said(answer(make_engine(overlap=False), fine))
    tokens = {token for [(ids, *_)] in healthy.values() for token in ids}
    poison = min(set(range(20, 97)) - tokens)
    engine = make_engine(overlap=True)
    with torch.no_grad():
        engine._model._model.get_input_embeddings().weight[poison] = float("nan")
    results = answer(engine, [Request(9, [poison] * 30, Sampling(6, temperature=0, n=2)), *fine])
    assert "not finite" in str(results.pop(9).error)
    assert said(results) == healthy


def test_memory_that_runs_out_amid_what_overlaps(
    make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(["greedy", "sampled", "several answers"], [None], 24)
    expected = said(answer(make_engine(overlap=False), rows))
    engine = make_engine(overlap=True)
    forward, passes = engine._model.forward, 0

    def short(batch: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        logits = forward(batch)
        if passes in (3, 9, 30):
            raise MemoryError
        return logits

    monkeypatch.setattr(engine._model, "forward", short)
    assert said(answer(engine, rows)) == expected
    assert engine.stats.out_of_memory == 3


def test_weights_change_once_nothing_is_under_way(
    family: Callable[[str], Any], make_engine: Make, answer: Answer
) -> None:
    hashes = [adapter.sha256 for adapter in family("llama").adapters[:3]]
    rows = [
        Request(key, [9 + key, 5], Sampling(3 + key % 7, temperature=0), plain(hashes[key % 3]), merged=key % 2 == 0)
        for key in range(18)
    ]
    expected = said(answer(make_engine(overlap=False), rows))
    engine = make_engine(overlap=True, max_num_seqs=4)
    assert said(answer(engine, rows)) == expected
    assert engine.stats.merges >= 3
