"""`adapter_config.json` of PEFT's LoRA: served, or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_HONOURED = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "use_dora", "bias", "lora_bias", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip
_INERT = {
    # How it was trained, or how PEFT holds it in memory: no effect on what the trained tensors compute. Whether it fits
    # the base is for its tensors' names and shapes to say: a path says little.
    "base_model_name_or_path", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
    "lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "qalora_group_size",
}  # fmt: skip
_HARMLESS_INITS = ("gaussian", "orthogonal", "eva")
"""Named initialisations that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA rewrite them."""
_ALL_LINEAR = "all-linear"
_BIASES = ("none", "all", "lora_only")
_MAX_PATTERN = 2000


class PeftConfigError(Exception):
    """A config that cannot be honoured; `problems` has every reason."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


@dataclass(slots=True, frozen=True)
class LoraSettings:
    """Which modules an adapter changes, with what rank and scale. Matching follows PEFT's own rules."""

    r: int
    alpha: float
    use_rslora: bool
    target_modules: str | list[str]
    exclude_modules: str | list[str] = field(default_factory=list)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: list[int] | None = None
    layers_pattern: list[str] = field(default_factory=list)
    use_dora: bool = False
    bias: str = "none"
    """none, all, or lora_only (the adapted modules')."""
    lora_bias: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    token_indices: Mapping[str, list[int]] = field(default_factory=dict)
    """By the end of a module's path; "" is the input embedding."""
    ensure_weight_tying: bool = False

    def rank(self, module: str) -> int:
        """The module's rank."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """What B A x is multiplied by."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str, *, is_head: bool) -> bool:
        """Whether the config says that the linear module `module` is changed."""
        if _named(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == _ALL_LINEAR:
                return not is_head and self._in_layers(module)
            return re.fullmatch(self.target_modules, module) is not None
        return _named(self.target_modules, module) and self._in_layers(module)

    def targets_other(self, module: str) -> bool:
        """Whether a module that is not linear (an embedding, say) is asked for, which "all-linear" never does."""
        if isinstance(self.target_modules, str) and self.target_modules.lower() == _ALL_LINEAR:
            return False
        return self.targets(module, is_head=False)

    def saves(self, module: str) -> bool:
        """Whether the whole of a module was trained, by itself or with one that holds it."""
        parts = module.split(".")
        holders = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(holder.endswith(name) for holder in holders for name in self.modules_to_save)

    def tokens(self, module: str, *, is_embedding: bool) -> list[int]:
        """The rows of an embedding (or the head) that were trained by themselves."""
        found = (i for end, i in self.token_indices.items() if (module.endswith(end) if end else is_embedding))
        return next(found, [])

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """Listed target modules that none of the model's modules answers to."""
        if isinstance(self.target_modules, str):
            return []
        names = list(modules)
        return [t for t in self.target_modules if not any(_named([t], name) for name in names)]

    def unmatched_saved(self, modules: Iterable[str]) -> list[str]:
        """Modules to save, or with tokens, that none of the model's modules answers to."""
        names = list(modules)
        asked = [*self.modules_to_save, *self.token_indices]
        return [one for one in asked if not any(name.endswith(one) for name in names)]

    def _in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next(filter(None, (re.match(pattern, module) for pattern in patterns)), None)
        return found is not None and int(found[1]) in self.layers


def read_settings(config: object) -> LoraSettings:
    """Check a parsed `adapter_config.json`.

    Raises:
        PeftConfigError: with everything in it that would have to be ignored, or has the wrong type.
    """
    if not isinstance(config, dict):
        raise PeftConfigError(["it is not a JSON object"])
    problems = list(_refused(config))
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}: only LORA is served")
    get = _Reader(config, problems)
    settings = LoraSettings(
        r=get.whole("r", 8),
        alpha=get.number("lora_alpha", 8),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=get.names("target_modules"),
        exclude_modules=get.names("exclude_modules"),
        rank_pattern=get.pattern("rank_pattern"),
        alpha_pattern=get.pattern("alpha_pattern"),
        layers=get.layers("layers_to_transform"),
        layers_pattern=_as_list(get.names("layers_pattern")),
        use_dora=bool(config.get("use_dora")),
        bias=config.get("bias") or "none",
        lora_bias=bool(config.get("lora_bias")),
        modules_to_save=_as_list(get.names("modules_to_save")),
        token_indices=get.tokens("trainable_token_indices"),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
    )
    if settings.bias not in _BIASES:
        problems.append(f"`bias` must be one of {', '.join(_BIASES)}, not {settings.bias!r:.60}")
    if settings.use_dora and settings.lora_bias:
        problems.append("`use_dora` and `lora_bias` are both set: PEFT itself computes two different things for that")
    if any(rank < 1 or rank != int(rank) for rank in (settings.r, *settings.rank_pattern.values())):
        problems.append("ranks must be whole numbers of at least 1")
    if not settings.target_modules:
        problems.append("target_modules is empty")
    if problems:
        raise PeftConfigError(problems)
    return settings


def _refused(config: Mapping[str, Any]) -> Iterable[str]:
    for name, given in config.items():
        if name in _HONOURED or name in _INERT or not given:
            continue
        yield f"`{name}` is set, which is not served (the answers would not be this adapter's)"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _HARMLESS_INITS:
        yield f"init_lora_weights {init!r} changes the base's weights too: convert the adapter to plain LoRA"


class _Reader:
    """Typed fields of a JSON object; what is wrong goes to `problems` and a stand-in comes back."""

    def __init__(self, config: Mapping[str, Any], problems: list[str]) -> None:
        self._config, self._problems = config, problems

    def _checked(self, name: str, given: Any, fits: bool, what: str, stand_in: Any) -> Any:
        if fits:
            return given
        self._problems.append(f"`{name}` must be {what}, not {given!r:.60}")
        return stand_in

    def number(self, name: str, default: float) -> float:
        given = self._config.get(name, default)
        fits = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
        return float(self._checked(name, given, fits, "a number", 1))

    def whole(self, name: str, default: int) -> int:
        given = self._config.get(name, default)
        return int(self._checked(name, given, type(given) is int, "a whole number", 1))

    def names(self, name: str) -> str | list[str]:
        given = self._config.get(name) or []
        is_list = isinstance(given, list) and all(isinstance(g, str) for g in given)
        checked: str | list[str] = self._checked(name, given, isinstance(given, str) or is_list, "text or a list", [])
        if isinstance(checked, str) and (len(checked) > _MAX_PATTERN or not _compiles(checked)):
            self._problems.append(f"`{name}` is no regular expression that can be used: {checked!r:.60}")
            return []
        return checked

    def pattern(self, name: str) -> dict[str, Any]:
        given = self._config.get(name) or {}
        fits = isinstance(given, dict) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and len(k) <= _MAX_PATTERN and _compiles(k)
            for k, v in given.items()
        )
        checked: dict[str, Any] = self._checked(name, given, fits, "an object of pattern -> number", {})
        return checked

    def tokens(self, name: str) -> dict[str, list[int]]:
        given = self._config.get(name) or {}
        by_name = given if isinstance(given, dict) else {"": given}
        fits = all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in by_name.values())
        checked: dict[str, list[int]] = self._checked(
            name, by_name, fits, "a list of token ids, or lists by module", {}
        )
        return checked

    def layers(self, name: str) -> list[int] | None:
        given = self._config.get(name)
        if given is None or given == []:
            return None
        numbers = given if isinstance(given, list) else [given]
        fits = all(type(n) is int for n in numbers)
        checked: list[int] = self._checked(name, numbers, fits, "a whole number or a list of them", [])
        return checked


def _named(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
