"""What the names in a job's rows stood for when it was checked, to go with the job. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loramill.schemas.job import JobNames, Pinned
from loramill.schemas.names import Names, Uses


def pin(names: Names, keys: Mapping[str, str], uses: Iterable[Uses], *, base: bool) -> JobNames:
    """The adapters that rows come to (`uses`; the base too if `base`), each by its key; the aliases and the entries of
    routes that lead there, with whatever else those aliases share between.

    Every row comes to the same by these as by all `names`. A route keeps its field even where no entry is left: a row
    may give it beside the name that counts.
    """
    used = {name for one in uses for name, _ in one}
    reached = {alias: _reached(names.aliases, alias) for alias in names.aliases}

    def leads(name: str) -> bool:
        ends = {name} if name not in names.aliases else reached[name] - names.aliases.keys()
        return bool(ends & used) or (base and bool(ends - names.adapters.keys()))

    aliases = {alias for alias in names.aliases if leads(alias)}
    kept = used | {name for alias in aliases for name in reached[alias]}
    return JobNames(
        base=names.base,
        adapters={
            name: Pinned(key=keys[name], scale=names.adapters[name].scale) for name in sorted(kept & keys.keys())
        },
        aliases={alias: dict(names.aliases[alias]) for alias in names.aliases if alias in aliases | kept},
        routes={
            field: {value: target for value, target in route.items() if leads(target)}
            for field, route in names.routes.items()
        },
    )


def _reached(aliases: Mapping[str, Mapping[str, float]], alias: str) -> set[str]:
    """Every name that the alias can come to, aliases on the way included."""
    waiting, seen = [alias], set[str]()
    while waiting:
        for target in aliases.get(waiting.pop(), {}):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen
