from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.producer.pinning import pin
from loramill.schemas.errors import LineError
from loramill.schemas.names import Named, Names
from loramill.schemas.request import parse_line

ADAPTERS = {name: Named(f"sha-{name}", 0.5 if name == "c" else 1.0) for name in "abcd"}
ALIASES = {"one": {"a": 1.0}, "split": {"b": 1.0, "one": 1.0}, "plain": {"base": 1.0}, "far": {"d": 1.0}}
ROUTES = {"team": {"x": "split", "y": "c", "*": "plain"}, "site": {"u": "far"}}
NAMES = Names("tiny", ADAPTERS, ALIASES, ROUTES)
KEYS = {name: f"key-{name}" for name in ADAPTERS}

LINES = [
    *(f'"model": "{name}"' for name in ("a", "b", "c", "d", "one", "split", "plain", "far", "base", "tiny:one", "")),
    *('"team": "x"', '"team": "y"', '"team": "z"', '"site": "u"', '"team": "x", "model": "d"'),
    *('"adapters": [{"name": "a"}, {"name": "c", "scale": 2}]', '"model": "a", "scale": 0.5'),
]


@given(st.lists(st.tuples(st.sampled_from(LINES), st.integers(0, 50)), max_size=6))
def test_every_row_comes_to_the_same_by_what_is_pinned(rows: list[tuple[str, int]]) -> None:
    lines = [f'{{"id": "{number}", "prompt": "p", {fields}}}'.encode() for fields, number in rows]
    uses = [NAMES.resolve(parse_line(line, NAMES.route_fields)) for line in lines]
    pinned = pin(NAMES, KEYS, uses, base=() in uses)
    by_key = {one.key: name for name, one in pinned.adapters.items()}
    assert {KEYS[name]: name for name in pinned.adapters} == by_key
    adapters = {name: Named(ADAPTERS[name].sha256, one.scale) for name, one in pinned.adapters.items()}
    names = Names(pinned.base, adapters, pinned.aliases, pinned.routes)
    assert [names.resolve(parse_line(line, names.route_fields)) for line in lines] == uses


def test_only_what_rows_come_to_is_kept() -> None:
    pinned = pin(NAMES, KEYS, [(("c", 0.5),)], base=False)
    assert set(pinned.adapters) == {"c"}
    assert pinned.adapters["c"].scale == 0.5
    assert pinned.aliases == {}
    assert pinned.routes == {"team": {"y": "c"}, "site": {}}


def test_a_split_keeps_all_its_shares() -> None:
    pinned = pin(NAMES, KEYS, [(("a", 1.0),)], base=False)
    assert set(pinned.adapters) == {"a", "b"}
    assert pinned.aliases == {"one": {"a": 1.0}, "split": {"b": 1.0, "one": 1.0}}
    names = Names(pinned.base, {name: Named("s") for name in pinned.adapters}, pinned.aliases, pinned.routes)
    with pytest.raises(LineError):  # it leads to no row of the job
        names.resolve(parse_line(b'{"id": "1", "prompt": "p", "model": "far"}'))
