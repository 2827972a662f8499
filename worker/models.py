"""What rows can ask for: the base and the adapters, found and checked, and no weight of the base loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.names import Named, Names, NamesError
from loramill.schemas.prompt import Limits, Prompter
from loramill.worker import base_files, hub
from loramill.worker.adapters import Adapter, open_adapter
from loramill.worker.adapters import AdapterError as AdapterError  # for whoever opens one by one
from loramill.worker.model import BaseInfo, ModelError, describe_base
from loramill.worker.registry import read_registry
from loramill.worker.settings import ModelOptions
from loramill.worker.slot_count import slot_count
from loramill.worker.specs import AdapterSpec, check_name, locate
from loramill.worker.tokenizers import Tokenizers


@dataclass(slots=True, frozen=True)
class Models:
    """What rows can ask for, checked. Adapters that come later make another one."""

    base: BaseInfo
    names: Names
    adapters: Mapping[str, Adapter]
    """By name: those that can be served."""
    unusable: Mapping[str, list[str]]
    """The others, and why: it matters only to rows that name one."""
    opener: Opener
    """Opens those that come later."""
    prompter: Prompter
    """The base's."""
    warnings: tuple[str, ...]
    """What is used otherwise than it may have been meant, one line each."""
    parts: Mapping[str, str]
    """What of the base decides the answers, as a person calls it -> its content's hash."""
    slots: int
    """Adapters on the device at once, and in one row's mix: --max-loras-per-batch, or what `slot_count` says of the
    adapters that there were at first."""

    def adding(self, name: str, spec: AdapterSpec, scale: float | None = None) -> tuple[Models, Opened]:
        """The same with one adapter more, or another one of that name; it is found, read and checked as at the start.
        `scale` is in place of the spec's own. Raises ValueError with every reason against it, a line each."""
        check_name(name)
        try:
            opened = self.opener.open(spec, scale)
        except AdapterError as error:
            raise ValueError("\n".join(error.problems)) from error
        names = replace(self.names, adapters={**self.names.adapters, name: opened.named})
        unusable = {other: why for other, why in self.unusable.items() if other != name}
        adapters = {**self.adapters, name: opened.adapter}
        return replace(self, names=names, adapters=adapters, unusable=unusable), opened

    def without_adapter(self, name: str) -> Models:
        """The same without that adapter. Raises ValueError if an alias or a route leads to it."""
        names = {other: named for other, named in self.names.adapters.items() if other != name}
        adapters = {other: adapter for other, adapter in self.adapters.items() if other != name}
        return replace(self, names=replace(self.names, adapters=names), adapters=adapters)

    def identity(self, adapters: Iterable[str]) -> dict[str, str]:
        """What decides the answers to rows that come to `adapters`: those, `parts`, and what leads to them."""
        leads = {"the aliases": _in_order(self.names.aliases), "the routes": _in_order(self.names.routes)}
        return {**self.parts, **{f"adapter `{name}`": self._content(name) for name in adapters}, **leads}

    def _content(self, name: str) -> str:
        named = self.names.adapters[name]
        tokenizer = base_files.tokenizer_sha256(Path(self.adapters[name].path)) if named.prompter else ""
        return _sha256(f"{named.sha256}{named.scale}\0{named.template or ''}\0{tokenizer}".encode())


class Opened(NamedTuple):
    """An adapter that can be served, and what its name stands for."""

    adapter: Adapter
    named: Named
    warning: str | None
    """What it brings and is not used for it, if that is so."""


class Opener:
    """What adapters are checked against: the base, the limits, the tokenizers."""

    def __init__(self, base: BaseInfo, options: ModelOptions) -> None:
        """Raises Failure (INPUT) for a chat template that cannot be read."""
        template = base_files.read_template(options.chat_template) if options.chat_template else None
        self.base, self.options = base, options
        self.tokenizers = Tokenizers(Path(base.path), Limits(base.max_model_len, base.vocab_size), template)

    def open(self, spec: AdapterSpec, scale: float | None = None) -> Opened:
        """Finds (downloads, if it is the hub's) and checks one adapter, `scale` in place of the spec's own. Raises
        AdapterError with every reason."""
        options = self.options
        try:
            folder, registered = fetch(spec)
            scale = registered if scale is None else scale
            template = base_files.adapter_template(folder) or None
        except ValueError as error:
            raise AdapterError([str(error)]) from error
        adapter = open_adapter(
            str(folder), self.base, max_rank=options.max_lora_rank, allow_noop=options.allow_noop_adapters
        )
        alone = "; ".join(adapter.static_only) or None
        if alone and scale != 1:
            raise AdapterError([f"{folder}: it can only be served at scale 1, not {scale:g}: {alone}"])
        try:
            prompter = self.tokenizers.own(folder, adapter.vocab_size) if adapter.vocab_size else None
            warning = None if prompter else self.tokenizers.ignored(folder)
        except (OSError, ValueError) as error:
            raise AdapterError([str(error)]) from error
        return Opened(adapter, Named(adapter.sha256, scale, template, alone, prompter=prompter), warning)


