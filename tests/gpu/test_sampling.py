"""Drawing on a device: the CPU's tokens, and nobody waits for the device before they are asked for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from loramill.worker.sampling import Drawing, draw
from tests.worker.test_sampling import VOCAB, sequence

HOWS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0}],
    "sampled": [{}, {"temperature": 0.7}],
    "filtered": [{"top_p": 0.9}, {"top_k": 7}, {"min_p": 0.05}],
    "all kinds": [
        {"temperature": 0},
        {},
        {"top_k": 40, "top_p": 0.8},
        {"repetition_penalty": 1.3, "logit_bias": {3: 2}},
    ],
}


@pytest.mark.parametrize("kind", HOWS)
def test_drawing_waits_for_nothing(kind: str) -> None:
    rows = [sequence(seed, output=[5, 9], **how) for seed in range(20) for how in HOWS[kind]]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    there = logits.cuda()
    draw(there.clone(), rows)  # what libraries do once is done
    mine = there.clone()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            drawing = Drawing(mine, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in said if "synchronizing" in str(one.message)]
    assert not waits
    assert [one.token for one in drawing.wait()] == [one.token for one in draw(logits.clone(), rows)]
