"""The native forms of `attention` and `layer`: their tensors checked and handed over. For CPU tensors of DTYPES."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loramill.kernels.native import LANES, function

if TYPE_CHECKING:
    from loramill.kernels.attention import Pages

_NORM = struct.Struct("@PPPPfi")
_ROPE = struct.Struct("@PPPPPPPPqqiiiif")
"""`Norm` and `Rope` in `cpp/rows.h`."""
ROWS_OF_TASK = 16
"""Query rows that one task takes: with their keys read once for four of them. One row each in a decoding pass."""


def store_native(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lines: Tensor) -> None:
    """`attention.store`."""
    k, v = _heads(k), _heads(v)
    function("store", keys.dtype)(
        *(k.data_ptr(), k.stride(0), k.stride(1), v.data_ptr(), v.stride(0), v.stride(1)),
        *(keys.data_ptr(), values.data_ptr(), lines.data_ptr(), k.shape[0]),
        *(keys.shape[1], keys.shape[3], values.shape[3], keys.shape[2], *_strides(keys, values)),
    )


def attends(keys: Tensor, values: Tensor) -> bool:
    """Whether sizes are whole vectors."""
    return not (keys.shape[2] % LANES or keys.shape[3] % LANES or values.shape[3] % LANES)


def attend_native(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Pages,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """`attention.attend`."""
    q = _heads(q)
    height = min(ROWS_OF_TASK, pages.longest_query)
    tasks = pages.kept("tasks", lambda: _tasks(pages, height))
    function("attend", q.dtype)(
        *(out.data_ptr(), q.data_ptr(), q.stride(0), q.stride(1), keys.data_ptr(), values.data_ptr()),
        *(pages.starts.data_ptr(), pages.lengths.data_ptr(), pages.tables.data_ptr(), pages.tables.stride(0)),
        *(pages.longest, q.shape[1], keys.shape[1], keys.shape[3], values.shape[3], keys.shape[2]),
        *(window or 0, scale, softcap or 0.0, *_strides(keys, values), tasks.data_ptr(), len(tasks), height),
    )


def _tasks(pages: Pages, height: int) -> Tensor:
    """[tasks, 2] int32: a sequence, and the first of at most `height` query rows of it."""
    starts = pages.starts.long()
    cuts = (starts[1:] - starts[:-1] + height - 1) // height
    sequence = torch.repeat_interleave(torch.arange(len(cuts)), cuts)
    number = torch.arange(len(sequence)) - (torch.cumsum(cuts, 0) - cuts)[sequence]
    return torch.stack([sequence, starts[sequence] + number * height], 1).int()


class Rows(NamedTuple):
    """What is to be done with each row of a product."""

    how: bytes
    """`Norm` or `Rope`, with the addresses of tensors that whoever asked for it must hold on to."""
    results: tuple[Tensor, ...]


def norm_rows(x: Tensor, weight: Tensor, eps: float, *, adds: bool) -> Rows:
    """`layer.add_rms_norm` of contiguous x: (y, s), s being x where it `adds` nothing."""
    y = torch.empty_like(x)
    s = torch.empty_like(x) if adds else x
    return Rows(_NORM.pack(x.data_ptr(), weight.data_ptr(), y.data_ptr(), s.data_ptr(), eps, x.shape[1]), (y, s))


def rope_rows(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lines: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Rows:
    """`layer.rope_store`: (q,)."""
    kv_heads, size, dim = keys.shape[1:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q = qkv.new_empty(qkv.shape[0], heads, dim)
    weights = (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    tensors = (
        cos.data_ptr(),
        sin.data_ptr(),
        *weights,
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        lines.data_ptr(),
    )
    return Rows(_ROPE.pack(*tensors, *_strides(keys, values), heads, kv_heads, dim, size, eps), (q,))


def add_rms_norm_native(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`layer.add_rms_norm`."""
    x = x.contiguous()
    how, (y, s) = norm_rows(x, weight, eps, adds=residual is not None)
    delta = None if residual is None else residual.contiguous()
    function("add_rms_norm", x.dtype)(how, None if delta is None else delta.data_ptr(), x.shape[0])
    return y, s


def rope_store_native(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lines: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """`layer.rope_store`."""
    how, (q,) = rope_rows(qkv, cos, sin, keys, values, lines, norms, eps)
    function("rope_store", qkv.dtype)(how, qkv.data_ptr(), qkv.stride(0), qkv.shape[0])
    return q


def gated_native(gate_up: Tensor, activation: int) -> Tensor:
    """`layer.gated`; `activation` is its place among ACTIVATIONS."""
    gate_up = gate_up.contiguous()
    y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    function("gated", y.dtype)(gate_up.data_ptr(), y.data_ptr(), y.shape[0], y.shape[1], activation)
    return y


def largest_native(x: Tensor) -> tuple[Tensor, Tensor]:
    """`layer.largest`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    values, index = torch.empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    function("largest", x.dtype)(x.data_ptr(), x.stride(0), x.shape[0], x.shape[1], index.data_ptr(), values.data_ptr())
    return values, index


def _strides(keys: Tensor, values: Tensor) -> tuple[int, int]:
    """Tokens from a page to the next, and from a head to the next, in either.

    Raises:
        ValueError: they differ, or the tokens of a page do not lie side by side.
    """
    steps = [[cache.stride(i) // cache.shape[3] for i in range(3)] for cache in (keys, values)]
    if steps[0] != steps[1] or steps[0][2] != 1:
        raise ValueError(f"keys and values must lie alike, not with strides {keys.stride()} and {values.stride()}")
    return steps[0][0], steps[0][1]


def _heads(x: Tensor) -> Tensor:
    """x [T, heads, dim] with the numbers of a head side by side."""
    return x if x.stride(2) == 1 else x.contiguous()
