"""Which of the base's projections a tensor's name means, however its trainer wrapped or fused the model. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import NamedTuple

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projections that some families keep in one weight, its rows in this order. `query_key_value` is not among them: it
interleaves heads in some families and not in others, so its rows have no certain place."""

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What torch.compile, FSDP and activation checkpointing put between the names of a model's own modules."""
_ROOTS = {"base_model", "model", "module", "language_model"}
"""Leading names that say how the decoder was wrapped (PEFT, transformers' own head class, DDP, a multimodal parent)."""

_NAME = re.compile(
    r"""(?P<path>.+?)\.(?:
        lora_(?P<ab>[AB])(?:\.[^.]+)?\.(?P<of>weight|bias)
      | lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?
      | (?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)*?
      | (?P<tokens>(?:token_adapter\.)?trainable_tokens_delta)(?:\.[^.]+)?
      | (?P<kept>(?:token_adapter\.)?base_layer\.|original_module\.)?
        (?:modules_to_save\.(?:[^.]+\.)?)?(?P<whole>weight|bias)
    )""",
    re.VERBOSE,
)


class Kind(StrEnum):
    """What a tensor is to its module; the values are for messages."""

    A = "lora_A"
    B = "lora_B"
    B_BIAS = "lora_B's bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TOKENS = "trainable_tokens_delta"
    WEIGHT = "weight"
    BIAS = "bias"
    KEPT_WEIGHT = "base_layer.weight"
    KEPT_BIAS = "base_layer.bias"


LOW_RANK = {Kind.A, Kind.B, Kind.B_BIAS, Kind.EMBEDDING_A, Kind.EMBEDDING_B, Kind.MAGNITUDE}
"""The kinds that belong to a low-rank pair."""


class Rows(NamedTuple):
    """Rows `start` to `stop` of a weight."""

    start: int
    stop: int


class Place(NamedTuple):
    """Where a trained projection's output goes: rows `source` of it are rows `target` of the base's `module`."""

    module: str
    source: Rows
    target: Rows


def parse(name: str) -> tuple[str, Kind] | None:
    """The module's path as its trainer knew it, and what the tensor is to it; None for a name of no known form."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    parts = [part for part in found["path"].split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"]:
        del parts[0]
    while parts[:2] == ["base_model", "model"]:
        del parts[:2]
    path = ".".join(parts)
    if found["ab"]:
        weight = Kind.A if found["ab"] == "A" else Kind.B
        kind = weight if found["of"] == "weight" else Kind.B_BIAS if weight is Kind.B else None
    elif found["embedding"]:
        kind = Kind.EMBEDDING_A if found["embedding"] == "A" else Kind.EMBEDDING_B
    elif found["magnitude"] or found["tokens"]:
        kind = Kind.MAGNITUDE if found["magnitude"] else Kind.TOKENS
    elif found["kept"]:
        kind = Kind.KEPT_WEIGHT if found["whole"] == "weight" else Kind.KEPT_BIAS
    else:
        kind = Kind.WEIGHT if found["whole"] == "weight" else Kind.BIAS
    return (path, kind) if path and kind else None


class Names:
    """Finds the base's modules under the names that a trainer gave them."""

    def __init__(self, modules: Collection[str], linears: Mapping[str, tuple[int, int]]) -> None:
        """`modules` are the base's module paths; `linears` (out_features, in_features) of the linear ones."""
        self._modules, self._linears = modules, linears
        self._by_core: dict[str, list[str]] = {}
        for module in modules:
            self._by_core.setdefault(_core(module), []).append(module)
        self._prefixes: set[str] = set()
        self._fused: set[str] = set()

    def module(self, path: str) -> str | None:
        """The base's module that a trainer's path means, if it can mean only one."""
        if path in self._modules:
            return path
        found = self._by_core.get(_core(path), [])
        return found[0] if len(found) == 1 and _core(path) else None

    def places(self, path: str) -> list[Place]:
        """Where the rows of a trained linear projection go: one place, or one for each part of a fused one.

        None, if the base has no such projection. What is asked here is what `spellings` goes by.
        """
        module = self.module(path)
        if module is not None and module in self._linears:
            self._prefixes.add(path.removesuffix(_core(path)))
            whole = Rows(0, self._linears[module][0])
            return [Place(module, whole, whole)]
        stem, _, last = path.rpartition(".")
        parent = self.module(stem)
        places = self._split(parent, last) or self._joined(parent, last)
        if places:
            self._prefixes.add(path.removesuffix(_core(path)))
            self._fused.add(last)
        return places

    def spellings(self, module: str) -> list[str]:
        """The paths under which the trainer whose tensors were placed had a module: several where it kept parts."""
        stem, _, last = _core(module).rpartition(".")
        parts = [part for part in FUSED.get(last, ()) if part in self._fused]
        wholes = [whole for whole, of in FUSED.items() if last in of and whole in self._fused]
        lasts = list(FUSED[last]) if parts else wholes or [last]
        cores = [f"{stem}.{name}" if stem else name for name in lasts]
        own = module.removesuffix(_core(module))
        return [prefix + core for core in cores for prefix in sorted(self._prefixes) or [own]]

    def same(self, path: str) -> str:
        """A name that two spellings of one trained projection share: the base's where it has one."""
        return self.module(path) or _core(path)

    def _split(self, parent: str | None, last: str) -> list[Place]:
        """A projection that was trained fused, for a base that keeps its parts."""
        modules = [f"{parent}.{part}" for part in FUSED.get(last, ())]
        if not modules or any(module not in self._linears for module in modules):
            return []
        places, start = [], 0
        for module in modules:
            width = self._linears[module][0]
            places.append(Place(module, Rows(start, start + width), Rows(0, width)))
            start += width
        return places

    def _joined(self, parent: str | None, last: str) -> list[Place]:
        """A part that was trained by itself, for a base that keeps it fused."""
        for whole, parts in FUSED.items():
            fused = f"{parent}.{whole}"
            if last in parts and fused in self._linears:
                widths = self._widths(parent, len(parts), self._linears[fused][0])
                at = parts.index(last)
                if widths:
                    start = sum(widths[:at])
                    return [Place(fused, Rows(0, widths[at]), Rows(start, start + widths[at]))]
        return []

    def _widths(self, parent: str | None, parts: int, rows: int) -> list[int]:
        """The rows of each part. Queries are as wide as what the output projection reads; keys and values share."""
        if parts == 2:
            return [rows // 2] * 2
        output = self._linears.get(f"{parent}.o_proj")
        return [] if output is None else [output[1], *[(rows - output[1]) // 2] * 2]


def _core(path: str) -> str:
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in _ROOTS:
        del parts[0]
    return ".".join(parts)
