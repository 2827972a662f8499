"""How adapters are registered: specs, files, folders, and what of them is on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.adapters_file import read_adapters_file, specs_of_json
from loramill.worker.models import fetch
from loramill.worker.registry import read_registry
from loramill.worker.settings import AdapterOptions
from loramill.worker.specs import AdapterSpec, locate, spec_of

COMMIT = "0123abcd" * 5
FILE = """
[adapters]
sql-v1 = "adapters/sql-v1"
sql-v2 = { path = "org/sql@main", scale = 0.5 }
[aliases]
query = "sql-v1"
sql = { sql-v1 = 0.9, sql-v2 = 0.1 }
[routes.task]
summary = "sql-v2"
"*" = "sql"
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("plain", "at@here", "star*2", "org/local", "org/pinned@main"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "folder", "scale"),
    [
        ("plain", "plain", 1.0),
        ("./plain", "plain", 1.0),
        ("plain*0.5", "plain", 0.5),
        ("plain*-2", "plain", -2.0),
        ("plain*1e-1", "plain", 0.1),
        ("at@here", "at@here", 1.0),
        ("at@here*3", "at@here", 3.0),
        ("star*2", "star*2", 1.0),
        ("star*2*2", "star*2", 2.0),
        ("org/local", "org/local", 1.0),
        ("org/pinned@main", "org/pinned@main", 1.0),
    ],
)
def test_what_exists_is_a_path(folders: Path, text: str, folder: str, scale: float) -> None:
    place = locate(spec_of(text))
    assert (place.folder, place.repository, place.scale) == (Path(folder), None, scale)


@pytest.mark.parametrize(
    ("text", "repository", "revision", "scale"),
    [
        ("org/name", "org/name", None, 1.0),
        ("org/name@v1.0", "org/name", "v1.0", 1.0),
        ("org/name@refs/pr/3*0.5", "org/name", "refs/pr/3", 0.5),
        ("org/name*2", "org/name", None, 2.0),
    ],
)
def test_what_has_the_form_of_a_hub_id_is_one(folders: Path, text: str, repository: str, revision: str, scale) -> None:
    place = locate(spec_of(text))
    assert (place.repository, place.revision, place.scale) == (repository, revision, scale)


