"""Adapters merged into a loaded model's weights, beside the base's own: put there, and taken out by pointer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from loramill.worker.lora import FusedLinear
from loramill.worker.patch import Patches, bias_of, weight_of


class MergeError(Exception):
    """Adapters that cannot be merged into this model; one line that says why. The model is the base then."""


class Merged:
    """What is merged into `model`. The base's own tensors are never written: merged ones stand in for them."""

    def __init__(
        self, model: nn.Module, projections: Sequence[FusedLinear], embedding: str | None, device: torch.device
    ) -> None:
        self._model, self._projections, self._embedding, self._device = model, projections, embedding, device
        self._in_projections = {
            f"{name}.{part}" for projection in projections for name in projection.names for part in ("weight", "bias")
        }
        self._own: dict[str, nn.Parameter] = {}

    @torch.no_grad()
    def put(self, patches: Patches) -> None:
        """Base and patches, each with its strength, summed in float32 and rounded once; nothing else stays merged.

        Takes the merged weights' memory and, in turn, one projection's in float32.

        Raises:
            MergeError: the sum is not finite.
        """
        self.take_out()
        changed = {name for patch, _ in patches for name in patch.parameters}
        try:
            for projection in self._projections:
                if any(f"{name}.{part}" in changed for name in projection.names for part in ("weight", "bias")):
                    self._put_projection(projection, patches)
            for name in sorted(changed - self._in_projections):
                self._put_parameter(name, patches)
        except BaseException:
            self.take_out()  # out of memory, interrupted or not finite: what runs next runs on the base
            raise

    def take_out(self) -> None:
        """Serve the base's own weights again."""
        for projection in self._projections:
            projection.restore()
        for name, parameter in self._own.items():
            self._set(name, parameter)
        self._own.clear()

    def nbytes(self, parameters: Iterable[str], vocab_size: int) -> int:
        """Bytes that merging into these parameters adds at most: what stays, and the largest in float32 meanwhile."""
        changed = set(parameters)
        kept, largest = 0, 0
        for projection in self._projections:
            if any(f"{name}.weight" in changed or f"{name}.bias" in changed for name in projection.names):
                rows, columns = projection.weight.shape
                count = (max(rows, vocab_size) if projection.is_head else rows) * (columns + 1)
                kept, largest = kept + count * projection.weight.itemsize, max(largest, count)
        for name in changed - self._in_projections:
            parameter = self._model.get_parameter(name)
            rows = max(parameter.shape[0], vocab_size) if name == f"{self._embedding}.weight" else parameter.shape[0]
            count = rows * parameter[0].numel()
            kept, largest = kept + count * parameter.itemsize, max(largest, count)
        # Beside the float32 sum, the rounded one before it is packed, or the base's out of its packed form.
        return kept + largest * (torch.float32.itemsize + 2)

    def _put_projection(self, projection: FusedLinear, patches: Patches) -> None:
        if len(projection.names) == 1:
            weight = weight_of(patches, projection.names[0], projection.dense, self._device)
        else:
            weight = projection.dense()
            for name, rows in zip(projection.names, weight.split(projection.widths), strict=True):
                rows.copy_(weight_of(patches, name, rows.detach, self._device))
        added = any(
            pair.bias is not None for p, _ in patches for n in projection.names for pair in p.low_rank.get(n, ())
        )
        bias = torch.zeros(len(weight)) if projection.bias is None and added else projection.bias
        if bias is not None:
            widths = projection.widths if len(projection.names) > 1 else [len(weight)]
            own = zip(projection.names, bias.to(self._device).split(widths), strict=True)
            bias = torch.cat([bias_of(patches, name, rows) for name, rows in own])
        name, dtype = projection.names[0], projection.weight.dtype
        projection.merge(_fits(name, weight, dtype), None if bias is None else _fits(name, bias, dtype))

    def _put_parameter(self, name: str, patches: Patches) -> None:
        own = self._model.get_parameter(name)
        module, _, part = name.rpartition(".")
        if part == "bias":
            merged = bias_of(patches, module, own)
        else:
            merged = weight_of(patches, module, lambda: own.to(torch.float32, copy=True), self._device, embedding=True)
        rounded = _fits(name, merged, own.dtype).to(own)
        self._own[name] = own
        self._set(name, nn.Parameter(rounded, requires_grad=False))

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        module, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(module), attribute, parameter)


def _fits(name: str, merged: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, if all of it is finite once rounded."""
    low, high = torch.aminmax(merged)
    largest = torch.finfo(dtype).max
    if not (bool(low >= -largest) and bool(high <= largest)):
        raise MergeError(f"merged into {name} the weights are not finite in {str(dtype).removeprefix('torch.')}")
    return merged
