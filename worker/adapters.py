"""LoRA adapters on disk: what they change, whether all of it can be applied, and their weights.

An adapter is served whole or refused: a tensor that finds no place, or a module that should have one and has none,
would answer with something between the adapter and the base model without saying so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loramill.kernels.panels import Pair
from loramill.worker.claims import some
from loramill.worker.fit import Fit, fit, reasons
from loramill.worker.model import BaseInfo, base_tensor
from loramill.worker.packed import Packed, Target, pack
from loramill.worker.patch import LowRank, Patch, Tokens
from loramill.worker.peft_config import LoraSettings, PeftConfigError, read_settings
from loramill.worker.tensor_file import CONFIG, WEIGHTS, AdapterError, TensorFiles, read, read_config
from loramill.worker.tensor_names import Rows

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "AdapterError", "open_adapter"]


@dataclass(slots=True, frozen=True)
class Adapter:
    """An adapter that passed every check; `sha256` over its config and weights is its identity."""

    path: str
    sha256: str
    rank: int
    """The largest over its modules."""
    targets: Mapping[str, Target]
    """Linear layers' low-rank pairs, by module path in the base model."""
    embeddings: Mapping[str, Target]
    """The same of embeddings."""
    replaced: Mapping[str, str]
    """Parameters that were saved whole: the base's name -> the tensor's."""
    tokens: Mapping[str, tuple[str, tuple[int, ...]]]
    """Rows of an embedding or head that were trained by themselves: module path -> tensor, token ids."""
    vocab_size: int
    """Rows of embedding and head where training added tokens, otherwise 0."""
    static_only: tuple[str, ...]
    """Why it can only be served merged, alone and at strength 1; empty where it can be served either way."""

    @property
    def numbers(self) -> int:
        """How many there are in its low-rank pairs of linear layers."""
        return sum(target.numbers for target in self.targets.values())

    def nbytes(self, dtype: torch.dtype) -> int:
        """What `packed` will take."""
        return self.numbers * dtype.itemsize

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the base's parameters that merging it changes."""
        weights = {f"{module}.weight" for module in (*self.targets, *self.embeddings, *self.tokens)}
        biases = {f"{module}.bias" for module, target in self.targets.items() if any(p.bias for p in target.parts)}
        return frozenset(weights | biases | set(self.replaced))

    def packed(self, dtype: torch.dtype, *, pin: bool = False) -> Packed:
        """Read what dynamic serving needs, in memory that a device can copy from by itself where `pin` is set.

        Raises:
            AdapterError: the files changed or vanished since they were checked, or it can only be served merged.
        """
        return pack(self.targets, self._dynamic(), dtype, pin=pin)

    def pairs(self) -> dict[str, list[Pair]]:
        """Read the same as it was saved, by module path.

        Raises:
            AdapterError: as for `packed`.
        """
        tensors = self._dynamic()
        return {
            module: [
                Pair(tensors[part.a], tensors[part.b][slice(*part.source)], part.scale, part.target.start)
                for part in target.parts
            ]
            for module, target in self.targets.items()
        }

    def patch(self) -> Patch:
        """Read what static serving needs.

        Raises:
            AdapterError: the files changed or vanished since they were checked.
        """
        tensors = self._tensors()
        return Patch(
            {module: _pairs(target, tensors) for module, target in {**self.targets, **self.embeddings}.items()},
            {parameter: tensors[name] for parameter, name in self.replaced.items()},
            {module: Tokens(torch.tensor(ids), tensors[name]) for module, (name, ids) in self.tokens.items()},
        )

    def _dynamic(self) -> dict[str, Tensor]:
        if self.static_only:
            raise AdapterError([f"{self.path}: it can only be served merged: {'; '.join(self.static_only)}"])
        return self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        files = read(self.path, read_config(self.path))
        if files.sha256 != self.sha256:
            raise AdapterError([f"{self.path}: the adapter changed on disk since it was checked: start again"])
        return files.tensors


