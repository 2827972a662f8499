"""Low-rank weights in the panels that `cpp/lora.cpp` reads: what fills a slot of `NativeLora`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loramill.kernels import native


class LowRank(Protocol):
    """What an adapter adds to a projection: `a` [rank, K], `b` [rank, width]."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...


class Panels(NamedTuple):
    """An adapter's weights for sibling projections."""

    a: Tensor
    """[columns / LANES, K / step, LANES, step]: the siblings' ranks side by side."""
    b: Tensor
    """Of each sibling [width / LANES, rank / step, LANES, step], one after the other in one dimension."""
    ranks: tuple[int, ...]
    """Of each sibling, to a multiple of `step`; 0 where the adapter leaves it alone."""


class PanelForm:
    """How weights for sibling projections of these widths, which read one input of size `k_size`, lie.

    `step` numbers of the reduced dimension lie together, as the processor multiplies them.
    """

    def __init__(self, widths: Sequence[int], k_size: int, dtype: torch.dtype) -> None:
        self.widths, self.k_size, self.dtype = tuple(widths), k_size, dtype
        self.step = native.function("multi_lora_step", dtype)()
        self._pack = native.function("pack_panels", dtype)

    def pack(self, deltas: Sequence[LowRank | None], room: Tensor | None = None) -> Panels:
        """Lay an adapter out, in the `size` numbers of `room`; None where it leaves a sibling alone."""
        given = [0 if one is None else one.a.shape[0] for one in deltas]
        ranks, sizes = self._ranks(given), self._sizes(given)
        a, b = (torch.empty(sum(sizes), dtype=self.dtype) if room is None else room).split(sizes)
        if sum(given) * self.k_size < len(a):
            a.zero_()
        if list(ranks) != given:
            b.zero_()
        rows = start = 0
        for one, rank, width in zip(deltas, ranks, self.widths, strict=True):
            if one is not None:
                self._fill(a, one.a, rows, self.k_size)
                self._fill(b[start:], one.b.t(), 0, rank)
            rows, start = rows + rank, start + rank * width
        return Panels(a, b, ranks)

    def size(self, ranks: Sequence[int]) -> int:
        """How many numbers an adapter of these ranks, one for each sibling, takes."""
        return sum(self._sizes(ranks))

    def _ranks(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-rank // self.step) * self.step for rank in ranks)

    def _sizes(self, given: Sequence[int]) -> tuple[int, int]:
        """Of A and B."""
        ranks = self._ranks(given)
        columns = -(-sum(ranks) // native.LANES) * native.LANES
        return columns * self.k_size, sum(rank * width for rank, width in zip(ranks, self.widths, strict=True))

    def _fill(self, panels: Tensor, weights: Tensor, first: int, depth: int) -> None:
        """Write weights [n, k] into the lanes from `first` on of panels whose reduced dimension is `depth`."""
        pointers = panels.data_ptr(), weights.data_ptr()
        self._pack(*pointers, *weights.stride(), *weights.shape, first, depth)


def panel_form(widths: Sequence[int], k_size: int, dtype: torch.dtype, device: torch.device) -> PanelForm | None:
    """The form for slots over sibling projections of these widths there, or None where they must be rows."""
    whole = all(width % native.LANES == 0 for width in widths) and k_size % 2 == 0
    serves = whole and native.serves(torch.empty(0, dtype=dtype, device=device))
    return PanelForm(widths, k_size, dtype) if serves else None
