"""LoRA adapters on disk: what they change, whether all of it can be applied, and their weights.

An adapter is served whole or refused: a tensor that finds no place, or a module that should have one and has none,
would answer with something between the adapter and the base model without saying so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loramill.worker.lora import Delta
from loramill.worker.model import BaseInfo, base_tensor
from loramill.worker.peft_config import LoraSettings, PeftConfigError, read_settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_TENSOR = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight$")
_WEIGHT = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer)?\.weight$")
_DTYPES = {"F64", "F32", "F16", "BF16"}
_SHOWN = 5


class AdapterError(Exception):
    """An adapter that cannot be served; `problems` has every reason, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


@dataclass(slots=True, frozen=True)
class Target:
    """One projection that an adapter changes: its tensors' names, rank and scale (alpha / rank, or / sqrt(rank))."""

    a: str
    b: str
    rank: int
    scale: float


@dataclass(slots=True, frozen=True)
class Adapter:
    """An adapter that passed every check; `sha256` over its config and weights is its identity."""

    path: str
    sha256: str
    rank: int
    """The largest over its modules."""
    targets: Mapping[str, Target]
    """By module path in the base model."""

    def deltas(self) -> dict[str, Delta]:
        """Read the weights: a [rank, in] and b [out, rank], the scale folded into b in float32.

        Raises:
            AdapterError: the file changed or vanished since it was checked.
        """
        try:
            with safe_open(Path(self.path) / WEIGHTS, framework="pt") as tensors:
                return {
                    module: Delta(tensors.get_tensor(t.a), tensors.get_tensor(t.b).float() * t.scale)
                    for module, t in self.targets.items()
                }
        except (OSError, SafetensorError) as error:
            raise AdapterError([f"{self.path}: {WEIGHTS} could be read before and cannot now: {error}"]) from error


def open_adapter(path: str, base: BaseInfo, *, max_rank: int, allow_noop: bool = False) -> Adapter:
    """Read and check an adapter folder against the base model, weights included.

    Raises:
        AdapterError: with every reason found.
    """
    settings = _settings(path)
    shapes = _header(path)
    targets, strays, problems = _match(shapes, settings, base)
    strays = [name for name in strays if not _copies_base(path, name, base)]
    if strays:
        problems.append(f"tensors that have no place in this base model ({base.model_type}): {_some(strays)}")
    problems += _expected(settings, base, targets)
    rank = max((t.rank for t in targets.values()), default=0)
    if rank > max_rank:
        problems.append(f"rank {rank} is over the limit of {max_rank}: raise --max-lora-rank")
    if not problems:
        problems += _values(path, targets, allow_noop)
    if problems:
        raise AdapterError(f"{path}: {problem}" for problem in problems)
    return Adapter(path, content_sha256(path), rank, targets)


