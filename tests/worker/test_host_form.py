"""Adapters as host memory holds them: of the size that was said, and what the slots are filled from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loramill.kernels import native
from loramill.kernels.panels import PanelForm
from loramill.worker.host_form import HostForm, Laid
from loramill.worker.model import Model
from loramill.worker.packed import Packed


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_the_size_that_was_said(name: str, dtype: str, family: Callable[[str], Any]) -> None:
    one = family(name)
    model = Model(one.base, dtype, "cpu", slots=1)
    form = HostForm(model.projections, model.dtype, pin=False)
    for adapter in one.adapters:
        held = form.read(adapter)
        assert held.nbytes == form.nbytes(adapter)
        if isinstance(held, Packed):
            continue
        assert {name for names in held.panels for name in names} >= set(adapter.targets)
        model.put(0, held)
        for projection in model.projections:
            panels = held.panels.get(projection.names)
            # Nothing is copied: the slot points into what is held.
            filled = None if projection.lora is None else projection.lora._held[0]
            assert filled is panels or (panels is None and filled.ranks == (0,) * len(projection.names))


def test_panels_where_everything_takes_them(family: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one = family("qwen2")

    def kinds() -> list[bool]:
        model = Model(one.base, "float32", "cpu", slots=1)
        form = HostForm(model.projections, model.dtype, pin=False)
        return [isinstance(form.read(adapter), Laid) for adapter in one.adapters]

    if native.operators() is not None:
        # The last one changes the head too, whose 97 rows fill no whole vectors.
        assert kinds() == [True, True, True, True, False]
    monkeypatch.setattr("loramill.kernels.native.operators", lambda: None)
    assert not any(kinds())


@pytest.mark.skipif(native.operators() is None, reason="there is no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_has_its_place_and_the_rest_is_zero(dtype: torch.dtype) -> None:
    from loramill.worker.packed import Delta

    widths, ranks, k_size = [32, 16, 48], [5, 0, 18], 6
    form = PanelForm(widths, k_size, dtype)
    deltas = [
        Delta(torch.randn(rank, k_size).to(dtype), torch.randn(rank, width).to(dtype)) if rank else None
        for rank, width in zip(ranks, widths, strict=True)
    ]
    room = torch.full((form.size(ranks),), torch.nan, dtype=dtype)
    panels = form.pack(deltas, room)

    def plain(flat: torch.Tensor, depth: int) -> torch.Tensor:
        """[lanes, depth]."""
        shape = -1, depth // form.step, native.LANES, form.step
        return flat.view(shape).permute(0, 2, 1, 3).reshape(-1, depth)

    a, b, row = plain(panels.a, k_size), panels.b, 0
    for delta, rank, width in zip(deltas, panels.ranks, widths, strict=True):
        of_b, b = b[: rank * width], b[rank * width :]
        if delta is not None:
            live = len(delta.a)
            assert torch.equal(a[row : row + live], delta.a)
            assert torch.equal(plain(of_b, rank)[:, :live], delta.b.t())
            assert not a[row + live : row + rank].any()
            assert not plain(of_b, rank)[:, live:].any()
        row += rank
    assert not a[row:].any()
    assert not len(b)
