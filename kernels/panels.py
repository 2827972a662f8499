"""Low-rank weights in the panels that `cpp/lora.cpp` reads: what fills a slot of `NativeLora`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loramill.kernels import native

_MATRIX = struct.Struct("@PPqiiiiiifi")
"""`Matrix` in `cpp/panels.cpp`, its padding written out."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Pair(NamedTuple):
    """What adds scale * B A to a projection's outputs from `first` on, as it was trained, in any dtype of floats."""

    a: Tensor
    """[rank, K]."""
    b: Tensor
    """[outputs, rank]."""
    scale: float = 1.0
    first: int = 0


class Filling:
    """Matrices on their way into panels: listed one by one, and written by one call, which Python does not wait for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._fill = native.function("fill_panels", dtype)
        self._list: list[bytes] = []
        self._kept: list[Tensor] = []

    def add(self, room: int, depth: int, weights: Tensor, scale: float, lane: int, k: int) -> None:
        """To write weights [n, k size] * scale, rounded once, from this lane and this k on into the panels at address
        `room`, whose reduced dimension is `depth`."""
        rows, size = weights.shape
        stride, along = weights.stride()
        if along != 1:
            weights, stride = weights.contiguous(), size
        self._kept.append(weights)
        from_to = weights.data_ptr(), room, stride
        self._list.append(_MATRIX.pack(*from_to, rows, size, lane, k, depth, _DTYPES[weights.dtype], scale, 0))

    def run(self) -> None:
        """Write all that was added."""
        self._fill(b"".join(self._list), len(self._list))


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

    def pack(self, siblings: Sequence[Sequence[Pair]], room: Tensor, filling: Filling) -> Panels:
        """Lay an adapter out in the `size` numbers of `room`, which `filling` writes: each sibling's pairs, their A one
        above the other, and no two of them with the same outputs. None of a sibling: it is left alone."""
        given = [sum(pair.a.shape[0] for pair in pairs) for pairs in siblings]
        ranks, sizes = self._ranks(given), self._sizes(given)
        a, b = room[: sizes[0]], room[sizes[0] :]
        if sum(given) * self.k_size < sizes[0]:
            a.zero_()
        if sum(pair.b.numel() for pairs in siblings for pair in pairs) < sizes[1]:
            b.zero_()
        to_a, to_b, lane = a.data_ptr(), b.data_ptr(), 0
        for pairs, rank, width in zip(siblings, ranks, self.widths, strict=True):
            k = 0
            for pair in pairs:
                filling.add(to_a, self.k_size, pair.a, 1.0, lane + k, 0)
                filling.add(to_b, rank, pair.b, pair.scale, pair.first, k)
                k += pair.a.shape[0]
            lane, to_b = lane + rank, to_b + rank * width * b.itemsize
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


def panel_form(widths: Sequence[int], k_size: int, dtype: torch.dtype, device: torch.device) -> PanelForm | None:
    """The form for slots over sibling projections of these widths there, or None where they must be rows."""
    whole = all(width % native.LANES == 0 for width in widths) and k_size % 2 == 0
    serves = whole and native.serves(torch.empty(0, dtype=dtype, device=device))
    return PanelForm(widths, k_size, dtype) if serves else None
