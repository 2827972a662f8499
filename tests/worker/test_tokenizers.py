"""Tokenizers beside adapters: loaded once, held against the base's only where they differ."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.prompt import Limits
from loramill.worker.tokenizers import Tokenizers


@pytest.fixture
def tokenizers(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizers:
    monkeypatch.setattr(Tokenizers, "loads", [], raising=False)
    load = Tokenizers._load

    def counted(self: Tokenizers, folder: Path):
        Tokenizers.loads.append(folder.name)
        return load(self, folder)

    monkeypatch.setattr(Tokenizers, "_load", counted)
    return Tokenizers(tiny_base, Limits(256, 258), None)


@pytest.fixture
def beside(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with the base's tokenizer, the vocabulary changed by `change`."""

    def make(name: str, change: Callable[[dict], object] = lambda saved: None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        saved = json.loads((tiny_base / "tokenizer.json").read_text())
        change(saved)
        (folder / "tokenizer.json").write_text(json.dumps(saved))
        return folder

    return make


def swapped(saved: dict) -> None:
    vocab = saved["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def added(*tokens: str) -> Callable[[dict], object]:
    def change(saved: dict) -> None:
        last = saved["added_tokens"][-1]
        saved["added_tokens"] += [
            last | {"content": token, "id": last["id"] + 1 + at, "special": False} for at, token in enumerate(tokens)
        ]

    return change


def test_a_copy_of_the_bases_is_told_by_its_bytes(tokenizers: Tokenizers, tiny_base: Path, tmp_path: Path) -> None:
    assert tokenizers.ignored(tmp_path) is None
    shutil.copy(tiny_base / "tokenizer.json", tmp_path)
    assert tokenizers.ignored(tmp_path) is None
    assert tokenizers.loads == []


def test_what_differs_is_said_and_looked_at_once(tokenizers: Tokenizers, beside: Callable[..., Path]) -> None:
    assert tokenizers.ignored(beside("same")) is None, "written otherwise, and the same"
    for name in ("swapped", "twin"):
        assert "has another vocabulary; the base's is used" in str(tokenizers.ignored(beside(name, swapped)))
    said = tokenizers.ignored(beside("added", added("<1>", "<2>", "<3>", "<4>")))
    assert "added tokens (`<1>`, `<2>`, `<3>`, ...) and its embedding did not grow" in str(said)
    assert sorted(tokenizers.loads) == ["added", "same", "swapped", "tiny-base"]
    broken = beside("broken")
    (broken / "tokenizer.json").write_text("{")
    assert "broken: the tokenizer cannot be loaded" in str(tokenizers.ignored(broken))


def test_copies_are_one_tokenizer_that_goes_with_its_last_adapter(
    tokenizers: Tokenizers, beside: Callable[..., Path]
) -> None:
    one, other = beside("one", added("<1>")), beside("other", added("<1>"))
    prompter = tokenizers.own(one, 260)
    assert tokenizers.own(other, 260) is prompter
    assert tokenizers.own(other, 264) is not prompter
    assert prompter.limits == Limits(256, 260)
    del prompter
    gc.collect()
    assert len(tokenizers._own) == 0


def test_a_base_without_a_tokenizer_ends_it_all(tmp_path: Path, tiny_base: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(Failure, match="the tokenizer cannot be loaded") as refused:
        _ = Tokenizers(tmp_path, Limits(256, 258), None).base
    assert refused.value.code is ExitCode.INPUT
