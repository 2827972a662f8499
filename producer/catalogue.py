"""`loramill adapters list` and `inspect`: what registered adapters hold, and whether they fit a base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import click

from loramill.schemas.errors import did_you_mean
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.base_files import locate_base, silence_libraries
from loramill.worker.model import ModelError, describe_base
from loramill.worker.models import Opener, fetch
from loramill.worker.registry import Entry, Registry, read_registry
from loramill.worker.settings import AdapterOptions, ModelOptions
from loramill.worker.tensor_file import CONFIG, AdapterError, read, read_config
from loramill.worker.tensor_names import Kind, parse


@dataclass(slots=True, frozen=True)
class Card:
    """What can be said about one adapter."""

    name: str
    source: str
    """Who registered it."""
    path: str
    scale: float = 1.0
    sha256: str | None = None
    """Of its content: what results name. None if it cannot be read."""
    bytes: int = 0
    """Of its weights."""
    ranks: list[int] = field(default_factory=list)
    alpha: float | None = None
    targets: list[str] | str | None = None
    """As its config has them."""
    modules: list[str] = field(default_factory=list)
    """Those that it changes; without a base, those that it has low-rank pairs for."""
    static_only: list[str] = field(default_factory=list)
    """Why it can only be merged into the base; with a base alone."""
    fits: bool | None = None
    """Whether the base can be served with it; None without a base."""
    problems: list[str] = field(default_factory=list)
    """Every reason why it cannot be read, or does not fit."""


def show(names: tuple[str, ...], *, in_full: bool = False, json: bool, **given: Any) -> ExitCode:
    """Carries out the commands: prints the adapters `names`, or all of them. Raises Failure."""
    silence_libraries()
    registry, opener = open_registry(**given)
    ok = True
    for name in chosen(registry, names):
        card = read_card(name, registry, opener)
        click.echo(_as_json(card) if json else _in_full(card) if in_full else _in_a_line(card))
        ok = ok and not card.problems
    return ExitCode.OK if ok else ExitCode.INPUT


def open_registry(
    *, base_model: str | None, max_lora_rank: int, allow_noop_adapters: bool, **sources: Any
) -> tuple[Registry, Opener | None]:
    """The adapters of `sources` (AdapterOptions' fields), and what opens them if there is a base. Raises Failure."""
    registry = read_registry(AdapterOptions(**sources))
    if base_model is None:
        return registry, None
    options = ModelOptions(base_model=base_model, max_lora_rank=max_lora_rank, allow_noop_adapters=allow_noop_adapters)
    try:
        return registry, Opener(describe_base(str(locate_base(base_model))), options)
    except ModelError as error:
        raise Failure(ExitCode.INPUT, str(error)) from error


def chosen(registry: Registry, names: Iterable[str]) -> list[str]:
    """`names`, or every registered one. Raises Failure (USAGE) for one that is not registered, or if none is."""
    known = [*registry.adapters, *registry.refused]
    if not known:
        raise Failure(ExitCode.USAGE, "no adapters: give --adapter, --adapters, --adapters-dir or --adapters-file")
    for name in names:
        if name not in known:
            raise Failure(ExitCode.USAGE, f"no adapter is named `{name}`{did_you_mean(name, known)}")
    return list(names) or known


def read_card(name: str, registry: Registry, opener: Opener | None) -> Card:
    """Everything about one adapter, what is wrong with it included."""
    entry = registry.adapters.get(name)
    if entry is None:
        return Card(name, "--adapters-dir", "", problems=[registry.refused[name]])
    card = _on_disk(name, entry)
    if opener is None or card.sha256 is None:
        return card if opener is None else replace(card, fits=False)
    try:
        opened = opener.open(entry.spec)
    except AdapterError as error:
        return replace(card, fits=False, problems=error.problems)
    changed = sorted({parameter.rpartition(".")[0] for parameter in opened.adapter.parameters})
    return replace(card, fits=True, static_only=list(opened.adapter.static_only), modules=changed)


def _on_disk(name: str, entry: Entry) -> Card:
    """What its files say by themselves."""
    card = Card(name, entry.source, entry.spec.text)
    try:
        folder, scale = fetch(entry.spec)
        raw = read_config(str(folder))
        config = json.loads(raw)
        files = read(str(folder), raw)
    except AdapterError as error:
        return replace(card, problems=error.problems)
    except (ValueError, RecursionError) as error:
        return replace(card, problems=[" ".join(str(error).split())])
    if not isinstance(config, dict):
        return replace(card, problems=[f"{folder / CONFIG}: is not a JSON object"])
    found = {
        parsed[0]: tensor.shape[0]
        for name, tensor in files.tensors.items()
        if (parsed := parse(name)) and parsed[1] in (Kind.A, Kind.EMBEDDING_A)
    }
    return replace(
        card,
        path=str(folder),
        scale=scale,
        sha256=files.sha256,
        bytes=sum(tensor.nbytes for tensor in files.tensors.values()),
        ranks=sorted(set(found.values())),
        alpha=config.get("lora_alpha"),
        targets=config.get("target_modules"),
        modules=sorted(found),
    )


def _as_json(card: Card) -> str:
    modules = {"count": len(card.modules), "names": card.modules}
    return json.dumps(asdict(card) | {"modules": modules})


def _in_a_line(card: Card) -> str:
    return "  ".join(_cells(card))


def _cells(card: Card) -> Iterator[str]:
    yield f"{card.name:<16}"
    if card.sha256 is None:
        yield "cannot be read"
    else:
        yield f"rank {','.join(map(str, card.ranks)):<6}"
        yield f"{len(card.modules):>4} modules"
        yield f"{card.bytes / 2**20:>8.1f} MiB"
        yield card.sha256[:12]
    if card.scale != 1:
        yield f"scale {card.scale:g}"
    yield card.path
    if card.problems:
        yield "; ".join(card.problems)
    elif card.static_only:
        yield f"static only: {'; '.join(card.static_only)}"
    elif card.fits:
        yield "fits the base"


def _in_full(card: Card) -> str:
    said = asdict(card) | {"modules": [f"{len(card.modules)}: {', '.join(card.modules)}"]}
    lines = []
    for key, value in said.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        lines += [f"{key + ':':<13}{each}" for each in values]
    return "\n".join(lines)
