"""An adapter's low-rank weights in one flat tensor: what a device slot is filled from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loramill.worker.tensor_names import Rows


@dataclass(slots=True, frozen=True)
class Delta:
    """What an adapter adds to one projection: `a` [rank, in], `b` [rank, out], the scale folded into `b`."""

    a: Tensor
    b: Tensor


@dataclass(slots=True, frozen=True)
class Part:
    """One low-rank pair on disk, by its tensors' names, and the rows of a module's output that it changes."""

    a: str
    """[rank, in]."""
    b: str
    """[out, rank] of what was trained; rows `source` of it are rows `target` of the base's module."""
    rank: int
    scale: float
    """alpha / rank, or alpha / sqrt(rank)."""
    source: Rows
    target: Rows
    magnitude: str | None = None
    """DoRA's, [out]."""
    bias: str | None = None
    """Of `b`, [out]."""


@dataclass(slots=True, frozen=True)
class Target:
    """A module that an adapter changes by low-rank pairs: one, or one for each part of a fused projection."""

    parts: tuple[Part, ...]
    out_features: int
    in_features: int

    @property
    def rank(self) -> int:
        """Of all parts together: their A lie one above the other, their B in blocks."""
        return sum(part.rank for part in self.parts)

    @property
    def numbers(self) -> int:
        """How many numbers A and B have."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class Packed:
    """All A and B of an adapter in `flat`, one 1-D tensor; `targets` says in which order."""

    flat: Tensor
    targets: Mapping[str, Target]

    @property
    def nbytes(self) -> int:
        """Of `flat`."""
        return self.flat.numel() * self.flat.itemsize

    @cached_property
    def deltas(self) -> Mapping[str, Delta]:
        """Views into `flat` by module path."""
        deltas, start = {}, 0
        for module, target in self.targets.items():
            middle, end = start + target.rank * target.in_features, start + target.numbers
            a, b = self.flat[start:middle], self.flat[middle:end]
            deltas[module] = Delta(a.view(target.rank, -1), b.view(target.rank, -1))
            start = end
        return deltas

    def to(self, device: torch.device, copies: torch.cuda.Stream | None = None) -> Packed:
        """The same on a device: one copy, which does not wait where this one is pinned. In the stream `copies` it goes
        beside what the device still has to compute, and only what is computed from now on waits for it."""
        if copies is None:
            return Packed(self.flat.to(device, non_blocking=self.flat.is_pinned()), self.targets)
        with torch.cuda.stream(copies):
            copied = self.to(device)
        now = torch.cuda.current_stream(device)
        now.wait_stream(copies)
        copied.flat.record_stream(now)
        return copied


def pack(targets: Mapping[str, Target], tensors: Mapping[str, Tensor], dtype: torch.dtype, *, pin: bool) -> Packed:
    """Lay out an adapter's tensors; B is transposed and scaled in float32 before it is rounded to `dtype`."""
    total = sum(target.numbers for target in targets.values())
    packed = Packed(torch.empty(total, dtype=dtype, pin_memory=pin), targets)
    for module, delta in packed.deltas.items():
        _fill(delta, targets[module].parts, tensors)
    return packed


def _fill(delta: Delta, parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> None:
    if any(part.target != (0, delta.b.shape[1]) for part in parts):  # of a fused projection
        delta.b.zero_()
    first = 0
    for part in parts:
        rows = slice(first, first + part.rank)
        delta.a[rows] = tensors[part.a]
        b = tensors[part.b][slice(*part.source)].float().t()
        torch.mul(b, part.scale, out=delta.b[rows, slice(*part.target)])
        first += part.rank
