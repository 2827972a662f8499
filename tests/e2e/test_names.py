"""Adapters under every kind of name, mixed in one file, on the shipped example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).parents[2] / "examples" / "tiny"
FILE = f"""
[adapters]
up = "{TINY}/adapters/upper"
loud = {{ path = "{TINY}/adapters/upper", scale = 1.0 }}
back = "{TINY}/adapters/reverse"
[aliases]
shout = "up"
either = {{ up = 0.5, back = 0.5 }}
[routes.task]
mirror = "back"
"*" = "shout"
"""


@pytest.fixture
def named(desk, tmp_path: Path):
    """Runs rows against the file above, and the example's own adapters beside it."""
    (tmp_path / "names.toml").write_text(FILE)
    flags = {"base_model": TINY / "base", "adapters_dir": TINY / "adapters", "adapters_file": tmp_path / "names.toml"}

    def run(rows: list[dict[str, Any]], *more: object) -> tuple[int, dict[str, dict[str, Any]], str]:
        desk.write({"temperature": 0, "max_tokens": 20, **row} if "url" not in row else row for row in rows)
        ended = desk.run("--overwrite", *more, **flags)
        return ended.code, {r["custom_id"]: r["response"]["body"] for r in desk.results()}, ended.err

    return run


def chat(name: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": text}], **fields}


def openai(name: str, text: str, **body: Any) -> dict[str, Any]:
    body |= {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 20}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def text(body: dict[str, Any]) -> str:
    return body["choices"][0]["message"]["content"]


def test_every_kind_of_name_in_one_file(named) -> None:
    code, bodies, err = named(
        [
            chat("plain", "hello", adapter="upper"),
            chat("alias", "hello", adapter="shout"),
            chat("routed", "hello", task="mirror"),
            chat("any", "hello", task="whatever"),
            openai("metadata", "hello", metadata={"task": "mirror"}),
            openai("field", "hello", task="mirror"),
            openai("named", "hello", task="mirror", model="upper"),
            openai("strength", "hello", model="upper", loramill={"scale": 1.0}),
            chat("halves", "hello", adapters=[{"name": "up", "scale": 0.5}, {"name": "loud", "scale": 0.5}]),
            chat("base", "hello"),
        ]
    )
    assert code == 0, err
    said = {name: text(body) for name, body in bodies.items()}
    for name in ("plain", "alias", "any", "named", "strength", "halves"):
        assert said[name] == "HELLO", name
    for name in ("routed", "metadata", "field"):
        assert said[name] == "olleh", name
    assert (bodies["alias"]["model"], bodies["alias"]["loramill"]["adapter"]) == ("shout", "up")
    assert bodies["routed"]["loramill"]["adapter"] == "back"
    assert bodies["halves"]["loramill"]["adapter"] is None
    assert [one["scale"] for one in bodies["halves"]["loramill"]["adapters"]] == [0.5, 0.5]
    assert bodies["base"]["loramill"]["mode"] == "base"


def test_a_split_is_decided_alike_in_every_run(named) -> None:
    rows = [chat(f"r{number}", "hello", adapter="either", max_tokens=1) for number in range(40)]
    first = {name: body["loramill"]["adapter"] for name, body in named(rows)[1].items()}
    assert set(first.values()) == {"up", "back"}
    again = {name: body["loramill"]["adapter"] for name, body in named(rows[::-1], "--seed", 5)[1].items()}
    assert again == first


# This engine has one adapter a row at strength 1 and refuses the rest; with strengths and mixes this test passes.
def test_strengths_and_mixes_change_the_answers(named) -> None:
    mix = [{"name": "up", "scale": 0.6}, {"name": "back", "scale": 0.6}]
    rows = [chat(name, "hello", **fields, logprobs=True) for name, fields in {
        "one": {"adapter": "up"}, "weak": {"adapter": "up", "scale": 0.5}, "mix": {"adapters": mix}, "base": {},
    }.items()]  # fmt: skip
    code, bodies, err = named(rows)
    assert code == 0, err
    first = {name: body["choices"][0]["logprobs"]["content"][0]["logprob"] for name, body in bodies.items()}
    assert len(set(first.values())) == 4
    assert bodies["weak"]["loramill"]["scale"] == 0.5


def test_names_that_contradict_each_other_are_refused_at_start(desk, tmp_path: Path) -> None:
    desk.write([{"id": "a", "prompt": "x"}])
    tables = {"aliases": {"one": "two", "x": "nope"}, "routes": {"stop": {"*": "one"}}}
    (tmp_path / "names.json").write_text(json.dumps(tables))
    ended = desk.run(adapters_file=tmp_path / "names.json")
    assert ended.code == 4
    assert [line.partition(": ")[2] for line in ended.err.splitlines()] == [
        "--adapters-file: alias `one`: an adapter has that name",
        "--adapters-file: alias `x`: no adapter or alias is named `nope`",
        "--adapters-file: route `stop`: the field `stop` of a line means something else",
    ]
