"""Decode passes as CUDA graphs: captured at few segments, replayed with more, and PEFT's answers through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loramill.worker.batch import Batch
from loramill.worker.engine import Engine
from loramill.worker.graphs import Graphs
from loramill.worker.request import Request, Result, Sampling, plain
from tests.worker.parity import mixed_rows, peft_answers, requests_of
from tests.worker.test_graphs import with_graphs


def replayed(graphs: Graphs, forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    logits = graphs.run(batch)
    return forward(batch) if logits is None else logits


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_answers_equal_pefts(
    name: str,
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
) -> None:
    one, rows = family(name), mixed_rows(seed=3, count=48)
    engine = make_engine(name, device="cuda", max_loras_per_batch=3, max_num_seqs=21)
    graphs = with_graphs(engine, replayed)
    results = answer(engine, requests_of(one, rows))
    for key, tokens in enumerate(peft_answers(one, rows, "cuda")):
        assert results[key].completions[0].token_ids == tokens, f"row {key}, adapter {rows[key][1]}"
    assert len(graphs) > 0


def test_a_graph_serves_more_segments_and_longer_rows_than_at_capture(
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
) -> None:
    """Captured for eight short rows of one adapter; replayed for seven long ones of all of them and of the base."""
    one = family("llama")
    hashes = [None, *(adapter.sha256 for adapter in one.adapters)]
    engine = make_engine("llama", device="cuda", max_loras_per_batch=5, max_num_seqs=8)
    compared: list[int] = []

    def both(graphs: Graphs, forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        eager = forward(batch)
        logits = graphs.run(batch)
        if logits is not None:
            torch.testing.assert_close(logits, eager, rtol=1e-4, atol=1e-4)
            compared.append(batch.tokens.shape[0])
        return eager

    graphs = with_graphs(engine, both)

    def requests(first: int, count: int, prompt: int, mixes: list[str | None]) -> list[Request]:
        how = Sampling(12, temperature=0, ignore_eos=True)
        return [
            Request(first + i, [3 + (i + j) % 90 for j in range(prompt)], how, plain(mixes[i % len(mixes)]))
            for i in range(count)
        ]

    answer(engine, requests(0, 8, 4, hashes[1:2]))
    captured = len(graphs)
    answer(engine, requests(100, 7, 150, hashes))
    assert {8, 7} <= set(compared)
    assert len(graphs) == captured, "seven rows went through the graph for eight"
    graphs.forget()
    assert len(graphs) == 0
    answer(engine, requests(200, 8, 30, hashes))
    assert len(graphs) > 0


def test_a_model_that_waits_for_the_device_runs_without_graphs(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("llama", device="cuda", max_num_seqs=4)
    expected, forward = engine.next_logits([7]), engine._model.forward

    def asks(batch: Batch) -> Tensor:
        assert int(batch.positions.max()) >= 0
        return forward(batch)

    engine._model.forward = asks  # type: ignore[method-assign]
    graphs = with_graphs(engine, replayed)
    for _ in range(2):
        torch.testing.assert_close(engine.next_logits([7]), expected)
        assert graphs.refused
        assert len(graphs) == 0
