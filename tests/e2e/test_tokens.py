"""Adapters whose training added tokens: their rows are written and read with the tokenizer beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from loramill import Mill
from loramill.producer.cli import main
from tests.worker.merging import peft_model

TOOL, END, SIZE = 258, 259, 262
A = 32  # the byte tokenizer's `A`
PROMPT = "use <tool> now"


@pytest.fixture(scope="module")
def grown(make_grown: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grown(tmp_path_factory.mktemp("grown") / "g")


def row(name: str, adapter: str | None = "g", **fields: Any) -> dict[str, Any]:
    prompt = {} if "messages" in fields else {"prompt": PROMPT}
    shared = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"id": name, "adapter": adapter, **prompt, **shared, **fields}


def bodies(desk: Any) -> dict[str, dict[str, Any]]:
    return {line["custom_id"]: line["response"]["body"] for line in desk.results()}


@torch.no_grad()
def greedy(model: Any, prompt: list[int], bias: dict[str, float], count: int = 8) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        last = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        for token, add in bias.items():
            last[int(token)] += add
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}], ids=["q", "ends"])
def test_rows_of_it_are_pefts_beside_rows_of_others(
    desk: Any, make_grown: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    grown = make_grown(tmp_path / "g", **settings)
    chat = [{"role": "user", "content": "a <tool>"}]
    some = {str(TOOL): 1.5}
    rows = [
        row("text"),
        row("biased", logit_bias=some),
        row("chat", messages=chat, logit_bias=some),
        row("ids", prompt=[5, TOOL, SIZE - 1]),
        row("base", None),
        row("one", "one"),
        row("two", "two", messages=chat),
    ]
    desk.write(rows)
    alone = [each for each in rows if each["adapter"] != "g"]
    ended = desk.run("--adapter", f"g={grown}", "--lora-mode", "dynamic")
    assert (ended.code, "Warning" in ended.err) == (0, False), ended.err
    answers = bodies(desk)
    tokenizer = AutoTokenizer.from_pretrained(grown)
    assert tokenizer.convert_tokens_to_ids(["<tool>", "<end>"]) == [TOOL, END]
    rendered = "<s>user: a <tool>\nassistant: "  # by the base's template
    prompts = {name: tokenizer(PROMPT)["input_ids"] for name in ("text", "biased")}
    prompts |= {"chat": tokenizer(rendered, add_special_tokens=False)["input_ids"], "ids": [5, TOOL, SIZE - 1]}
    model = peft_model(desk.base, grown, grow_to=SIZE)
    for name, prompt in prompts.items():
        assert TOOL in prompt
        expected = greedy(model, prompt, some if name in ("biased", "chat") else {})
        (choice,) = answers[name]["choices"]
        assert choice["token_ids"] == expected, name
        text = choice["message"]["content"] if name == "chat" else choice["text"]
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answers[name]["usage"]["prompt_tokens"] == len(prompt)
        assert answers[name]["loramill"]["mode"] == "static"
    assert answers["base"]["usage"]["prompt_tokens"] == 1 + len(PROMPT)
    desk.write(alone)
    assert desk.run("--overwrite").code == 0
    for name, body in bodies(desk).items():
        assert body["choices"] == answers[name]["choices"]


def test_the_added_token_in_answers_stop_strings_and_log_probabilities(desk: Any, grown: Path) -> None:
    # Its own frequency brings each of the two tokens down in turn.
    both = {"logit_bias": {str(A): 100, str(TOOL): 92}, "frequency_penalty": 2, "max_tokens": 16}
    desk.write([
        row("free", **both),
        row("stopped", **both, stop="<tool>", logprobs=2),
        row("stopped inside", **both, stop=["ol>"]),
        row("by id", **both, stop_token_ids=[TOOL]),
        row("shown", logit_bias={str(TOOL): 100}, logprobs=1, max_tokens=2),
        row("base", None, **both | {"logit_bias": {str(A): 100}}, stop="<tool>"),
    ])  # fmt: skip
    ended = desk.run("--adapter", f"g={grown}")
    assert ended.code == 0, ended.err
    answers = {name: body["choices"][0] for name, body in bodies(desk).items()}
    free = answers["free"]["text"]
    before = free.partition("<tool>")[0]
    assert before.startswith("A") and "<tool>" in free, free
    assert (answers["stopped"]["text"], answers["stopped"]["finish_reason"]) == (before, "stop")
    assert answers["stopped"]["token_ids"][-1] == TOOL
    assert answers["stopped"]["logprobs"]["tokens"] == list(before)
    assert answers["stopped inside"]["text"] == before + "<to"
    assert answers["by id"]["text"] == before
    assert answers["shown"]["text"] == "<tool><tool>"
    assert answers["shown"]["logprobs"]["tokens"] == ["<tool>", "<tool>"]
    assert answers["base"]["finish_reason"] == "length"


def test_its_own_end_of_sequence_ends_its_answers(desk: Any, grown: Path) -> None:
    end = {"logit_bias": {str(END): 100}, "max_tokens": 4}
    desk.write([row("ends", **end, ignore_eos=False), row("goes on", **end)])
    assert desk.run("--adapter", f"g={grown}").code == 0
    ends, goes_on = (bodies(desk)[name]["choices"][0] for name in ("ends", "goes on"))
    assert (ends["token_ids"], ends["text"], ends["finish_reason"]) == ([END], "", "stop")
    assert (goes_on["token_ids"], goes_on["finish_reason"]) == ([END] * 4, "length")


def test_the_chat_template_beside_it_else_the_given_else_the_bases(
    desk: Any, make_grown: Callable[..., Path], grown: Path, tmp_path: Path
) -> None:
    own = make_grown(tmp_path / "own", template="<tool>{{ messages[0].content }}")
    (tmp_path / "given.jinja").write_text("{{ messages[0].content }}<tool><tool>")
    chat = [{"role": "user", "content": "x"}]
    desk.write([row("own", "own", messages=chat), row("other", messages=chat)])
    flags = ("--adapter", f"own={own}", "--adapter", f"g={grown}")
    counts = []
    for more in ((), ("--overwrite", "--chat-template", tmp_path / "given.jinja")):
        assert desk.run(*flags, *more).code == 0
        counts.append([bodies(desk)[name]["usage"]["prompt_tokens"] for name in ("own", "other")])
    assert counts == [[2, 1 + len("user: x\nassistant: ")], [2, 3]]


def test_ids_are_bounded_by_the_adapters_vocabulary(desk: Any, grown: Path) -> None:
    desk.write([
        row("prompt", prompt=[1, SIZE]),
        row("bias", logit_bias={str(SIZE): 1}),
        row("stop", stop_token_ids=[SIZE]),
        row("base", None, prompt=[1, TOOL]),
        row("one", "one", logit_bias={str(TOOL): 1}),
        row("fine", prompt=[1, SIZE - 1], logit_bias={str(SIZE - 1): 1}, stop_token_ids=[SIZE - 1]),
    ])  # fmt: skip
    ended = desk.run("--adapter", f"g={grown}")
    assert ended.code == 4
    said = [line.partition("in.jsonl:")[2] for line in ended.err.splitlines()[:5]]
    assert [(line.split(":")[0], line.split()[-1]) for line in said] == [
        ("1", "262"), ("2", "262"), ("3", "262"), ("4", "258"), ("5", "258"),
    ]  # fmt: skip
    assert "5 of 6 lines are invalid" in ended.err


def test_without_a_tokenizer_that_fits_it_is_refused(
    desk: Any, make_grown: Callable[..., Path], grown: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(grown, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    short = make_grown(tmp_path / "short", size=259)
    torn = shutil.copytree(grown, tmp_path / "torn")
    (torn / "tokenizer.json").write_text("{")
    desk.write([row("x", None)])
    ended = desk.run(*(part for path in (bare, short, torn) for part in ("--adapter", f"{path.name}={path}")))
    assert ended.code == 4
    missing, small, broken = ended.err.splitlines()
    assert missing.startswith("Error: adapter `bare`: ")
    assert missing.endswith(
        "its vocabulary was grown to 262 tokens and it brings no tokenizer: save the tokenizer beside it"
    )
    assert small.endswith("its vocabulary was grown to 259 tokens, and its tokenizer has token id 259")
    assert "torn: the tokenizer cannot be loaded: " in broken
    with pytest.raises(ValueError, match=r"adapter `bare`: .* brings no tokenizer"):
        Mill(desk.base, {"bare": bare})


def test_a_tokenizer_that_is_not_used_is_said_in_one_line(desk: Any, grown: Path, tmp_path: Path) -> None:
    adapters = shutil.copytree(desk.adapters, tmp_path / "with")
    for name in ("one", "two"):
        shutil.copy(grown / "tokenizer.json", adapters / name)
    shutil.copy(desk.base / "tokenizer.json", adapters / "three")
    desk.write([row("x", "one", ignore_eos=False)])
    ended = desk.run(adapters_dir=adapters)
    assert ended.code == 0
    assert [line for line in ended.err.splitlines() if line.startswith("Warning")] == [
        "Warning: adapter `one` (and 1 others): the tokenizer beside it has added tokens (`<tool>`, `<end>`) and its "
        "embedding did not grow; the base's is used"
    ]
    assert bodies(desk)["x"]["usage"]["prompt_tokens"] == 1 + len(PROMPT)
    assert "Warning" not in desk.run("--overwrite", "--quiet", adapters_dir=adapters).err


def test_verify_compares_the_bases_columns_and_peft(desk: Any, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--adapters-dir", str(desk.adapters), "--adapter", f"g={grown}", "--base-model", str(desk.base)]
    with pytest.raises(SystemExit) as ended:
        main(["adapters", "verify", "--json", "--device", "cpu", *flags])
    verdicts = {verdict["name"]: verdict for verdict in map(json.loads, capsys.readouterr().out.splitlines())}
    assert (ended.value.code or 0, sorted(verdicts)) == (0, ["g", "one", "three", "two"])
    for verdict in verdicts.values():
        assert verdict["peft_difference"] < 1e-4
        assert verdict["largest_logit_change"] > 0.01


def test_the_python_api_takes_them_as_they_come(desk: Any, grown: Path, tmp_path: Path, capsys: Any) -> None:
    bias = {str(TOOL): 100}
    desk.write([row("x", logit_bias=bias), row("y")])
    assert desk.run("--adapter", f"g={grown}").code == 0
    expected = [bodies(desk)[name]["choices"][0]["token_ids"] for name in "xy"]
    with Mill(desk.base, {"one": desk.adapters / "one"}, dtype="float32", device="cpu") as mill:
        mill.add_adapter("g", grown)
        old = mill.run([row("x", logit_bias=bias), row("y")])
        # The same weights, and `<tool>` is written otherwise: rows keep the tokenizer that they were checked with.
        other = shutil.copytree(grown, tmp_path / "other")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (other / file).write_text((other / file).read_text().replace("<tool>", "<TOOL>"))
        mill.replace_adapter("g", other)
        new = mill.run([row("x", logit_bias=bias, stop="TOOL")])
        results = list(old)
        assert [result.token_ids for result in results] == expected
        assert results[0].text == "<tool>" * 8
        (result,) = new
        assert result.text == "<"
        copied = shutil.copytree(desk.adapters / "one", tmp_path / "copied")
        shutil.copy(grown / "tokenizer.json", copied)
        capsys.readouterr()
        mill.add_adapter("copied", copied)
        assert "Warning: adapter `copied`: the tokenizer beside it has added tokens" in capsys.readouterr().err
