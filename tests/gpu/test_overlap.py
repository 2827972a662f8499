"""Passes that overlap on a device: answers stay what they are, and the host waits for tokens alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loramill.worker.engine import Engine
from loramill.worker.request import Request, Result, Sampling, plain
from tests.worker.test_overlap import rows_of, said


@pytest.mark.parametrize("kinds", [["greedy", "several answers", "stopped"], ["sampled", "filtered", "that look back"]])
def test_every_kind_of_row_says_the_same(
    kinds: list[str],
    family: Callable[[str], Any],
    make_engine: Callable[..., Engine],
    answer: Callable[[Engine, list[Request]], dict[int, Result]],
) -> None:
    hashes = [None, *(adapter.sha256 for adapter in family("llama").adapters)]
    rows = rows_of(kinds, hashes, 40)
    limits = {"device": "cuda", "max_loras_per_batch": 3, "max_num_seqs": 7, "max_num_batched_tokens": 64}
    expected = said(answer(make_engine(overlap=False, **limits), rows))
    assert said(answer(make_engine(**limits), rows)) == expected


def test_a_decode_step_waits_for_nothing_but_the_tokens_before_it(
    family: Callable[[str], Any], make_engine: Callable[..., Engine]
) -> None:
    hashes = [None, *(adapter.sha256 for adapter in family("llama").adapters[:3])]
    engine = make_engine(device="cuda", max_loras_per_batch=3)
    for key in range(8):
        how = Sampling(60, temperature=key % 2, seed=key, ignore_eos=True)
        engine.add(Request(key, [5 + key, 9], how, plain(hashes[key % 4])))
    for _ in range(40):  # what is compiled, captured or cut once is there
        engine.step()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(5):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [str(one.message) for one in heard if "synchronizing" in str(one.message)] == []
