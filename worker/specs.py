"""How a person says where an adapter is: `PATH_OR_HUB_ID[@REV][*SCALE]`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_REGISTERED_SCALE = 1000
_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")
_KEYS = ("path", "revision", "scale")


@dataclass(slots=True, frozen=True)
class AdapterSpec:
    """An adapter as it was given; whether `text` is a path or a hub id is for the disk to say."""

    text: str
    revision: str | None = None
    scale: float | None = None
    """Given apart from `text`; None is what the text says, else 1."""
    root: Path = Path()
    """What a relative path is relative to."""


@dataclass(slots=True, frozen=True)
class Place:
    """Where an adapter is: a folder, or a repository on the hub at a revision; and its registered scale."""

    folder: Path
    repository: str | None = None
    revision: str | None = None
    scale: float = 1.0


def check_name(name: str) -> str:
    """The name, if it can be an adapter's or an alias's. Raises ValueError."""
    if not ADAPTER_NAME.fullmatch(name):
        allowed = "letters, digits, '.', '_' and '-', at most 64, the first a letter or digit"
        raise ValueError(f"{name!r} is not an adapter name: {allowed}")
    return name


def spec_of(value: Any, root: Path | None = None) -> AdapterSpec:
    """A spec from a string, a path, a (path, scale) pair, or an object `{"path", "revision", "scale"}`.

    Raises ValueError, in one line.
    """
    known = AdapterSpec("", root=root or Path())
    if isinstance(value, tuple) and len(value) == 2:
        value = {"path": value[0], "scale": value[1]}
    if isinstance(value, (str, PathLike)):
        value = {"path": value}
    if not isinstance(value, Mapping) or "path" not in value:
        raise ValueError('an adapter is a path, a hub id, or an object {"path", "revision", "scale"}')
    if extra := sorted(set(value) - set(_KEYS)):
        raise ValueError(f"unknown key {extra[0]!r}: an adapter has {', '.join(_KEYS)}")
    path, revision, scale = (value.get(key) for key in _KEYS)
    if not isinstance(path, (str, PathLike)) or not fspath(path):
        raise ValueError("`path` must be a path or a hub id")
    if revision is not None and not (isinstance(revision, str) and revision):
        raise ValueError("`revision` must be a branch, a tag or a commit")
    if scale is not None:
        _check_scale(scale)
    return replace(known, text=str(fspath(path)), revision=revision, scale=scale)


def locate(spec: AdapterSpec) -> Place:
    """Where the adapter is. What exists is a path, `@` and `*` in it included; then `*SCALE` is cut off; then what has
    the form of a hub id is one. Raises ValueError, in one line."""
    scale = 1.0 if spec.scale is None else float(spec.scale)
    for text, factor in _readings(spec):
        if (folder := _existing(spec, text)) is not None:
            if spec.revision:
                raise ValueError(f"{text} is a folder; only what is on the hub has a revision ({spec.revision})")
            return Place(folder, scale=factor or scale)
    text, factor = _readings(spec)[-1]
    found = _HUB.fullmatch(text)  # begins with a letter or digit: `./x`, `/x`, `~/x` and `../x` are paths only
    if found is None:
        raise ValueError(f"{spec.root / text}: no such folder")
    if spec.revision and found["revision"]:
        raise ValueError(f"{text}: the revision is given twice, there and as {spec.revision}")
    return Place(spec.root / text, found["id"], spec.revision or found["revision"], factor or scale)


def _readings(spec: AdapterSpec) -> list[tuple[str, float | None]]:
    """The text as a place, and without the scale at its end, if there is one: (place, scale)."""
    readings: list[tuple[str, float | None]] = [(spec.text, None)]
    text, star, end = spec.text.rpartition("*")
    if star and text and spec.scale is None:
        try:
            readings.append((text, _check_scale(float(end))))
        except ValueError:
            if _existing(spec, spec.text) is None:
                raise ValueError(f"{spec.text}: no such folder, and {end!r} is not a scale: {_SCALES}") from None
    return readings


def _existing(spec: AdapterSpec, text: str) -> Path | None:
    try:
        folder = spec.root / Path(text).expanduser()
        return folder if folder.exists() else None
    except (OSError, RuntimeError):  # too long for a name, or a home that nobody has
        return None


_SCALES = f"a number other than 0, at most {MAX_REGISTERED_SCALE} either way"


def _check_scale(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"{scale!r} is not a scale: {_SCALES}")
    if not 0 < abs(scale) <= MAX_REGISTERED_SCALE:
        raise ValueError(f"{scale!r} is not a scale: {_SCALES}")
    return float(scale)
