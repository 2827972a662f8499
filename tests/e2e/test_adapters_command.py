"""`loramill adapters list | inspect | verify` on real folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loramill.producer.cli import main
from loramill.worker.engine import Engine

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def adapters(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `loramill adapters ...`: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["adapters", *map(str, arguments)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_list_needs_no_base(adapters: Run, tiny_adapters: Path) -> None:
    code, out, err = adapters("list", "--adapters-dir", tiny_adapters, "--json")
    cards = [json.loads(line) for line in out.splitlines()]
    assert (code, err, [card["name"] for card in cards]) == (0, "", ["one", "three", "two"])
    one = cards[0]
    assert (one["ranks"], one["alpha"], sorted(one["targets"])) == ([4], 64, ["down_proj", "q_proj", "v_proj"])
    saved = load_file(tiny_adapters / "one" / "adapter_model.safetensors")
    assert one["bytes"] == sum(tensor.nbytes for tensor in saved.values())
    assert one["modules"]["count"] == len(one["modules"]["names"]) == 6
    assert "model.layers.0.self_attn.q_proj" in one["modules"]["names"]
    assert (one["fits"], one["problems"], one["static_only"]) == (None, [], [])
    code, out, _ = adapters("list", "--adapters-dir", tiny_adapters, "--adapter", f"half={tiny_adapters / 'one'}*0.5")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["half", "one", "three", "two"]
    assert "scale 0.5" in out.splitlines()[0]


def test_inspect_with_a_base_says_the_hash_that_results_name(
    adapters: Run, desk, tiny_adapters: Path, make_adapter, tmp_path: Path
) -> None:
    code, out, _ = adapters("inspect", "one", "--adapters-dir", tiny_adapters, "--base-model", desk.base, "--json")
    card = json.loads(out)
    assert (code, card["fits"]) == (0, True)
    desk.write([{"id": "a", "prompt": "x", "adapter": "one", "max_tokens": 1}])
    desk.run()
    assert desk.results()[0]["response"]["body"]["loramill"]["adapter_sha256"] == card["sha256"]
    big = make_adapter(tmp_path / "big", rank=65)
    code, out, _ = adapters("inspect", "big", "--adapter", f"big={big}", "--base-model", desk.base)
    assert code == 4
    assert "fits:        False" in out
    assert "rank 65 is over the limit of 64" in out


def test_inspect_names_every_module_that_changes(adapters: Run, desk, make_adapter, tmp_path: Path) -> None:
    saved = make_adapter(tmp_path / "saved", modules_to_save=["norm"])
    code, out, _ = adapters("inspect", "saved", "--adapter", f"saved={saved}", "--base-model", desk.base, "--json")
    card = json.loads(out)
    assert code == 0
    assert card["static_only"][0].startswith("modules_to_save: model.layers.0.input_layernorm")
    assert card["modules"]["count"] == len(card["modules"]["names"]) == 6 + 5  # PEFT saves all whose names end so
    assert {"model.norm", "model.layers.0.self_attn.q_proj"} <= set(card["modules"]["names"])


def test_what_cannot_be_read_is_said_beside_the_others(adapters: Run, tiny_adapters: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(tiny_adapters / "one", tmp_path / "torn")
    (torn / "adapter_model.safetensors").write_bytes(b"12345678900")
    bare = shutil.copytree(tiny_adapters / "one", tmp_path / "bare")
    (bare / "adapter_config.json").unlink()
    given = [part for name in ("torn", "bare", "none") for part in ("--adapter", f"{name}={tmp_path / name}")]
    code, out, err = adapters("list", *given, "--adapters-dir", tiny_adapters, "--json")
    cards = {card["name"]: card for card in map(json.loads, out.splitlines())}
    assert (code, err) == (4, "")
    assert cards["one"]["problems"] == []
    assert "damaged or cut short" in cards["torn"]["problems"][0]
    assert "no adapter_config.json in this folder" in cards["bare"]["problems"][0]
    assert "no such folder" in cards["none"]["problems"][0]


def test_no_adapters_no_base_and_unknown_names_are_usage_errors(adapters: Run, desk) -> None:
    some = ["--adapters-dir", desk.adapters]
    for arguments, says in (
        (["list"], "no adapters: give --adapter"),
        (["inspect", "one"], "no adapters: give --adapter"),
        (["inspect", "onee", *some], "no adapter is named `onee`; did you mean `one`?"),
        (["verify", *some], "'--base-model'"),
        (["verify", "onee", *some, "--base-model", desk.base], "did you mean `one`?"),
        (["verify", *some, "--base-model", desk.base, "--prompt", "x" * 300], "--prompt: it is longer"),
    ):
        code, out, err = adapters(*arguments)
        assert (code, out) == (2, ""), err
        assert says in err


def test_verify_holds_each_adapter_against_the_base_and_peft(adapters: Run, desk, tmp_path: Path, make_adapter) -> None:
    noop = make_adapter(tmp_path / "noop", noop=True)
    shared = ["--adapters-dir", desk.adapters, "--base-model", desk.base, "--device", "cpu"]
    code, out, err = adapters("verify", *shared, "--json", "--prompt", "hello")
    verdicts = [json.loads(line) for line in out.splitlines()]
    assert (code, [verdict["name"] for verdict in verdicts]) == (0, ["one", "three", "two"]), err
    for verdict in verdicts:
        assert verdict["largest_logit_change"] > 0.01
        assert verdict["peft_difference"] < 1e-4
        assert verdict["agrees"] is True
        assert isinstance(verdict["greedy_changes"], bool)
    code, out, _ = adapters("verify", "two", *shared)
    assert code == 0
    assert out.startswith("two: largest logit change ")
    code, out, _ = adapters("verify", "noop", *shared, "--adapter", f"noop={noop}")
    assert code == 4
    assert "it would change nothing" in out
    assert adapters("verify", "noop", *shared, "--adapter", f"noop={noop}", "--allow-noop-adapters")[0] == 0


def test_verify_tells_when_the_engine_computes_something_else(adapters: Run, desk, monkeypatch) -> None:
    compute = Engine.next_logits

    def wrong(self: Engine, prompt: list[int], mix=(), *, merged: bool = False) -> torch.Tensor:
        logits = compute(self, prompt, mix, merged=merged)
        return logits + (torch.arange(len(logits)) == 7) if mix else logits

    monkeypatch.setattr(Engine, "next_logits", wrong)
    code, out, _ = adapters("verify", "one", "--adapters-dir", desk.adapters, "--base-model", desk.base)
    assert code == 3
    assert out.endswith("DISAGREES\n")
    monkeypatch.setattr(Engine, "next_logits", lambda self, prompt, mix=(), *, merged=False: compute(self, prompt))
    code, out, _ = adapters("verify", "one", "--adapters-dir", desk.adapters, "--base-model", desk.base, "--json")
    assert (code, json.loads(out)["agrees"], json.loads(out)["largest_logit_change"]) == (3, False, 0.0)
