"""Decode passes padded to what a graph is captured for: run as they are here, and captured in tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from loramill.kernels.router import Router
from loramill.kernels.routing import TileRouting
from loramill.worker.batch import Batch
from loramill.worker.cache import KVCache
from loramill.worker.engine import Engine
from loramill.worker.flight import Flights
from loramill.worker.graphs import PATIENCE, Graphs, Size, bucket, choose, fill
from loramill.worker.request import Request, Result
from tests.worker.parity import mixed_rows, peft_answers, requests_of


def test_buckets() -> None:
    assert [bucket(rows, 256) for rows in (1, 2, 3, 5, 8, 9, 17, 250, 256)] == [1, 2, 4, 8, 8, 16, 24, 256, 256]
    assert [bucket(rows, 6) for rows in (1, 3, 5, 6)] == [1, 4, 6, 6]
    assert bucket(11, 12) == 12


def test_a_size_that_passes_by_goes_through_a_larger_graph() -> None:
    wanted = Size(24, 16)
    captured = {Size(256, 16), Size(32, 16), Size(40, 64), Size(16, 16)}
    assert choose(wanted, captured, 1) == Size(32, 16)
    assert choose(wanted, captured, PATIENCE + 1) == wanted
    assert choose(wanted, {wanted, *captured}, 1) == wanted
    assert choose(wanted, {Size(16, 16), Size(256, 64)}, 1) == wanted, "none is large enough, or it is cut otherwise"


def with_graphs(engine: Engine, run: Callable[[Graphs, Callable[[Batch], Tensor], Batch], Tensor]) -> Graphs:
    """Let an engine's passes go through `run`, with a scratch page in its cache and tiles of rows."""
    room, model = engine._scheduler.room, engine._model
    router = Router(engine.config.max_loras_per_batch, model.device, tiled=True)
    cache = KVCache(model.shapes, len(room.pool) + 1, room.pool.size, model.dtype, model.device)
    engine._flights = Flights(model, cache, router, room, overlap=True)
    forward = model.forward
    graphs = Graphs(forward, cache, router, engine.max_num_seqs, room.tables.shape[1], scratch_page=len(room.pool))
    model.forward = lambda batch: run(graphs, forward, batch)  # type: ignore[method-assign]
    return graphs


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_padded_passes_answer_as_peft_does(
    name: str,
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loramill.worker.lora.panel_form", lambda *_: None)  # a device's slots, and its routing
    one, rows = family(name), mixed_rows(seed=3, count=24)
    engine = make_engine(name, max_loras_per_batch=3, max_num_seqs=13, max_num_batched_tokens=64)
    statics: dict[Size, Batch] = {}
    padded: list[tuple[int, int]] = []

    def run(graphs: Graphs, forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        count, routing = batch.tokens.shape[0], batch.routing
        if batch.pages.longest_query > 1 or batch.outputs.shape[0] < count:
            return forward(batch)
        assert isinstance(routing, TileRouting)
        size = Size(bucket(count, engine.max_num_seqs), routing.height)
        fill(statics.setdefault(size, graphs.static(size)), batch, graphs.scratch_page)
        padded.append((count, size.rows))
        return forward(statics[size])[:count]

    with_graphs(engine, run)
    results = answer(engine, requests_of(one, rows))
    for key, tokens in enumerate(peft_answers(one, rows, "cpu")):
        assert results[key].completions[0].token_ids == tokens, f"row {key}, adapter {rows[key][1]}"
    assert len({rows for _, rows in padded}) > 2
    assert any(count < rows for count, rows in padded)
    assert len(padded) > 3 * len(statics), "the same tensors serve many passes"


def test_what_is_no_decode_pass_is_left_alone(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_num_seqs=4)
    seen: list[Tensor | None] = []

    def run(graphs: Graphs, forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        seen.append(graphs.run(batch))
        return forward(batch)

    with_graphs(engine, run)
    engine.next_logits([5, 9, 11])
    assert seen == [None]
