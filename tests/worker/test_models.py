"""What a job's identity says of its adapters, and where those come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.models import Models, open_models
from loramill.worker.settings import ModelOptions
from loramill.worker.specs import spec_of


@pytest.fixture
def models(tiny_base: Path, tiny_adapters: Path, tmp_path: Path) -> Any:
    """Opens adapter `one` under two names beside the tables of an adapters file; options are ModelOptions'."""

    def make(scale: float = 1.0, tables: dict[str, Any] | None = None, **options: Any) -> Models:
        file = tmp_path / "names.json"
        file.write_text(json.dumps(tables or {}))
        adapters = {"a": spec_of((tiny_adapters / "one", scale)), "b": spec_of(tiny_adapters / "one")}
        given = {"adapters": adapters, "adapters_file": file} | options
        return open_models(ModelOptions(base_model=str(tiny_base), **given), all_or_nothing=False)

    return make


def changed(one: Models, other: Models, *adapters: str) -> set[str]:
    before, after = one.identity(adapters), other.identity(adapters)
    return {part for part in before | after if before.get(part) != after.get(part)}


def test_a_jobs_identity_has_the_aliases_and_routes_with_their_order(models) -> None:
    split = {"s": {"a": 0.5, "b": 0.5}}
    one = models(tables={"aliases": split})
    assert changed(one, models(tables={"aliases": split}), "a") == set()
    for others in ({"s": {"b": 0.5, "a": 0.5}}, {"s": {"a": 0.5, "b": 0.4}}, {"s": "a"}, {}):
        assert changed(one, models(tables={"aliases": others}), "a") == {"the aliases"}
    routed = models(tables={"aliases": split, "routes": {"task": {"x": "a"}}})
    assert changed(one, routed, "a") == {"the routes"}


def test_a_jobs_identity_has_the_scales_of_the_adapters_in_use(models) -> None:
    assert changed(models(), models(scale=0.5), "a", "b") == {"adapter `a`"}
    assert changed(models(), models(scale=0.5), "b") == set()
    assert models().names.adapters["a"].sha256 == models().names.adapters["b"].sha256


def test_an_adapters_own_template_comes_with_its_name(models, make_adapter, tmp_path: Path) -> None:
    own = make_adapter(tmp_path / "own")
    (own / "chat_template.jinja").write_text("own")
    opened = models(adapters={"own": spec_of(own)})
    assert opened.names.adapters["own"].template == "own"
    (own / "chat_template.jinja").write_text("another")
    assert changed(opened, models(adapters={"own": spec_of(own)}), "own") == {"adapter `own`"}


def test_a_jobs_identity_has_the_tokenizer_of_an_adapter_that_is_used(
    models, make_grown, make_adapter, tmp_path: Path
) -> None:
    folders = {"grown": make_grown(tmp_path / "grown"), "plain": make_adapter(tmp_path / "plain")}
    given = {name: spec_of(folder) for name, folder in folders.items()}
    before = models(adapters=given).identity(given)
    for folder in folders.values():
        (folder / "special_tokens_map.json").write_text("{}")
    after = models(adapters=given).identity(given)
    assert {part for part in before if before[part] != after[part]} == {"adapter `grown`"}


def test_what_cannot_be_served_is_kept_by_name_or_ends_it_all(models, tiny_base: Path, tmp_path: Path) -> None:
    bad = {"x": spec_of(tmp_path / "nowhere"), "y": spec_of(f"{tmp_path}*0")}
    opened = models(adapters=bad)
    assert sorted(opened.unusable) == ["x", "y"]
    assert "nowhere: no such folder" in str(opened.names.adapters["x"].unusable)
    with pytest.raises(Failure) as refused:
        open_models(ModelOptions(base_model=str(tiny_base), adapters=bad))
    assert refused.value.code is ExitCode.INPUT
    assert [line.partition(": ")[0] for line in refused.value.lines] == ["adapter `x`", "adapter `y`"]
