"""Where a base model comes from, and the tokenizer and templates beside it."""

import json
import shutil
from pathlib import Path

import pytest

from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.base_files import adapter_template, base_name_of, locate_base, tokenizer_sha256


@pytest.fixture
def offline_cache(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds tiny_base as `org/tiny`, and no network."""
    import huggingface_hub.constants as hub

    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    snapshot = repository / "snapshots" / "0123abcd"
    shutil.copytree(tiny_base, snapshot)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_folder_is_taken_as_it_is(tiny_base: Path) -> None:
    assert locate_base(str(tiny_base)) == tiny_base


def test_a_hub_id_in_the_local_cache_needs_no_network(offline_cache: Path) -> None:
    assert locate_base("org/tiny") == offline_cache


@pytest.mark.parametrize("written", ["org/absent", "absent"])
def test_a_hub_id_that_is_not_to_be_had_is_one_line(offline_cache: Path, written: str) -> None:
    with pytest.raises(Failure) as refused:
        locate_base(written)
    assert refused.value.code is ExitCode.INPUT
    (line,) = refused.value.lines
    assert line.startswith(f"--base-model {written}: no such folder, and {written} is not in the hub's local cache")
    assert "\n" not in line


@pytest.mark.parametrize("written", ["/no/such", "./no", "a/b/c", "../x"])
def test_what_can_only_be_a_path_never_asks_the_hub(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(Failure, match="no such folder"):
        locate_base(written)


def test_only_safetensors_configs_and_tokenizers_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return "/cache"

    monkeypatch.setattr("transformers.utils.hub.snapshot_download", download)
    assert locate_base("org/name") == Path("/cache")
    assert set(asked["org/name"]) == {"*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"}


@pytest.mark.parametrize(
    ("written", "name"), [("org/Qwen3-8B", "Qwen3-8B"), ("/models/base/", "base"), ("tiny", "tiny")]
)
def test_the_bases_name_is_the_last_part(written: str, name: str) -> None:
    assert base_name_of(written) == name


def test_the_bases_name_of_a_dot_is_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert base_name_of(".") == tmp_path.name


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"chat_template.jinja": "own"}, "own"),
        ({"tokenizer_config.json": json.dumps({"chat_template": "own"})}, "own"),
        ({"tokenizer_config.json": json.dumps({"model_max_length": 5})}, None),
        (
            {"tokenizer_config.json": json.dumps({"chat_template": [
                {"name": "tool_use", "template": "x"}, {"name": "default", "template": "own"},
            ]})},
            "own",
        ),
        ({"chat_template.jinja": "new", "tokenizer_config.json": json.dumps({"chat_template": "old"})}, "new"),
    ],
)  # fmt: skip
def test_an_adapters_own_chat_template(tmp_path: Path, files: dict[str, str], template: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert adapter_template(tmp_path) == template


def test_an_adapters_template_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="its chat template cannot be read"):
        adapter_template(tmp_path)


def test_the_tokenizers_hash_follows_its_files_and_no_others(tiny_base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_base, tmp_path / "copy")
    before = tokenizer_sha256(copy)
    assert before == tokenizer_sha256(tiny_base)
    (copy / "README.md").write_text("x")
    assert tokenizer_sha256(copy) == before
    (copy / "chat_template.jinja").write_text("another")
    assert tokenizer_sha256(copy) != before
