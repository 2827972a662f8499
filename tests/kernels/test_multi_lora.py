"""The multi-LoRA operator against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loramill.kernels.multi_lora import Routing, multi_lora, multi_lora_reference
from loramill.kernels.segments import BASE_SLOT, segments_of

CPU = torch.device("cpu")
SLOTS, RANK, K = 6, 24, 40
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
MIXES = {
    "identical": [(2, 130)],
    "distinct": [(s, 1) for s in range(SLOTS)],
    "uniform": [(s, 17) for s in range(SLOTS)],
    "zipf": [(0, 60), (1, 30), (2, 20), (3, 15), (4, 12), (5, 10)],
    "long": [(0, 100), (3, 63), (5, 200)],
    "base among them": [(BASE_SLOT, 5), (1, 15), (3, 1), (BASE_SLOT, 2)],
    "unsorted": [(4, 3), (1, 2), (4, 9), (0, 1)],
    "base only": [(BASE_SLOT, 7)],
    "one row": [(5, 1)],
}
RANKS = [[24, 24, 24], [8, 8, 8], [1, 3, 24], [0, 16, 0], [0, 0, 0], [5, 0, 2]]
"""Rank of each sibling in each slot: mixed, partly untouched, and one slot that touches none."""


def weights(widths: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(SLOTS, len(widths), RANK, K, generator=generator)
    b = [torch.randn(SLOTS, RANK, width, generator=generator) for width in widths]
    for slot in range(SLOTS):
        for i in range(len(widths)):
            a[slot, i, RANKS[slot][i] :] = 0
            b[i][slot, RANKS[slot][i] :] = 0
    return a.to(dtype), [part.to(dtype) for part in b]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("widths", [(32,), (24, 8, 8)], ids=["single", "siblings"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_every_form_equals_the_formula(mix: list[tuple[int, int]], widths: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = weights(widths, dtype)
    rows = sum(n for _, n in mix)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(4)).to(dtype)
    base = torch.randn(rows, sum(widths), generator=torch.Generator().manual_seed(5)).to(dtype)
    segments = segments_of(mix)
    expected = base.double()
    multi_lora_reference(expected, x, a, b, segments)
    ranks = [slot[: len(widths)] for slot in RANKS]
    for by_segment in (True, False):
        routing = Routing(segments, CPU)
        if routing.by_segment and not by_segment:
            continue  # a mix of long segments has no tiles made for it
        routing.by_segment = by_segment
        y = base.clone()
        multi_lora(y, x, a, b, ranks, routing)
        error = (y.double() - expected).norm() / expected.norm()
        assert error < BOUNDS[dtype]
        untouched = torch.ones(rows, dtype=torch.bool)
        for start, end, slot in segments:
            untouched[start:end] = not any(ranks[slot])
        assert torch.equal(y[untouched], base[untouched]), "rows of no adapter must stay bit for bit"


def test_the_mixes_reach_both_forms() -> None:
    forms = {name: Routing(segments_of(mix), CPU).by_segment for name, mix in MIXES.items()}
    assert forms["identical"]
    assert forms["long"]
    assert not forms["distinct"]
    assert not forms["zipf"]


def test_a_row_of_nan_stays_alone() -> None:
    a, b = weights((32,), torch.float32)
    x = torch.ones(34, K)
    x[3] = float("nan")
    y = torch.zeros(34, 32)
    multi_lora(y, x, a, b, [[24]] * SLOTS, Routing(segments_of([(0, 17), (1, 17)]), CPU))
    assert y[3].isnan().all()
    assert torch.isfinite(y[torch.arange(34) != 3]).all()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"x": torch.zeros(4, K + 1)}, "a must be"),
        ({"x": torch.zeros(3, K)}, "same rows"),
        ({"y": torch.zeros(4, 31)}, "add up to 31"),
        ({"a": torch.zeros(SLOTS, 2, RANK, K)}, "a must be"),
        ({"x": torch.zeros(4, K, dtype=torch.float64)}, "one dtype"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], names: str) -> None:
    a, b = weights((32,), torch.float32)
    given = {"y": torch.zeros(4, 32), "x": torch.zeros(4, K), "a": a, **change}
    with pytest.raises(ValueError, match=names):
        multi_lora(given["y"], given["x"], given["a"], b, [[1]] * SLOTS, Routing(segments_of([(0, 4)]), CPU))
