"""What the rows of a job may name, and which adapters a name comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import isfinite

from .errors import ErrorCode, LineError, did_you_mean, invalid
from .prompt import Prompter
from .request import RESERVED_FIELDS, Row

ANY = "*"
"""In a route: any other value."""
_MAX_UNKNOWN = 10_000

Uses = tuple[tuple[str, float], ...]
"""Adapters by name, each once, with the strength of each, the registered scale included. () is the base."""


class NamesError(ValueError):
    """Names that contradict each other; `problems` has every reason, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(slots=True, frozen=True)
class Named:
    """What an adapter's name stands for."""

    sha256: str
    """Of its content: its identity in the engine. "" if it is unusable."""
    scale: float = 1.0
    """Multiplied into the strength that a row asks for."""
    template: str | None = None
    """The chat template that it brings."""
    alone: str | None = None
    """Why it can only be used by itself and at strength 1, if that is so."""
    unusable: str | None = None
    """Why it cannot be served, if that is so: a row that comes to it is invalid."""
    prompter: Prompter | None = None
    """Of the tokenizer that it brings, where its training added tokens; None is the base's."""


@dataclass(slots=True, frozen=True)
class Names:
    """Every name that rows can give. It never changes, so rows keep the meaning that they were checked with."""

    base: str
    adapters: Mapping[str, Named] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Another name -> what it stands for, with weights: of several, a row gets one by its custom_id (a split)."""
    routes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """A row's field -> its value -> a name; the value `*` is any other."""
    hidden: frozenset[str] = frozenset()
    """Of `adapters` and `aliases`, those that are not there for whoever asks."""
    _unknown: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Messages about unknown names: looking for the nearest of a thousand names takes milliseconds."""

    def __post_init__(self) -> None:
        """Raises NamesError with everything that is wrong with the aliases and the routes."""
        problems = [*self._bad_aliases(), *self._bad_routes()]
        if problems:
            raise NamesError(problems)

    @property
    def route_fields(self) -> tuple[str, ...]:
        """The fields of a line that routes go by, for `parse_line`."""
        return tuple(self.routes)

    def seen_by(self, may_use: Callable[[str], bool]) -> Names:
        """The same for somebody who may use these adapters alone: the others are unknown to him, and so is every alias
        that can come to one of them. A route that leads there still does, to a row that is refused."""
        hidden = {name for name in self.adapters if not may_use(name)}
        aliases = {alias for alias in self.aliases if any(self._leads_to(alias, name) for name in hidden)}
        return replace(self, hidden=frozenset(hidden | aliases))

    def resolve(self, row: Row) -> Uses:
        """The adapters that answer the row.

        Raises LineError: model_not_found for a name that is unknown or cannot be served, invalid_request for a mix or a
        strength that cannot be.
        """
        uses = self._mix(row) if row.adapters else self._one(row)
        for name, strength in uses:
            named = self.adapters[name]
            if named.unusable is not None:
                message = f"adapter `{name}` cannot be served: {named.unusable}"
                raise LineError(ErrorCode.MODEL_NOT_FOUND, message, "model")
            if named.alone is not None and (len(uses) > 1 or strength != 1):
                raise invalid(f"adapter `{name}` can only be used alone and at strength 1: {named.alone}", "adapters")
        if uses and (len(uses) > 1 or not uses[0][1]) and not self.by_hash(uses):
            what = "adapters" if row.adapters else "scale"
            raise invalid(f"`{what}` comes to strength 0, which is the base: leave the adapter out instead", what)
        return uses

    def by_hash(self, uses: Uses) -> tuple[tuple[str, float], ...]:
        """The same with content hashes: names of one content become one, and strengths of 0 go."""
        strengths: dict[str, float] = {}
        for name, strength in uses:
            sha256 = self.adapters[name].sha256
            strengths[sha256] = strengths.get(sha256, 0.0) + strength
        return tuple((sha256, strength) for sha256, strength in strengths.items() if strength)

    def template(self, uses: Uses) -> str | None:
        """The chat template of the adapter, of a mix's first one; None is the base's."""
        return self.adapters[uses[0][0]].template if uses else None

    def prompter(self, uses: Uses) -> Prompter | None:
        """Of the adapter's own tokenizer; None is the base's. One that has its own is in no mix."""
        return self.adapters[uses[0][0]].prompter if uses else None

    def _one(self, row: Row) -> Uses:
        name = self._adapter(row.model or self._routed(row), row.custom_id)
        if name is not None:
            return ((name, self.adapters[name].scale * (1.0 if row.scale is None else row.scale)),)
        if row.scale is not None:
            raise invalid("`scale` is an adapter's, and this row is answered by the base", "scale")
        return ()

    def _mix(self, row: Row) -> Uses:
        if self._adapter(row.model, row.custom_id) is not None:
            raise invalid(f"`adapters` and the model `{row.model}` name different things; give one", "adapters")
        uses: dict[str, float] = {}
        for index, (written, scale) in enumerate(row.adapters):
            where = f"adapters.{index}.name"
            name = self._adapter(written, row.custom_id, where)
            if name is None:
                raise invalid(f"`{where}`: the base is part of every mix, name adapters only", where)
            if name in uses:
                raise invalid(f"`{where}`: adapter `{name}` is in the mix already", where)
            uses[name] = scale * self.adapters[name].scale
        return tuple(uses.items())

    def _routed(self, row: Row) -> str:
        """The name that a route gives to a row without one; "" if none does."""
        if len(row.routes) > 1:
            both = " and ".join(f"`{name}`" for name, _ in row.routes)
            raise invalid(f"routes go by {both}: give one of them, or name the adapter", row.routes[1][0])
        for name, value in row.routes:
            route = self.routes[name]
            if (target := route.get(value, route.get(ANY))) is not None:
                return target
            hint = did_you_mean(_shown(value), route)
            raise LineError(ErrorCode.MODEL_NOT_FOUND, f"no route for `{name}` `{_shown(value)}`{hint}", name)
        return ""

    def _adapter(self, written: str, custom_id: str, param: str = "model") -> str | None:
        """The adapter that a name comes to, None for the base; `base` is the base unless an adapter has that name."""
        if written in self.adapters and written not in self.hidden:
            return written
        name = written
        prefix, _, rest = name.rpartition(":")
        if prefix in (self.base, "base") and self._knows(rest):
            name = rest
        if name not in self.hidden:
            while (shares := self.aliases.get(name)) is not None:
                name = _draw(name, shares, custom_id)
            if name in self.adapters:
                return name
            if self._is_base(name):
                return None
        raise LineError(ErrorCode.MODEL_NOT_FOUND, self._about(written), param)

    def _about(self, written: str) -> str:
        message = self._unknown.get(written)
        if message is None:
            prefix, _, rest = written.rpartition(":")
            near = rest if prefix in (self.base, "base") else _shown(written)
            known = (name for name in (*self.adapters, *self.aliases, self.base) if name not in self.hidden)
            hint = did_you_mean(near, known)
            message = f"no adapter or model is named `{_shown(written)}`{hint}"
            if len(self._unknown) < _MAX_UNKNOWN:
                self._unknown[written] = message
        return message

    def _is_base(self, name: str) -> bool:
        return name in ("", "base", self.base)

    def _knows(self, name: str) -> bool:
        return name in self.adapters or name in self.aliases

    def _bad_aliases(self) -> Iterator[str]:
        for alias, shares in self.aliases.items():
            if alias in self.adapters:
                yield f"alias `{alias}`: an adapter has that name"
            if self._is_base(alias):
                yield f"alias `{alias}`: the base has that name"
            for target, weight in shares.items():
                if not isfinite(weight) or weight < 0:
                    yield f"alias `{alias}`: the weight of `{target}` must be 0 or more, not {weight:g}"
                yield from self._bad_target(f"alias `{alias}`", target)
            total = sum(shares.values())
            if total <= 0 or not isfinite(total):
                yield f"alias `{alias}`: its weights come to {total:g}"
            if self._leads_to(alias, alias):
                yield f"alias `{alias}` comes back to itself"

    def _bad_routes(self) -> Iterator[str]:
        for name, route in self.routes.items():
            if name in RESERVED_FIELDS:
                yield f"route `{name}`: the field `{name}` of a line means something else"
            for value, target in route.items():
                yield from self._bad_target(f"route `{name}`, value `{value}`", target)

    def _bad_target(self, where: str, target: str) -> Iterator[str]:
        if not target or not (self._knows(target) or self._is_base(target)):
            hint = did_you_mean(target, [*self.adapters, *self.aliases, self.base])
            yield f"{where}: no adapter or alias is named `{target}`{hint}"

    def _leads_to(self, start: str, end: str) -> bool:
        waiting, seen = [start], set[str]()
        while waiting:
            for target in self.aliases.get(waiting.pop(), {}):
                if target == end:
                    return True
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        return False


def _draw(alias: str, shares: Mapping[str, float], custom_id: str) -> str:
    """The one of `shares` that a row gets: the same in every run, and independent of other splits."""
    if len(shares) == 1:
        return next(iter(shares))
    digest = blake2b(f"{alias}\0{custom_id}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "little") / 2**64 * sum(shares.values())
    chosen = ""
    for target, weight in shares.items():
        if weight > 0:
            chosen = target  # the last one, should rounding put the point at the very end
            if point < weight:
                break
            point -= weight
    return chosen


def _shown(name: str) -> str:
    return name if len(name) <= 128 else name[:125] + "..."