def open_models(options: ModelOptions, *, all_or_nothing: bool = True) -> Models:
    """Finds and checks the base and every adapter.

    Adapters that cannot be served are kept as `unusable` if they were only found in --adapters-dir, or if not
    `all_or_nothing`. Raises Failure with all that is wrong with the others at once.
    """
    registry = read_registry(options)
    path = base_files.locate_base(options.base_model)
    try:
        base = describe_base(str(path), options.max_model_len)
    except ModelError as error:
        raise Failure(ExitCode.INPUT, str(error)) from error
    opener = Opener(base, options)
    opened: dict[str, Opened] = {}
    problems = {name: [why] for name, why in registry.refused.items()}
    for name, entry in registry.adapters.items():
        try:
            opened[name] = opener.open(entry.spec)
        except AdapterError as error:
            problems[name] = error.problems
    if all_or_nothing:
        refuse_adapters({n: problems[n] for n, entry in registry.adapters.items() if entry.given and n in problems})
    known = {name: one.named for name, one in opened.items()}
    known |= {name: Named("", unusable="; ".join(all_)) for name, all_ in problems.items()}
    try:
        base_name = options.base_name or base_files.base_name_of(options.base_model)
        names = Names(base_name, known, registry.aliases, registry.routes)
    except NamesError as error:
        raise Failure(ExitCode.INPUT, *(f"--adapters-file: {problem}" for problem in error.problems)) from error
    return Models(
        base,
        names,
        {name: one.adapter for name, one in opened.items()},
        problems,
        opener,
        opener.tokenizers.base,
        tuple(_warnings(opened)),
        {
            "base model": base.fingerprint,
            "the base's generation config": _sha256(
                repr((sorted(base.sampling_defaults.items()), base.eos_token_ids)).encode()
            ),
            "the base's tokenizer": base_files.tokenizer_sha256(path),
            "--chat-template": _sha256((opener.tokenizers.chat_template or "").encode()),
            "--max-model-len": str(base.max_model_len),
            "--dtype": options.dtype,
            "--seed": str(options.seed),
        },
        options.max_loras_per_batch or _slots([one.adapter for one in opened.values()], base),
    )


def fetch(spec: AdapterSpec) -> tuple[Path, float]:
    """The adapter's folder, downloaded if need be, and its registered scale. Raises ValueError, in one line."""
    place = locate(spec)
    if place.repository is None:
        return place.folder, place.scale
    try:
        return hub.fetch(place.repository, place.revision), place.scale
    except ValueError as error:
        raise ValueError(f"{place.folder}: no such folder, and {error}") from error


def refuse_adapters(problems: Mapping[str, list[str]]) -> None:
    """Raises Failure (INPUT) with every problem of these adapters, if there are any."""
    if problems:
        raise Failure(ExitCode.INPUT, *(f"adapter `{name}`: {why}" for name, all_ in problems.items() for why in all_))


def _warnings(opened: Mapping[str, Opened]) -> Iterator[str]:
    """What is to be said of the adapters, each thing once."""
    names: dict[str, list[str]] = {}
    for name, one in opened.items():
        if one.warning:
            names.setdefault(one.warning, []).append(name)
    for warning, (first, *others) in names.items():
        yield f"adapter `{first}`" + (f" (and {len(others)} others)" if others else "") + f": {warning}"


def _slots(adapters: Iterable[Adapter], base: BaseInfo) -> int:
    sizes = {adapter.sha256: adapter.numbers for adapter in adapters if not adapter.static_only}
    return slot_count(sizes.values(), sum(map(prod, base.parameters.values())))


def _in_order(tables: Mapping[str, Mapping[str, object]]) -> str:
    # The order of a split's targets decides which row gets which.
    return _sha256(repr([(name, list(table.items())) for name, table in sorted(tables.items())]).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
