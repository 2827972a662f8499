"""Drawing tokens: the right distribution, held against transformers' own processors, and repeatable draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loramill.worker.request import Request, Sampling
from loramill.worker.sampling import draw
from loramill.worker.sequence import Sequence

VOCAB, DRAWS = 600, 4000


def logits(seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def sequence(seed: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, **how: Any) -> Sequence:
    prompt = prompt or [1]
    request = Request(0, prompt, Sampling(max_tokens=9, seed=seed, **how))
    return Sequence(request, 0, prompt + (output or []))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 400, "top_p": 0.995},
        {"temperature": 1.9, "top_p": 0.9999},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.8},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(how: dict[str, float]) -> None:
    row = logits()
    likely = row.topk(3).indices.tolist()
    processors = LogitsProcessorList()
    if "repetition_penalty" in how:
        processors.append(RepetitionPenaltyLogitsProcessor(how["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(float(how.get("temperature", 1.0))))
    if "top_k" in how:
        processors.append(TopKLogitsWarper(int(how["top_k"])))
    if "top_p" in how:
        processors.append(TopPLogitsWarper(how["top_p"]))
    if "min_p" in how:
        processors.append(MinPLogitsWarper(how["min_p"]))
    expected = torch.softmax(processors(torch.tensor([likely]), row[None].clone())[0].double(), dim=-1)
    rows = [sequence(seed, likely[:2], likely[2:], **how) for seed in range(DRAWS)]
    tokens = [one.token for one in draw(row.expand(DRAWS, VOCAB).clone(), rows)]
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    assert counts[expected == 0].sum() == 0, "a token that the filters leave out"
    # Pearson's chi-square over the tokens expected often enough, the others together; 5 sigma.
    common = expected * DRAWS >= 5
    cells = torch.cat([expected[common], expected[~common].sum()[None]]) * DRAWS
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    cells, seen = cells[cells > 0], seen[cells > 0]
    statistic = float(((seen - cells) ** 2 / cells).sum())
    freedom = max(len(cells) - 1, 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_a_wrong_distribution_would_be_noticed() -> None:
    """The bound above has teeth: temperature 0.9 held against temperature 1 fails it by far."""
    row = logits()
    rows = [sequence(seed, temperature=0.9) for seed in range(DRAWS)]
    tokens = [one.token for one in draw(row.expand(DRAWS, VOCAB).clone(), rows)]
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    expected = torch.softmax(row.double(), dim=-1)
    common = expected * DRAWS >= 5
    cells, seen = expected[common] * DRAWS, counts[common]
    assert float(((seen - cells) ** 2 / cells).sum()) > int(common.sum()) + 5 * math.sqrt(2 * int(common.sum()))


def test_a_draw_depends_on_seed_sample_and_position_alone() -> None:
    row = logits()
    alone = draw(row[None].clone(), [sequence(5, top_p=0.9)])[0].token
    mixed = [sequence(1), sequence(2, temperature=0), sequence(5, top_p=0.9), sequence(3, top_k=3)]
    assert draw(torch.stack([logits(1), logits(2), row, logits(3)]), mixed)[2].token == alone
    positions = {draw(row[None].clone(), [sequence(5, output=[4] * n)])[0].token for n in range(12)}
    assert len(positions) > 3


def test_greedy_bias_and_penalties() -> None:
    row = torch.zeros(VOCAB)
    row[[10, 20, 30]] = torch.tensor([3.0, 2.5, 2.0])
    cases: list[tuple[dict[str, Any], list[int], int]] = [
        ({}, [], 10),
        ({"logit_bias": {30: 5.0}}, [], 30),
        ({"logit_bias": {10: -100.0}}, [], 20),
        ({"presence_penalty": 1.0}, [10], 20),
        ({"presence_penalty": 1.0}, [], 10),
        ({"frequency_penalty": 0.2}, [10, 10], 10),
        ({"frequency_penalty": 0.2}, [10, 10, 10], 20),
        ({"repetition_penalty": 1.5}, [10], 20),
    ]
    for how, output, best in cases:
        got = draw(row[None].clone(), [sequence(output=output, temperature=0, **how)])[0].token
        assert got == best, (how, output)


def test_logprobs_are_of_the_raw_distribution() -> None:
    row = logits()
    one = draw(row[None].clone(), [sequence(3, temperature=0.3, top_k=2, logprobs=4, logit_bias={7: 50.0})])[0]
    raw = torch.log_softmax(row, dim=-1)
    assert one.token == 7
    assert one.logprob is not None
    assert one.logprob.logprob == pytest.approx(float(raw[7]), abs=1e-5)
    assert [token for token, _ in one.logprob.top] == raw.topk(4).indices.tolist()
    assert [p for _, p in one.logprob.top] == pytest.approx(raw.topk(4).values.tolist(), abs=1e-5)


def test_a_row_that_is_not_finite_gets_no_token_and_harms_no_other() -> None:
    bad = logits()
    bad[4] = float("nan")
    got = draw(torch.stack([bad, logits()]), [sequence(1), sequence(1)])
    assert got[0].token is None
    assert got[1].token == draw(logits()[None], [sequence(1)])[0].token


def test_bfloat16_logits_are_drawn_from_too() -> None:
    row = logits().to(torch.bfloat16)
    got = draw(row[None].clone(), [sequence(1, temperature=0, repetition_penalty=1.1)])[0].token
    assert got == int(row.float().argmax())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_draw_nothing_however_they_are_asked(value: float) -> None:
    """They go through the same operations as the others, which must neither fail nor touch these."""
    hows: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 300, "top_p": 0.999}, {"logprobs": 3}, {"min_p": 0.1}]
    bad = [logits().index_fill(0, torch.tensor([4]), value) for _ in hows]
    rows = [sequence(1, **how) for how in hows]
    mixed = draw(torch.stack([*bad, *(logits() for _ in hows)]), rows + rows)
    assert [one.token for one in mixed[: len(hows)]] == [None] * len(hows)
    assert mixed[len(hows) :] == draw(torch.stack([logits() for _ in hows]), rows)


def test_each_row_reports_as_many_alternatives_as_it_asks_for() -> None:
    asked = [None, 2, 0, 5]
    rows = [sequence(3, temperature=0, logprobs=count) for count in asked]
    got = [one.logprob for one in draw(torch.stack([logits(n) for n in range(4)]), rows)]
    assert [None if one is None else len(one.top) for one in got] == asked
    assert all(one is None or not one.top or one.top[0] == (one.token_id, one.logprob) for one in got)
