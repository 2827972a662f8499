"""What an adapter makes of the base's weights when it is merged: the numbers, and the formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramill.worker.tensor_names import Rows


@dataclass(slots=True, frozen=True)
class LowRank:
    """A low-rank pair over rows `target` of a linear layer's weight, or over a whole embedding.

    `a` [rank, in] and `b` [rows, rank] as they were saved. An embedding [vocab, hidden] is taken as PEFT takes it, as a
    linear layer from one-hot tokens: a [rank, vocab], b [hidden, rank].
    """

    a: Tensor
    b: Tensor
    scale: float
    target: Rows
    magnitude: Tensor | None = None
    """DoRA's, a number for each row of `b`."""
    bias: Tensor | None = None

    def add_to(self, weight: Tensor, strength: float, *, embedding: bool) -> None:
        """Change a float32 weight [out, in] (an embedding's [vocab, hidden]) in place.

        W + s B A, and with a magnitude m (DoRA, 2402.09353, equation 5): m (W + s B A) / |W + s B A|, the norm over
        each of b's rows.
        """
        a, b = self.a.to(weight), self.b.to(weight) * (strength * self.scale)
        rows = weight if embedding else weight[slice(*self.target)]
        if embedding:
            rows.addmm_(a.t(), b.t())
        else:
            rows.addmm_(b, a)
        if self.magnitude is not None:
            factor = self.magnitude.to(weight) / torch.linalg.vector_norm(rows, dim=0 if embedding else 1)
            rows.mul_(factor if embedding else factor[:, None])


@dataclass(slots=True, frozen=True)
class Tokens:
    """Rows of an embedding or a head that were trained by themselves: row ids[i] becomes rows[i]."""

    ids: Tensor
    rows: Tensor


@dataclass(slots=True, frozen=True)
class Patch:
    """What static serving needs of an adapter, as exact as it was saved."""

    low_rank: Mapping[str, Sequence[LowRank]]
    """By module path."""
    replaced: Mapping[str, Tensor]
    """Whole parameters, by name."""
    tokens: Mapping[str, Tokens]
    """By module path."""

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the parameters that it changes."""
        weights = {f"{module}.weight" for module in (*self.low_rank, *self.tokens)}
        biases = {f"{m}.bias" for m, pairs in self.low_rank.items() if any(p.bias is not None for p in pairs)}
        return frozenset(weights | biases | set(self.replaced))


Patches = Sequence[tuple[Patch, float]]
"""Patches with the strength of each."""


def weight_of(
    patches: Patches, module: str, own: Callable[[], Tensor], device: torch.device, *, embedding: bool = False
) -> Tensor:
    """A module's weight with the patches in it, in float32; `own` gives the base's in float32, to be written over."""
    name = f"{module}.weight"
    whole = next((patch.replaced[name] for patch, _ in patches if name in patch.replaced), None)
    weight = own() if whole is None else whole.to(device, torch.float32, copy=True)
    for patch, strength in patches:
        for pair in patch.low_rank.get(module, ()):
            pair.add_to(weight, strength, embedding=embedding)
        if module in patch.tokens:
            tokens = patch.tokens[module]
            weight[tokens.ids.to(device)] = tokens.rows.to(weight)
    return weight


def bias_of(patches: Patches, module: str, own: Tensor) -> Tensor:
    """A module's bias with the patches in it, in float32; `own` is the base's, or zeros where it has none."""
    name = f"{module}.bias"
    whole = next((patch.replaced[name] for patch, _ in patches if name in patch.replaced), None)
    bias = (own if whole is None else whole).to(own.device, torch.float32, copy=True)
    for patch, strength in patches:
        for pair in patch.low_rank.get(module, ()):
            if pair.bias is not None:
                bias[slice(*pair.target)] += pair.bias.to(bias) * (strength * pair.scale)
    return bias
