"""What a row's names come to: adapters, aliases, splits, routes, strengths and mixes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.schemas.errors import LineError
from loramill.schemas.names import Named, Names, NamesError
from loramill.schemas.request import parse_line

ADAPTERS = {
    "sql": Named("s"),
    "half": Named("h", scale=0.5, template="own"),
    "twin": Named("s"),
    "dora": Named("d", alone="it is DoRA"),
    "torn": Named("", unusable="cut short"),
}
NAMES = Names(
    "llama",
    ADAPTERS,
    aliases={
        "query": {"sql": 1.0},
        "again": {"query": 1.0},
        "split": {"sql": 0.9, "half": 0.1},
        "deep": {"split": 0.5, "base": 0.5},
        "plain": {"llama": 1.0},
        "risky": {"torn": 1.0},
    },
    routes={"task": {"summary": "half", "none": "base", "*": "again"}, "lang": {"de": "sql"}},
)


def resolve(names: Names = NAMES, custom_id: str = "r", **fields: Any) -> tuple[tuple[str, float], ...]:
    line = orjson.dumps({"id": custom_id, "prompt": "p"} | fields)
    return names.resolve(parse_line(line, names.route_fields))


def refusal(**fields: Any) -> LineError:
    with pytest.raises(LineError) as caught:
        resolve(**fields)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("name", [None, "", "llama", "base", "plain", "llama:plain"])
def test_what_is_the_base(name: str | None) -> None:
    assert resolve(model=name) == ()


@pytest.mark.parametrize("name", ["sql", "llama:sql", "base:sql", "query", "again", "base:again"])
def test_what_is_an_adapter(name: str) -> None:
    assert resolve(model=name) == resolve(adapter=name) == (("sql", 1.0),)


def test_an_adapter_may_be_called_base() -> None:
    assert resolve(Names("llama", {"base": Named("b")}), model="base") == (("base", 1.0),)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("SQL", "`sql`"),
        ("sqll", "`sql`"),
        ("quer", "`query`"),
        ("llama:sqll", "`sql`"),
        ("other:sql", ""),
        ("llama:", ""),
        (":sql", "`sql`"),
        ("../sql", "`sql`"),
        ("x" * 500, ""),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, hint: str) -> None:
    for _ in range(2):  # the second time it is remembered
        error = refusal(model=name)
        assert (error.code, error.param) == ("model_not_found", "model")
        assert name[:100] in error.message
        assert len(error.message) < 250
        assert hint in error.message


def test_strengths_are_the_rows_times_the_registered() -> None:
    assert resolve(adapter="sql", scale=2) == (("sql", 2.0),)
    assert resolve(adapter="half") == (("half", 0.5),)
    assert resolve(adapter="half", scale=-3) == (("half", -1.5),)
    assert resolve(adapter="query", scale=0.25) == (("sql", 0.25),)


def test_mixes() -> None:
    mix = [{"name": "again", "scale": 0.5}, {"name": "half"}]
    assert resolve(adapters=mix) == (("sql", 0.5), ("half", 0.5))
    assert resolve(adapters=mix, model="llama") == (("sql", 0.5), ("half", 0.5))
    assert resolve(adapters=[{"name": "sql"}]) == (("sql", 1.0),)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"scale": 0.5}, "scale", "answered by the base"),
        ({"scale": 0.5, "model": "llama"}, "scale", "answered by the base"),
        ({"scale": 0, "adapter": "sql"}, "scale", "strength 0"),
        ({"adapters": [{"name": "sql", "scale": 0}]}, "adapters", "strength 0"),
        ({"adapters": [{"name": "sql"}, {"name": "twin", "scale": -1}]}, "adapters", "strength 0"),
        ({"adapters": [{"name": "sql"}, {"name": "query"}]}, "adapters.1.name", "`sql` is in the mix already"),
        ({"adapters": [{"name": "sql"}, {"name": "base"}]}, "adapters.1.name", "the base is part of every mix"),
        ({"adapters": [{"name": "sql"}, {"name": "hlf"}]}, "adapters.1.name", "did you mean `half`"),
        ({"adapters": [{"name": "sql"}], "model": "half"}, "adapters", "name different things"),
        ({"adapters": [{"name": "sql"}], "model": "nope"}, "model", "`nope`"),
        ({"adapter": "dora", "scale": 0.5}, "adapters", "it is DoRA"),
        ({"adapters": [{"name": "dora"}, {"name": "sql"}]}, "adapters", "it is DoRA"),
        ({"adapter": "torn"}, "model", "adapter `torn` cannot be served: cut short"),
        ({"adapter": "risky"}, "model", "adapter `torn` cannot be served: cut short"),
        ({"task": "x", "lang": "de"}, "lang", "routes go by `"),
        ({"lang": "fr"}, "lang", "no route for `lang` `fr`"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], param: str, says: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert says in error.message


def test_used_alone_at_strength_1_is_fine() -> None:
    assert resolve(adapter="dora") == resolve(adapters=[{"name": "dora"}]) == (("dora", 1.0),)


def test_routes_apply_to_rows_that_name_nothing() -> None:
    assert resolve(task="summary") == (("half", 0.5),)
    assert resolve(task="summary", scale=2) == (("half", 1.0),)
    assert resolve(task="any other") == (("sql", 1.0),)
    assert resolve(task="none") == ()
    assert resolve(task=None) == resolve() == ()
    assert resolve(task="summary", model="sql") == (("sql", 1.0),)
    assert resolve(task="summary", model="base") == ()
    assert resolve(task="summary", adapters=[{"name": "sql"}]) == (("sql", 1.0),)


def test_contents_that_are_the_same_are_one() -> None:
    assert NAMES.by_hash((("sql", 1.0), ("half", 0.5), ("twin", 0.25))) == (("s", 1.25), ("h", 0.5))
    assert NAMES.by_hash((("sql", 1.0), ("half", 0.0))) == (("s", 1.0),)
    assert NAMES.by_hash((("sql", 1.0), ("half", 0.5), ("twin", -1.0))) == (("h", 0.5),)


def test_the_template_is_the_first_adapters() -> None:
    assert NAMES.template((("half", 1.0), ("sql", 1.0))) == "own"
    assert NAMES.template((("sql", 1.0), ("half", 1.0))) is None
    assert NAMES.template(()) is None


def test_a_split_follows_its_weights_and_decides_alike_every_time() -> None:
    ids = [f"row-{number}" for number in range(20_000)]
    first = [resolve(model="split", custom_id=one)[0][0] for one in ids]
    assert first == [resolve(model="split", custom_id=one)[0][0] for one in ids]
    assert Counter(first)["half"] / len(ids) == pytest.approx(0.1, abs=0.01)


def test_two_splits_are_independent() -> None:
    shares = {"sql": 0.5, "half": 0.5}
    names = Names("llama", ADAPTERS, aliases={"a": shares, "b": shares})
    ids = [str(number) for number in range(10_000)]
    same = sum(resolve(names, one, model="a") == resolve(names, one, model="b") for one in ids)
    assert same / len(ids) == pytest.approx(0.5, abs=0.03)


def test_a_split_of_a_split_and_the_base() -> None:
    found = Counter(resolve(model="deep", custom_id=str(number)) for number in range(10_000))
    assert found[()] / 10_000 == pytest.approx(0.5, abs=0.03)
    assert found[("half", 0.5),] / 10_000 == pytest.approx(0.05, abs=0.01)


WEIGHTS = st.lists(st.sampled_from([0.0, 0.001, 0.5, 1.0, 3.0, 1e6]), min_size=2, max_size=5).filter(any)


@given(WEIGHTS)
def test_every_split_keeps_its_shares(weights: list[float]) -> None:
    adapters = {f"a{index}": Named(f"{index}") for index in range(len(weights))}
    names = Names("llama", adapters, aliases={"s": dict(zip(adapters, weights, strict=True))})
    row = parse_line(b'{"id": "r", "prompt": "p", "model": "s"}')
    count = 2000
    rows = [parse_line(orjson.dumps({"id": f"{n}", "prompt": "p", "model": "s"})) for n in range(count)]
    found = Counter(names.resolve(one)[0][0] for one in rows)
    for name, weight in zip(adapters, weights, strict=True):
        share = weight / sum(weights)
        assert abs(found[name] / count - share) < 5 * (share * (1 - share) / count) ** 0.5 + 1 / count
        assert weight or not found[name]
    assert names.resolve(row) == names.resolve(row)


@pytest.mark.parametrize(
    ("aliases", "routes", "says"),
    [
        ({"a": {"nope": 1}}, {}, "alias `a`: no adapter or alias is named `nope`"),
        ({"a": {"sqll": 1}}, {}, "did you mean `sql`"),
        ({"a": {"": 1}}, {}, "is named ``"),
        ({"a": {"a": 1}}, {}, "alias `a` comes back to itself"),
        ({"a": {"b": 1}, "b": {"sql": 1, "c": 1}, "c": {"a": 1}}, {}, "alias `c` comes back to itself"),
        ({"sql": {"half": 1}}, {}, "alias `sql`: an adapter has that name"),
        ({"llama": {"half": 1}}, {}, "alias `llama`: the base has that name"),
        ({"base": {"half": 1}}, {}, "alias `base`: the base has that name"),
        ({"a": {"sql": -1, "half": 2}}, {}, "the weight of `sql` must be 0 or more, not -1"),
        ({"a": {"sql": float("nan")}}, {}, "not nan"),
        ({"a": {"sql": float("inf")}}, {}, "not inf"),
        ({"a": {"sql": 1e308, "half": 1e308}}, {}, "its weights come to inf"),
        ({"a": {"sql": 0, "half": 0}}, {}, "its weights come to 0"),
        ({}, {"task": {"x": "nope"}}, "route `task`, value `x`: no adapter or alias is named `nope`"),
        ({}, {"temperature": {"x": "sql"}}, "route `temperature`: the field `temperature` of a line means"),
        ({}, {"metadata": {"x": "sql"}}, "the field `metadata`"),
        ({}, {"adapter": {"x": "sql"}}, "the field `adapter`"),
        ({}, {"scale": {"x": "sql"}}, "the field `scale`"),
        ({}, {"tools": {"x": "sql"}}, "the field `tools`"),
        ({}, {"url": {"x": "sql"}}, "the field `url`"),
        ({}, {"loramill": {"x": "sql"}}, "the field `loramill`"),
    ],
)
def test_names_that_contradict_each_other(aliases: Any, routes: Any, says: str) -> None:
    with pytest.raises(NamesError) as refused:
        Names("llama", ADAPTERS, aliases, routes)
    assert any(says in problem for problem in refused.value.problems)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(NamesError) as refused:
        Names("llama", ADAPTERS, {"a": {"b": 1}, "sql": {"half": 1}}, {"kind": {"x": "y"}})
    assert len(refused.value.problems) == 3
