"""The file of `--adapters-file`: adapters, aliases and routes, as TOML or JSON."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramill.schemas.errors import did_you_mean
from loramill.worker.specs import AdapterSpec, check_name, spec_of

_TABLES = ("adapters", "aliases", "routes")


@dataclass(slots=True, frozen=True)
class AdaptersFile:
    """What such a file says; whether its names fit together is for `Names` to say."""

    adapters: Mapping[str, AdapterSpec]
    aliases: Mapping[str, Mapping[str, float]]
    routes: Mapping[str, Mapping[str, str]]


def read_adapters_file(path: Path) -> AdaptersFile:
    """Reads it; relative paths in it are relative to its folder. Raises ValueError, in one line."""
    try:
        content = _parse(path)
        if extra := sorted(set(content) - set(_TABLES)):
            raise ValueError(f"unknown table {extra[0]!r}{did_you_mean(extra[0], _TABLES)}")
        return AdaptersFile(
            _each(content, "adapters", lambda name, value: spec_of(value, path.parent), names=True),
            _each(content, "aliases", _shares, names=True),
            _each(content, "routes", _route),
        )
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def specs_of_json(text: str) -> dict[str, AdapterSpec]:
    """`{"name": spec}`. Raises ValueError, in one line."""
    content = json.loads(text, object_pairs_hook=_once)
    if not isinstance(content, dict):
        raise ValueError('not an object like {"name": "path"}')
    return _each({"adapters": content}, "adapters", lambda name, value: spec_of(value), names=True)


def _parse(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix != ".json":
        raise ValueError("name it .toml or .json, after what it holds")
    content = json.loads(text, object_pairs_hook=_once)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # TOML refuses it by itself; JSON's last one would win.
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found


def _each(
    content: Mapping[str, Any], table: str, read: Callable[[str, Any], Any], *, names: bool = False
) -> dict[str, Any]:
    entries = content.get(table, {})
    if not isinstance(entries, dict):
        raise ValueError(f"`{table}` must be a table")
    found = {}
    for name, value in entries.items():
        try:
            found[check_name(name) if names else name] = read(name, value)
        except ValueError as error:
            raise ValueError(f"{table}.{name}: {error}") from error
    return found


def _shares(alias: str, value: Any) -> dict[str, float]:
    if isinstance(value, str):
        return {value: 1.0}
    if not isinstance(value, dict) or not value:
        raise ValueError("an alias is a name, or a split like { name = 0.9, other = 0.1 }")
    for target, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"the weight of {target!r} must be a number")
    return {target: float(weight) for target, weight in value.items()}


def _route(field: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value or not all(isinstance(target, str) for target in value.values()):
        raise ValueError('a route is a table of values and names, like { summary = "sum", "*" = "chat" }')
    return value
