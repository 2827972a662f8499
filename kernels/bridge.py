"""The bridge between shrink and expand, and the ways to it that are plain products.

Semantics: v[p, e, t, c] are what rows are brought down to; an expand adds the planes p in order. Beside the shrink
kernels there are two ways, both a product against every resident slot, of which the expand reads the row's own columns:

    all slots:  v[0, 0, t] = A.reshape(S * siblings * R, K) @ x[t]
    folded:     (y[t], v[0, 0, t]) = concat(W, A.reshape(S * siblings * R, K)) @ x[t]

The folded one keeps A below the base's weight W, so that one GEMM gives the base's output and the bridge, and the
expand is the only launch that adapters add; there v has the dtype of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True, frozen=True)
class Bridge:
    """v [planes, members, T, columns] and the columns from one slot to the next in it.

    `slot_columns` is 0 where columns belong to the row's own slots, by member; in a product against every slot there is
    one member plane, and each slot has columns of its own.
    """

    v: Tensor
    slot_columns: int = 0


def all_slots(x: Tensor, a: Tensor) -> Bridge:
    """x [T, K] against every slot's A [S, siblings, R, K], in float32."""
    siblings, rank, k_size = a.shape[1:]
    resident = a.view(-1, k_size).t()
    if x.is_cuda and x.dtype is not torch.float32:
        v = torch.mm(x, resident, out_dtype=torch.float32)
    else:
        v = x.float() @ resident.float()
    return Bridge(v[None, None], siblings * rank)


@dataclass(slots=True, frozen=True)
class Folded:
    """A base weight W [N, K] with every slot's A below it, in one storage of which `weight` and `a` are views."""

    storage: Tensor
    """[N + S * siblings * R, K]"""
    bias: Tensor | None
    """[N + S * siblings * R], zero for the bridge."""
    weight: Tensor
    a: Tensor

    def product(self, x: Tensor) -> tuple[Tensor, Bridge]:
        """The base's output [T, N], a view that an expand adds to, and the bridge beside it."""
        out = F.linear(x, self.storage, self.bias)
        n_size = self.weight.shape[0]
        return out[:, :n_size], Bridge(out[None, None, :, n_size:], self.a.shape[1] * self.a.shape[2])


def fold(weight: Tensor, bias: Tensor | None, slots: int, siblings: int, rank: int) -> Folded:
    """Copy a base weight [N, K] into a storage with room for `slots` adapters; their A start as zeros."""
    n_size, k_size = weight.shape
    columns = slots * siblings * rank
    storage = weight.new_zeros(n_size + columns, k_size)
    storage[:n_size] = weight
    padded = None if bias is None else torch.cat([bias, bias.new_zeros(columns)])
    return Folded(storage, padded, storage[:n_size], storage[n_size:].view(slots, siblings, rank, k_size))