def _settings(path: str) -> LoraSettings:
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError([f"{path}: no such folder"])
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise AdapterError([f"{path}: no {CONFIG} in this folder"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError([f"{path}: {CONFIG} cannot be read as JSON: {error}"]) from error
    try:
        return read_settings(config)
    except PeftConfigError as error:
        raise AdapterError(f"{path}: {CONFIG}: {problem}" for problem in error.problems) from error


def _header(path: str) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor, from the file's header."""
    file = Path(path) / WEIGHTS
    if not file.is_file():
        pickled = [p.name for p in Path(path).glob("*.bin")] + [p.name for p in Path(path).glob("*.pt")]
        why = f"; pickled weights ({', '.join(sorted(pickled))}) are never loaded, convert them" if pickled else ""
        raise AdapterError([f"{path}: no {WEIGHTS} in this folder{why}"])
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (list(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise AdapterError([f"{path}: {WEIGHTS} is damaged or cut short: {error}"]) from error


def _match(
    shapes: Mapping[str, tuple[list[int], str]], settings: LoraSettings, base: BaseInfo
) -> tuple[dict[str, Target], list[str], list[str]]:
    """Give every tensor its place: the targets, the tensors that find none, and what is wrong with the others."""
    problems: list[str] = []
    pairs: dict[str, dict[str, str]] = {}
    strays: list[str] = []
    for name in shapes:
        found = _TENSOR.match(name)
        if found and found["module"] in base.linears:
            pairs.setdefault(found["module"], {})[found["part"]] = name
        else:
            strays.append(name)
    targets: dict[str, Target] = {}
    for module, names in pairs.items():
        if set(names) != {"A", "B"}:
            problems.append(f"{module} has only lora_{next(iter(names))}: both lora_A and lora_B are needed")
            continue
        (a, a_dtype), (b, b_dtype) = shapes[names["A"]], shapes[names["B"]]
        out_features, in_features = base.linears[module]
        rank = settings.rank(module)
        if a != [rank, in_features] or b != [out_features, rank]:
            problems.append(
                f"{module}: lora_A {a} and lora_B {b} must be [{rank}, {in_features}] and [{out_features}, {rank}] "
                "for this base model and the config's rank"
            )
        elif not {a_dtype, b_dtype} <= _DTYPES:
            problems.append(f"{module}: dtypes {a_dtype} and {b_dtype} are not floating point")
        else:
            targets[module] = Target(names["A"], names["B"], rank, settings.scale(module))
    return targets, strays, problems


def _copies_base(path: str, name: str, base: BaseInfo) -> bool:
    """Whether a tensor only repeats the base's own: PEFT saves an adapted head's or embedding's weight beside it."""
    found = _WEIGHT.match(name)
    own = base_tensor(base, f"{found['module']}.weight") if found and found["module"] in base.modules else None
    if own is None:
        return False
    with safe_open(Path(path) / WEIGHTS, framework="pt") as tensors:
        kept = tensors.get_tensor(name)
    return kept.shape == own.shape and bool(torch.equal(kept.to(own.dtype), own))


def _expected(settings: LoraSettings, base: BaseInfo, targets: Mapping[str, Target]) -> list[str]:
    """What the config says that it changes, held against what there are tensors for."""
    expected = [m for m in base.linears if settings.targets(m, is_head=m == base.head)]
    problems: list[str] = []
    unmatched = settings.unmatched(base.modules)
    if unmatched:
        problems.append(f"target_modules that this base model ({base.model_type}) does not have: {_some(unmatched)}")
    others = [m for m in base.modules if m not in base.linears and settings.targets_other(m)]
    if others:
        problems.append(f"target_modules that are no linear layers, which is not served: {_some(others)}")
    if not expected and not unmatched:
        problems.append(f"no linear module of this base model ({base.model_type}) is among its target_modules")
    missing = [m for m in expected if m not in targets]
    if missing and targets:
        problems.append(f"target modules without tensors: {_some(missing)}")
    elif not targets and not unmatched:
        problems.append("no LoRA tensors that fit this base model")
    extra = [m for m in targets if m not in set(expected)]
    if extra:
        problems.append(f"tensors for modules that its target_modules do not name: {_some(extra)}")
    return problems


def _values(path: str, targets: Mapping[str, Target], allow_noop: bool) -> list[str]:
    """Numbers that would poison a batch, and adapters that change nothing."""
    effective = False
    bad: list[str] = []
    with safe_open(Path(path) / WEIGHTS, framework="pt") as tensors:
        for target in targets.values():
            a, b = tensors.get_tensor(target.a), tensors.get_tensor(target.b)
            bad += [n for n, t in ((target.a, a), (target.b, b)) if not bool(torch.isfinite(t).all())]
            effective = effective or (target.scale != 0 and bool(a.any()) and bool(b.any()))
    if bad:
        return [f"tensors with NaN or infinite values: {_some(bad)}"]
    if not effective and not allow_noop:
        return ["it would change nothing (every lora_A or lora_B is zero): train it, or pass --allow-noop-adapters"]
    return []


def content_sha256(path: str) -> str:
    """The identity of the adapter in a folder: the hash of its config and weights. Raises OSError."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (Path(path) / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _some(names: Iterable[Any]) -> str:
    names = sorted(map(str, names))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
