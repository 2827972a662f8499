"""The model's linear projections with room for adapters.

Projections that read the same input (q/k/v, gate/up) become one: one GEMM and one multi-LoRA call, of which each
sibling returns its columns. The fused weight is the storage; the projections' own weights become views of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramill.kernels.check import LiveRanks
from loramill.kernels.layer import ACTIVATIONS, add_rms_norm, gated, rope_store
from loramill.kernels.multi_lora import Routing, TileWeights, multi_lora
from loramill.kernels.native_lora import NativeLora
from loramill.kernels.panels import Filling, Pair, Panels, panel_form
from loramill.kernels.routing import TileRouting
from loramill.worker.batch import Batch, current
from loramill.worker.packed import Delta

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Attribute names that read one input in the families that keep them apart (Llama, Mistral, Qwen, Gemma, ...)."""


class Product:
    """x -> x W^T + b, with the weight packed where that pays."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        packed = _prepacked(weight)
        self.is_packed = packed is not None
        self._weight, self._bias = (weight if packed is None else packed), bias

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_packed:
            return F.linear(x, self._weight, self._bias)
        rows = x.shape[:-1].numel()
        flat = x.reshape(rows, x.shape[-1])
        if more := compiled_rows(rows) - rows:
            flat = F.pad(flat, (0, 0, 0, more))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(flat, self._weight, self._bias, "none", [], "")
        return y[:rows].view(*x.shape[:-1], y.shape[1])

    def dense(self) -> Tensor:
        """The weight [N, K] as it was given: itself, or a copy out of the packed one, bit by bit."""
        return self._weight.to_dense() if self.is_packed else self._weight


class DenseLora:
    """Adapter slots over sibling projections as `multi_lora` takes them: A [S, siblings, R, K], B [S, R, N]."""

    def __init__(
        self, slots: int, widths: Sequence[int], k_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._widths = list(widths)
        self.ranks = LiveRanks(slots, len(widths), device)
        self.a = torch.zeros(slots, len(widths), 0, k_size, dtype=dtype, device=device)
        self.b = torch.zeros(slots, 0, sum(widths), dtype=dtype, device=device)
        self._kept = TileWeights()

    def put(self, slot: int, deltas: Sequence[Delta | None]) -> bool:
        """Fill a slot; what an adapter leaves alone becomes zero. Whether A and B are other tensors now."""
        grown = self._make_room(max((delta.a.shape[0] for delta in deltas if delta), default=0))
        self.a[slot].zero_()
        self.b[slot].zero_()
        self.ranks.put(slot, [delta.a.shape[0] if delta else 0 for delta in deltas])
        for i, (delta, columns) in enumerate(zip(deltas, self.b[slot].split(self._widths, 1), strict=True)):
            if delta:
                self.a[slot, i, : delta.a.shape[0]] = delta.a
                columns[: delta.a.shape[0]] = delta.b
        return grown

    def add(self, y: Tensor, x: Tensor, routing: Routing | TileRouting) -> None:
        """Add each routed row's delta to `y` [T, N] in place; x [T, K]."""
        multi_lora(y, x, self.a, self.b, self._widths, self.ranks, routing, kept=self._kept)

    def _make_room(self, rank: int) -> bool:
        held = self.a.shape[2]
        if rank <= held:
            return False
        slots, siblings, _, k_size = self.a.shape
        a, b = self.a.new_zeros(slots, siblings, rank, k_size), self.b.new_zeros(slots, rank, self.b.shape[2])
        a[:, :, :held] = self.a
        b[:, :held] = self.b
        self.a, self.b = a, b
        return True


def slots_over(
    slots: int, widths: Sequence[int], k_size: int, dtype: torch.dtype, device: torch.device
) -> DenseLora | NativeLora:
    """Adapter slots over sibling projections of these widths that read an input of size `k_size`."""
    form = panel_form(widths, k_size, dtype, device)
    return DenseLora(slots, widths, k_size, dtype, device) if form is None else NativeLora(slots, form)