@pytest.mark.parametrize(
    "text", ["./org/name", "../org/name", "/org/name", "~/name", "~nobody-at-all/x", "name", "a/b/c", "x" * 5000]
)
def test_what_can_only_be_a_path_never_asks_the_hub(folders: Path, text: str) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        locate(spec_of(text))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("plain*x", "'x' is not a scale: a number other than 0"),
        ("plain*0", "'0' is not a scale"),
        ("plain*nan", "'nan' is not a scale"),
        ("plain*inf", "'inf' is not a scale"),
        ("plain*1001", "'1001' is not a scale"),
        ({"path": "org/name@a", "revision": "b"}, "the revision is given twice"),
        ({"path": "plain", "revision": "b"}, "is a folder"),
        ({"path": "plain*2", "scale": 3}, "no such folder"),
        ({"path": "plain", "scale": True}, "True is not a scale"),
        ({"path": "plain", "scale": "2"}, "'2' is not a scale"),
        ({"path": 3}, "`path` must be"),
        ({"path": ""}, "`path` must be"),
        ({"path": "x", "revision": 3}, "`revision` must be"),
        ({"paht": "x"}, "an adapter is a path"),
        (3, "an adapter is a path"),
    ],
)
def test_specs_that_cannot_be(folders: Path, given: Any, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        locate(spec_of(given))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_form_of_a_spec() -> None:
    assert spec_of("a*2") == AdapterSpec("a*2")
    assert spec_of(Path("a")) == AdapterSpec("a")
    assert spec_of((Path("a"), 0.5)) == AdapterSpec("a", scale=0.5)
    assert spec_of({"path": "a/b", "revision": "v1", "scale": 2}) == AdapterSpec("a/b", "v1", 2)
    assert specs_of_json('{"x": "a", "y": {"path": "b"}}') == {"x": AdapterSpec("a"), "y": AdapterSpec("b")}


def test_toml_and_json_have_the_same_shape(tmp_path: Path) -> None:
    import tomllib

    (tmp_path / "a.toml").write_text(FILE)
    (tmp_path / "a.json").write_text(json.dumps(tomllib.loads(FILE)))
    file = read_adapters_file(tmp_path / "a.toml")
    assert file == read_adapters_file(tmp_path / "a.json")
    assert file.adapters["sql-v1"] == AdapterSpec("adapters/sql-v1", root=tmp_path)
    assert (file.adapters["sql-v2"].text, file.adapters["sql-v2"].scale) == ("org/sql@main", 0.5)
    assert file.aliases == {"query": {"sql-v1": 1.0}, "sql": {"sql-v1": 0.9, "sql-v2": 0.1}}
    assert file.routes == {"task": {"summary": "sql-v2", "*": "sql"}}
    (tmp_path / "adapters" / "sql-v1").mkdir(parents=True)
    assert locate(file.adapters["sql-v1"]).folder == tmp_path / "adapters" / "sql-v1", "relative to the file"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", "[adapter]\nx = 'y'", "unknown table 'adapter'; did you mean `adapters`?"),
        ("a.toml", "[adapters]\nx = 'y'\nx = 'z'", "a.toml: "),
        ("a.toml", "[adapters]\n'../x' = 'y'", "adapters.../x: '../x' is not an adapter name"),
        ("a.toml", "[adapters]\nx = 3", "adapters.x: an adapter is a path"),
        ("a.toml", "[aliases]\n'a b' = 'y'", "aliases.a b: 'a b' is not an adapter name"),
        ("a.toml", "[aliases]\nx = {}", "aliases.x: an alias is a name, or a split"),
        ("a.toml", "[aliases]\nx = {y = 'z'}", "aliases.x: the weight of 'y' must be a number"),
        ("a.toml", "[routes]\ntask = 'x'", "routes.task: a route is a table"),
        ("a.toml", "[routes.task]\nx = 3", "routes.task: a route is a table"),
        ("a.toml", "adapters = 3", "`adapters` must be a table"),
        ("a.json", "{", "a.json: "),
        ("a.json", "[]", "not an object"),
        ("a.json", '{"adapters": {"x": "y", "x": "z"}}', "'x' is given twice"),
        ("a.yaml", "", "name it .toml or .json"),
        ("b.toml", None, "b.toml: cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(Failure) as refused:
        read_registry(AdapterOptions(adapters_file=tmp_path / name))
    assert refused.value.code is ExitCode.INPUT
    (line,) = refused.value.lines
    assert line.startswith(f"--adapters-file {tmp_path / name}: ")
    assert says in line
    assert "\n" not in line


def test_all_sources_together_and_a_name_that_two_give(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[adapters]\nc = 'x'")
    (tmp_path / "many" / "d").mkdir(parents=True)
    (tmp_path / "many" / "d" / "adapter_config.json").touch()
    sources: dict[str, Any] = {
        "adapters": {"a": spec_of("x")}, "adapters_json": {"b": spec_of("x")},
        "adapters_file": tmp_path / "a.toml", "adapters_dir": tmp_path / "many",
    }  # fmt: skip
    registry = read_registry(AdapterOptions(**sources))
    assert list(registry.adapters) == ["a", "b", "c", "d"]
    assert [name for name, entry in registry.adapters.items() if not entry.given] == ["d"], "only found"
    said = {"a": "--adapter", "b": "--adapters", "c": "--adapters-file", "d": "--adapters-dir"}
    for name, source in said.items():
        other = "adapters_json" if name == "a" else "adapters"
        with pytest.raises(Failure) as refused:
            read_registry(AdapterOptions(**{**sources, other: {**sources[other], name: spec_of("y")}}))
        assert refused.value.code is ExitCode.USAGE
        (line,) = refused.value.lines
        assert source in line and f"both give adapter '{name}'" in line


@pytest.fixture
def cached(tiny_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds adapter `one` as `org/one`, at its main branch and at v1, and no network."""
    import huggingface_hub.constants as hub

    repository = tmp_path / "hub" / "models--org--one"
    (repository / "refs").mkdir(parents=True)
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(tiny_adapters / "one", snapshot)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_adapter_in_the_local_cache_needs_no_network(cached: Path) -> None:
    assert fetch(spec_of("org/one*0.5")) == (cached, 0.5)
    assert fetch(spec_of("org/one@v1")) == (cached, 1.0)
    assert fetch(spec_of({"path": "org/one", "revision": COMMIT})) == (cached, 1.0)


@pytest.mark.parametrize("text", ["org/two", "org/one@v2"])
def test_a_hub_adapter_that_is_missing_says_which_and_what_to_do(cached: Path, text: str) -> None:
    with pytest.raises(ValueError) as refused:
        fetch(spec_of(text))
    said = str(refused.value)
    name, _, revision = text.partition("@")
    assert f"{text} is not in the hub's local cache" in said
    assert f"hf download {name}" + (f" --revision {revision}" if revision else "") in said
    assert "\n" not in said
