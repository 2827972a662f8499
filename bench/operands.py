"""The tensors of one point, the same for every form that is measured, and the answer they must give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bench.points import Point

BOUND = 1e-2
"""||y - reference|| / ||reference||. Two roundings to bfloat16 are 3e-3; one wrong row of 8192 is 1.5e-2."""


@dataclass(frozen=True, slots=True)
class Operands:
    """Sets of random operands: base and delta are of one size, so that either's being wrong shows.

    x [sets, T, K]; base, y [sets, T, N]; a [sets, S, siblings, R, K]; b [sets, S, R, N]. Rows are sorted by slot.
    """

    point: Point
    x: Tensor
    base: Tensor
    y: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def make(cls, point: Point, sets: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Operands:
        generator = torch.Generator(device).manual_seed(sum(map(ord, point.name)))
        k, n, siblings = point.projection.k, sum(point.projection.widths), len(point.projection.widths)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            made = torch.empty(sets, *size, dtype=dtype, device=device)
            for one in made:  # one by one: no float32 copy of all of it
                one.copy_(torch.randn(size, generator=generator, device=device) * scale)
            return made

        base = normal(point.rows, n)
        return cls(
            point,
            normal(point.rows, k),
            base,
            base.clone(),
            normal(point.adapters, siblings, point.rank, k, scale=k**-0.5),
            normal(point.adapters, point.rank, n, scale=point.rank**-0.5),
        )

    @property
    def sets(self) -> int:
        return self.x.shape[0]

    @property
    def slots(self) -> list[int]:
        """The slot of each row."""
        return [slot for slot, count in enumerate(self.point.counts()) for _ in range(count)]

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """(slot, first row, row behind the last) of each adapter that has rows."""
        counts = self.point.counts()
        for slot, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
            if count:
                yield slot, end - count, end

    def columns(self) -> list[slice]:
        """The columns of each sibling."""
        ends = list(accumulate(self.point.projection.widths))
        return [slice(end - width, end) for end, width in zip(ends, self.point.projection.widths, strict=True)]

    def reset(self) -> None:
        """Take y back to the base's output."""
        self.y.copy_(self.base)

    def error(self, number: int) -> float:
        """How far set `number`'s y is from the formula in float64; NaN is never below a bound."""
        expected = self.base[number].double()
        for slot, first, last in self.segments():
            x = self.x[number, first:last].double()
            for sibling, columns in enumerate(self.columns()):
                v = x @ self.a[number, slot, sibling].double().t()
                expected[first:last, columns] += v @ self.b[number, slot, :, columns].double()
        return float((self.y[number].double() - expected).norm() / expected.norm())