class FusedLinear:
    """One weight [N, K] serving the projections `names`, and the adapter slots over it."""

    def __init__(self, names: Sequence[str], linears: Sequence[nn.Linear], slots: int, is_head: bool) -> None:
        self.names = tuple(names)
        self.widths = [linear.out_features for linear in linears]
        self.is_head = is_head
        self._slots = slots
        first = linears[0]
        weight = _joined([linear.weight for linear in linears])
        self.bias = None if first.bias is None else _joined([linear.bias for linear in linears])
        self._base = self._now = Product(weight, self.bias)
        # A packed weight is the only one kept: its numbers stand nowhere else, its shape and dtype here.
        self.weight = torch.empty_like(weight, device="meta") if self._base.is_packed else weight
        self._device = weight.device
        self.form = panel_form(self.widths, weight.shape[1], weight.dtype, weight.device)
        """Of the panels that slots over these are filled from; None where they take rows."""
        self.lora: DenseLora | NativeLora | None = None
        """None until an adapter needs it."""
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._readers = 0

    def columns(self, x: Tensor, reader: int) -> Tensor:
        """Projection `reader` of x [..., K]. The first sibling to ask computes all; the last one lets go of it."""
        if self._input is not x:
            self._input, self._output, self._readers = x, self(x), 0
        output = self._output
        assert output is not None
        self._readers += 1
        if self._readers == len(self.names):
            self._input = self._output = None
        if len(self.names) == 1:
            return output  # a merged head may have more rows than the base's
        start = sum(self.widths[:reader])
        return output[..., start : start + self.widths[reader]]

    def __call__(self, x: Tensor) -> Tensor:
        """All projections of x [..., K], side by side: [..., N], each row through its adapters."""
        y = self._now(x)
        routing = self._routing()
        if self.lora is not None and routing is not None:
            self.lora.add(y.view(-1, y.shape[-1])[:, : sum(self.widths)], x.reshape(-1, x.shape[-1]), routing)
        return y

    # What follows projections in a decoder layer: of `self(x)`, x [T, K], and at once with the adapters' part where the
    # slots can do that.

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """`layer.gated`, for the two siblings of these names or one projection of both: [T, N / 2]."""
        routing = self._routing()
        if routing is None or not isinstance(self.lora, NativeLora) or len(self.widths) != 2:
            return gated(self(x), activation)
        return self.lora.gated(self._now(x), x, routing, list(ACTIVATIONS).index(activation))

    def normed(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`layer.add_rms_norm` with a residual [T, N]: (y, s)."""
        routing = self._routing()
        if routing is None or not isinstance(self.lora, NativeLora) or weight.dtype is not residual.dtype:
            return add_rms_norm(residual, self(x), weight, eps)
        return self.lora.normed(self._now(x), x, routing, residual, weight, eps)

    def roped(self, x: Tensor, *to: Any) -> Tensor:
        """`layer.rope_store`, for all of qkv; `to` is what that takes beside it: q [T, heads, dim]."""
        routing = self._routing()
        if routing is None or not isinstance(self.lora, NativeLora):
            return rope_store(self(x), *to)
        return self.lora.roped(self._now(x), x, routing, *to)

    def _routing(self) -> Routing | TileRouting | None:
        batch = current()
        if not isinstance(batch, Batch):
            return None
        return batch.output_routing if self.is_head else batch.routing

    def dense(self) -> Tensor:
        """A copy of the base's weight [N, K], in float32."""
        return self._base.dense().to(torch.float32, copy=True)

    def merge(self, weight: Tensor, bias: Tensor | None) -> None:
        """Compute with this weight [N, K] and bias [N] until `restore`: rounded to the base's dtype once, here.

        A head may have more rows than the base's.
        """
        dtype = self.weight.dtype
        self._now = Product(weight.to(dtype), None if bias is None else bias.to(dtype))

    def restore(self) -> None:
        """Compute with the base's own weight again, which nothing has touched."""
        self._now = self._base

    def put(self, slot: int, weights: Mapping[str, Delta] | Panels | None) -> bool:
        """Fill a slot with deltas for these projections, or with what `panels` made of them; what an adapter leaves
        alone becomes zero. Whether what computes them has changed but for its numbers."""
        mine = weights if isinstance(weights, Panels) else [(weights or {}).get(name) for name in self.names]
        if self.lora is None:
            if not (isinstance(mine, Panels) or any(mine)):
                return False
            self.lora = slots_over(self._slots, self.widths, self.weight.shape[1], self.weight.dtype, self._device)
        if isinstance(mine, Panels):
            assert isinstance(self.lora, NativeLora)
            return self.lora.put(slot, mine)
        return self.lora.put(slot, mine)

    def panels(self, pairs: Mapping[str, Sequence[Pair]], room: Tensor, filling: Filling) -> Panels | None:
        """An adapter's pairs for these projections, in the `panel_size` numbers of `room` once `filling` has run; None
        where it has none."""
        mine = [pairs.get(name, ()) for name in self.names]
        return self.form.pack(mine, room, filling) if self.form is not None and any(mine) else None

    def slot_bytes(self, ranks: Mapping[str, int]) -> int:
        """What the slots take on the device once an adapter of these ranks is in one: nothing where they point at what
        host memory holds."""
        rank = 0 if self.form is not None else max((ranks.get(name, 0) for name in self.names), default=0)
        numbers = rank * (len(self.widths) * self.weight.shape[1] + sum(self.widths))
        return self._slots * numbers * self.weight.itemsize

    def panel_size(self, ranks: Mapping[str, int]) -> int:
        """How many numbers `panels` takes of an adapter of these ranks."""
        return 0 if self.form is None else self.form.size([ranks.get(name, 0) for name in self.names])


class Projection(nn.Module):
    """Stands where an `nn.Linear` stood and returns its columns of the fused projection."""

    def __init__(self, linear: nn.Linear, fused: FusedLinear, reader: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        start = sum(fused.widths[:reader])
        rows = slice(start, start + linear.out_features)
        self.weight = nn.Parameter(fused.weight[rows], requires_grad=False)
        self.bias = None if fused.bias is None else nn.Parameter(fused.bias[rows], requires_grad=False)
        self._fused, self._reader = fused, reader

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., out_features]."""
        return self._fused.columns(x, self._reader)


def install(model: nn.Module, slots: int) -> list[FusedLinear]:
    """Replace every linear projection of a causal model; the list is what adapters are put into."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    installed: list[FusedLinear] = []
    for path, parent in list(model.named_modules()):
        for names in _groups(parent):
            linears = [getattr(parent, name) for name in names]
            prefix = f"{path}." if path else ""
            fused = FusedLinear([prefix + name for name in names], linears, slots, is_head=linears[0] is head)
            for reader, (name, linear) in enumerate(zip(names, linears, strict=True)):
                setattr(parent, name, Projection(linear, fused, reader))
            installed.append(fused)
    return installed


def _prepacked(weight: Tensor) -> Tensor | None:
    """The weight laid out for oneDNN once instead of at every call, where this torch can.

    Measured on two AVX512-BF16 cores, N 4096, K 768: 25 rows 471 µs against 817, 128 rows 1878 against 2094. Only for
    bfloat16: float32 stays on the path that the parity tests know. The operators are the ones that torch's own
    compiler emits, and have no public name.
    """
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return None
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return packed
    except (AttributeError, RuntimeError):
        return None  # another torch: the plain product is as right


def compiled_rows(rows: int) -> int:
    """How many rows a packed product computes for so many, at least: one of few numbers, 32 up to 8,192.

    oneDNN compiles a product for each number of rows and shape of weights, in 4 to 8 ms where the product itself takes
    0.6 (128 rows, 2816 x 512 and 512 x 1408, two AMX cores). Rows that end or start change that number in every pass.
    """
    step = 16  # rows of a tile of the matrix unit
    while rows > 8 * step:
        step *= 2
    return -(-rows // step) * step


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows; a single part stays where it is, since an embedding may share it."""
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    linears = {name: child for name, child in parent.named_children() if isinstance(child, nn.Linear)}
    for siblings in SIBLINGS:
        if all(name in linears for name in siblings):
            group = [linears[name] for name in siblings]
            if len({(one.in_features, one.bias is None, one.weight.dtype) for one in group}) == 1:
                yield siblings
                for name in siblings:
                    del linears[name]
    for name in linears:
        yield (name,)
