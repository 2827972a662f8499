"""What an adapter's tensors and its config each claim that it changes, under the base's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loramill.worker.model import BaseInfo
from loramill.worker.peft_config import LoraSettings
from loramill.worker.tensor_names import LOW_RANK, Kind, Names, parse

_WHOLE = {Kind.WEIGHT: "weight", Kind.BIAS: "bias", Kind.KEPT_WEIGHT: "weight", Kind.KEPT_BIAS: "bias"}
SHOWN = 5
"""How many of many alike a message names."""


class Claims:
    """An adapter's tensors by what their names mean, and the questions that its config answers."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], settings: LoraSettings, base: BaseInfo) -> None:
        """`shapes` are the tensors'."""
        self.shapes, self.settings, self.base = shapes, settings, base
        self.names = Names(base.modules, base.linears)
        self.pairs: dict[str, tuple[str, dict[Kind, str]]] = {}
        """Trained module -> its path as the trainer knew it, and the tensors of its low-rank pair."""
        self.whole: dict[tuple[str, Kind], tuple[str, str]] = {}
        """Parameter of the base -> the path of its module as the trainer knew it, and the tensor."""
        self.token_rows: dict[str, str] = {}
        """Embedding or head -> the tensor of single rows."""
        self.strays: list[str] = []
        """Tensors whose name means nothing here."""
        self.twice: list[str] = []
        """Problems: two names of one meaning."""
        self.equal: list[tuple[str, str]] = []
        """Tensors that mean one and the same and must be: PEFT saves a grown embedding or head under two names."""
        tied = {base.embedding, base.head} if settings.ensure_weight_tying and base.tied_head else set()
        self._tied = {module for module in tied if module}
        for name in shapes:
            self._sort(name)

    @property
    def ends(self) -> list[str]:
        """The embedding and the head."""
        return [module for module in (self.base.embedding, self.base.head) if module]

    def targets(self, module: str) -> bool:
        """Whether the config says that a module gets a low-rank pair."""
        settings, base = self.settings, self.base
        if module in self._tied and any(settings.targets_other(one) for one in self._tied):
            return True
        if module not in base.linears:
            return settings.targets_other(module)
        is_head = module == base.head
        return any(settings.targets(path, is_head=is_head) for path in self.names.spellings(module))

    def saves(self, module: str, path: str) -> bool:
        """Whether the config says that a module, which the trainer knew as `path`, is saved whole."""
        saves = self.settings.saves
        return saves(module) or saves(path) or (module in self._tied and any(map(saves, self._tied)))

    def trains_bias(self, module: str) -> bool:
        """Whether the config says that a module's bias was trained."""
        bias = self.settings.bias
        return bias == "all" or (bias == "lora_only" and self.targets(module))

    def disagreements(self) -> list[str]:
        """What the config names and the base or the tensors lack, and the other way round."""
        base, settings, problems = self.base, self.settings, list[str]()
        spellings = {path: module for module in base.linears for path in self.names.spellings(module)}
        expected = {
            self.names.same(path)
            for path, module in spellings.items()
            if settings.targets(path, is_head=module == base.head) or (module in self._tied and self.targets(module))
        }
        expected |= {module for module in self.ends if module not in base.linears and self.targets(module)}
        unmatched = settings.unmatched([*base.modules, *spellings])
        if unmatched:
            problems.append(f"target_modules that this base model ({base.model_type}) does not have: {some(unmatched)}")
        others = [m for m in base.modules if m not in base.linears and m not in self.ends and self.targets(m)]
        if others:
            problems.append(
                f"target_modules that are neither linear layers nor the embedding, which is not served: {some(others)}"
            )
        unsaved = settings.unmatched_saved(base.modules)
        if unsaved:
            problems.append(f"modules_to_save or token indices of modules that the base does not have: {some(unsaved)}")
        if not expected and not unmatched:
            problems.append(f"no linear module of this base model ({base.model_type}) is among its target_modules")
        missing = expected - set(self.pairs)
        if missing and self.pairs:
            problems.append(f"target modules without tensors: {some(missing)}")
        elif not self.pairs and not unmatched:
            problems.append("no LoRA tensors that fit this base model")
        extra = set(self.pairs) - expected
        if extra:
            problems.append(f"tensors for modules that its target_modules do not name: {some(extra)}")
        return problems

    def _sort(self, name: str) -> None:
        parsed = parse(name)
        if parsed is None:
            self.strays.append(name)
            return
        path, kind = parsed
        module = self.names.module(path)
        if kind in LOW_RANK and (self.names.places(path) or (module and module == self.base.embedding)):
            _, held = self.pairs.setdefault(self.names.same(path), (path, {}))
            self._hold(held, kind, name)
        elif kind is Kind.TOKENS and module in self.ends:
            self._hold(self.token_rows, str(module), name)
        elif kind in _WHOLE and f"{module}.{_WHOLE[kind]}" in self.base.parameters:
            at = (f"{module}.{_WHOLE[kind]}", kind)
            if at in self.whole and kind is Kind.WEIGHT and module in self.ends:
                self.equal.append((self.whole[at][1], name))
            elif at in self.whole:
                self.twice.append(f"{self.whole[at][1]} and {name} mean one and the same")
            self.whole[at] = (path, name)
        else:
            self.strays.append(name)

    def _hold(self, held: dict[Any, str], key: object, name: str) -> None:
        if key in held:
            self.twice.append(f"{held[key]} and {name} mean one and the same")
        held[key] = name


def some(names: Iterable[Any]) -> str:
    """A few of the names, and how many more there are."""
    names = sorted(map(str, names))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