def open_adapter(path: str, base: BaseInfo, *, max_rank: int, allow_noop: bool = False) -> Adapter:
    """Read and check an adapter folder against the base model, weights included.

    Raises:
        AdapterError: with every reason found.
    """
    settings, files = _read(path)
    found = fit({name: tuple(tensor.shape) for name, tensor in files.tensors.items()}, settings, base)
    problems = found.problems
    if files.others:
        named = [f"{name} ({dtype})" for name, dtype in files.others.items()]
        problems.append(f"tensors that are not floating point: {some(named)}")
    for one, other in found.equal:
        if not torch.equal(files.tensors[one], files.tensors[other]):
            problems.append(f"{one} and {other} mean one and the same, and differ")
    grown = found.vocab_size
    strays = found.strays + [name for name, own in found.copies if not _repeats(files.tensors[name], own, base, grown)]
    if strays:
        problems.append(f"tensors that have no place in this base model ({base.model_type}): {some(strays)}")
    rank = max((target.rank for target in {**found.targets, **found.embeddings}.values()), default=0)
    if rank > max_rank:
        problems.append(f"rank {rank} is over the limit of {max_rank}: raise --max-lora-rank")
    problems += _values(files, found)
    if not problems and not allow_noop and not _changes(files.tensors, found, base):
        problems.append(
            "it would change nothing (every lora_A or lora_B is zero): train it, or pass --allow-noop-adapters"
        )
    if problems:
        raise AdapterError(f"{path}: {problem}" for problem in problems)
    return Adapter(
        path=path,
        sha256=files.sha256,
        rank=rank,
        targets=found.targets,
        embeddings=found.embeddings,
        replaced=found.replaced,
        tokens=found.tokens,
        vocab_size=found.vocab_size,
        static_only=reasons(found, settings, base),
    )


def _read(path: str) -> tuple[LoraSettings, TensorFiles]:
    """Config and tensors, or what is wrong with both."""
    config = read_config(path)
    problems: list[str] = []
    try:
        settings = read_settings(json.loads(config))
    except PeftConfigError as error:
        problems += [f"{path}: {CONFIG}: {problem}" for problem in error.problems]
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: {CONFIG} cannot be read as JSON: {error}")
    try:
        files = read(path, config)
    except AdapterError as error:
        problems += error.problems
    if problems:
        raise AdapterError(problems)
    return settings, files


def _pairs(target: Target, tensors: Mapping[str, Tensor]) -> list[LowRank]:
    return [
        LowRank(
            a=tensors[part.a],
            b=tensors[part.b][slice(*part.source)],
            scale=part.scale,
            target=part.target,
            magnitude=tensors[part.magnitude][slice(*part.source)] if part.magnitude else None,
            bias=tensors[part.bias][slice(*part.source)] if part.bias else None,
        )
        for part in target.parts
    ]


def _repeats(tensor: Tensor, parameter: str, base: BaseInfo, grown: int = 0) -> bool:
    """Whether a tensor only repeats the base's own: PEFT saves an adapted head's or embedding's weight beside it.

    Of one that grew to `grown` rows before the training, the base's rows are held against it.
    """
    own = base_tensor(base, parameter)
    if own is None:
        return False
    if grown and tensor.shape == (grown, *own.shape[1:]):
        tensor = tensor[: own.shape[0]]
    return tensor.shape == own.shape and bool(torch.equal(tensor.to(own.dtype), own))


def _values(files: TensorFiles, found: Fit) -> Iterator[str]:
    """Numbers that would poison a batch."""
    bad = [name for name, tensor in files.tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        yield f"tensors with NaN or infinite values: {some(bad)}"
    magnitudes = {part.magnitude for _, part in found.parts if part.magnitude}
    zero = [name for name in magnitudes if not bool(files.tensors[name].all())]
    if zero:
        yield f"magnitudes with zeros: {some(zero)}"


def _changes(tensors: Mapping[str, Tensor], found: Fit, base: BaseInfo) -> bool:
    """Whether anything of it differs from the base; what needs the base's weights is compared last."""
    for _, part in found.parts:
        if part.scale and tensors[part.a].any() and tensors[part.b][slice(*part.source)].any():
            return True
        if part.scale and part.bias and tensors[part.bias].any():
            return True
    if any(not _repeats(tensors[name], parameter, base) for parameter, name in found.replaced.items()):
        return True
    for module, (name, ids) in found.tokens.items():
        own = base_tensor(base, f"{module}.weight")
        if own is None or not torch.equal(tensors[name].to(own.dtype), own[list(ids)]):
            return True
    return any(
        not _is_norm(tensors[part.magnitude][slice(*part.source)], module, part.target, base)
        for module, part in found.parts
        if part.magnitude
    )


def _is_norm(magnitude: Tensor, module: str, rows: Rows, base: BaseInfo) -> bool:
    """Whether a DoRA magnitude is what it began as: the norm of the base's rows, as exact as either was saved."""
    own = base_tensor(base, f"{module}.weight")
    if own is None:
        return False
    weight = own.t() if module == base.embedding else own
    norm = weight[rows.start : rows.stop].float().norm(dim=1)
    tolerance = 4 * max(torch.finfo(magnitude.dtype).eps, torch.finfo(own.dtype).eps)
    return torch.allclose(magnitude.float(), norm, rtol=tolerance, atol=0)
