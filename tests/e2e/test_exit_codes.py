"""Each row of the exit code table: one clear line, the right code, and nothing computed before what 2 and 4 name."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loramill.producer import local
from loramill.worker import loading
from loramill.worker.engine import Engine


@pytest.fixture
def no_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the weights must not be loaded")

    monkeypatch.setattr(loading, "Engine", refuse)


def one_line(ended, *says: str) -> None:
    assert ended.err.startswith("Error: ")
    assert ended.err.count("\n") == 1, ended.err
    for part in says:
        assert part in ended.err


def test_2_output_exists(desk, rows, no_compute) -> None:
    desk.write(rows(1))
    desk.output.write_text("precious")
    ended = desk.run()
    assert ended.code == 2
    one_line(ended, "out.jsonl exists", "--overwrite")
    assert desk.output.read_text() == "precious"
    assert desk.files() == {"out.jsonl"}


def test_2_error_file_exists(desk, rows, no_compute) -> None:
    desk.write(rows(1))
    desk.errors.write_text("precious")
    ended = desk.run()
    assert ended.code == 2
    one_line(ended, "out.errors.jsonl exists")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"output": "in.jsonl"}, "--input and --output are the same file"),
        ({"output": "./sub/../in.jsonl"}, "--input and --output"),
        ({"output": "link.jsonl"}, "--input and --output"),
        ({"output": "hard.jsonl"}, "--input and --output"),
        ({"errors": "in.jsonl"}, "--input and --errors"),
        ({"errors": "out.jsonl"}, "--output and --errors"),
        ({"errors": "out.jsonl.journal"}, "--errors and the journal"),
        ({"output": "-"}, "-o -"),
        ({"output": "sub"}, "not a regular file"),
    ],
)
def test_2_files_that_clash(desk, rows, no_compute, monkeypatch, flags: dict[str, str], says: str) -> None:
    desk.write(rows(1))
    (desk.folder / "sub").mkdir()
    (desk.folder / "link.jsonl").symlink_to("in.jsonl")
    os.link(desk.input, desk.folder / "hard.jsonl")
    monkeypatch.chdir(desk.folder)
    ended = desk.run("--overwrite", **{"input": "in.jsonl", "output": "out.jsonl", **flags})
    assert ended.code == 2
    one_line(ended, says)
    assert json.loads(desk.input.read_text())["id"] == "r0"


def test_2_the_same_adapter_name_twice(desk, rows, no_compute) -> None:
    desk.write(rows(1))
    ended = desk.run("--adapter", f"one={desk.adapters / 'two'}")
    assert ended.code == 2
    one_line(ended, "one", "--adapters-dir")


GOOD = {"id": "a", "prompt": "x", "max_tokens": 2}
CHAT = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('"text"', "not an object"),
        ({**CHAT, "url": "/v1/embeddings"}, "url"),
        ({**GOOD, "adapter": "onee"}, "did you mean `one`"),
        ({**GOOD, "max_tokens": -1}, "max_tokens"),
        ({**GOOD, "max_tokens": "3"}, "max_tokens"),
        ({**GOOD, "temperature": True}, "temperature"),
        ('{"id": "a", "prompt": "x", "temperature": NaN}', "NaN"),
        ('{"id": "a", "prompt": "\\ud800"}', "surrogate"),
        ({**GOOD, "max_tokens": 1000}, "256"),
        ({**GOOD, "tools": [{}]}, "`tools` is not supported"),
        ({**GOOD, "stream": True}, "`stream` is not supported"),
        ({**GOOD, "response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({**GOOD, "stop_token_ids": [9999]}, "stop_token_ids"),
        ({**GOOD, "prompt": [9999]}, "9999"),
    ],
)
def test_4_an_invalid_line_names_file_and_line(desk, no_compute, line: object, says: str) -> None:
    desk.write([{**GOOD, "id": "first"}, line])
    ended = desk.run()
    assert ended.code == 4
    assert f"{desk.input}:2: " in ended.err
    assert says in ended.err
    assert "1 of 2 lines are invalid" in ended.err
    assert not desk.files(), "nothing is left behind"


def test_4_duplicate_ids(desk, no_compute) -> None:
    desk.write([GOOD, {**GOOD, "id": "b"}, GOOD])
    ended = desk.run()
    assert ended.code == 4
    assert f"{desk.input}:3: custom_id: the same custom_id is on line 1" in ended.err


def test_4_a_line_over_the_cap(desk, no_compute) -> None:
    desk.write([{**GOOD, "prompt": "x" * (16 * 2**20)}])
    ended = desk.run()
    assert ended.code == 4
    assert "in.jsonl:1: " in ended.err
    assert "16 MiB" in ended.err


def test_4_all_invalid_lines_are_counted_and_the_first_hundred_shown(desk, rows, no_compute) -> None:
    desk.write([{**row, "top_p": 5} for row in rows(250)])
    ended = desk.run()
    assert ended.code == 4
    lines = ended.err.splitlines()
    assert len(lines) == 101
    assert lines[99].startswith(f"Error: {desk.input}:100: top_p: ")
    assert "250 of 250 lines are invalid (the first 100 are shown)" in lines[100]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b'{"id": "\xff"}\n', "UTF-8"),
        (b"\xff\xfe{\x00", "UTF-16"),
        (gzip.compress(b'{"id": "a", "prompt": "x"}\n')[:-4], "torn"),
        (b"\x1f\x8b garbage", "damaged"),
    ],
)
def test_4_an_input_that_cannot_be_used(desk, no_compute, content: bytes, says: str) -> None:
    desk.input.write_bytes(content)
    ended = desk.run()
    assert ended.code == 4
    assert str(desk.input) in ended.err
    assert says in ended.err


@pytest.mark.parametrize("path", ["absent.jsonl", "folder"])
def test_4_an_input_that_cannot_be_read(desk, no_compute, path: str) -> None:
    (desk.folder / "folder").mkdir()
    ended = desk.run(input=desk.folder / path)
    assert ended.code == 4
    one_line(ended, path, "cannot be read")


def test_4_a_base_that_is_not_there(desk, rows, no_compute) -> None:
    desk.write(rows(1))
    one_line(desk.run(base_model="/no/such/base"), "/no/such/base: no such folder")
    assert desk.run(base_model="/no/such/base").code == 4


def test_4_a_hub_id_that_cannot_be_had(desk, rows, no_compute, monkeypatch) -> None:
    desk.write(rows(1))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended = desk.run(base_model="no-such-org/no-such-model")
    assert ended.code == 4
    one_line(ended, "--base-model no-such-org/no-such-model")


def test_4_a_chat_row_without_a_template(desk, no_compute, tmp_path) -> None:
    base = shutil.copytree(desk.base, tmp_path / "plain")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    desk.write([{"id": "a", "messages": [{"role": "user", "content": "x"}]}])
    ended = desk.run(base_model=base)
    assert ended.code == 4
    assert "--chat-template" in ended.err


def test_4_a_chat_template_that_is_not_there(desk, rows, no_compute) -> None:
    desk.write(rows(1))
    ended = desk.run(chat_template="/no/such.jinja")
    assert ended.code == 4
    one_line(ended, "--chat-template /no/such.jinja")


@pytest.fixture
def broken(desk, tmp_path, make_adapter):
    """Makes a broken copy of adapter `one`."""

    def make(how: str) -> Path:
        folder = tmp_path / "broken"
        if how == "noop":
            return make_adapter(folder, noop=True)
        if how == "rank":
            return make_adapter(folder, rank=65)
        if how == "absent":
            return folder
        shutil.copytree(desk.adapters / "one", folder)
        weights = folder / "adapter_model.safetensors"
        if how == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif how == "pickled":
            weights.rename(folder / "adapter_model.bin")
        elif how == "config":
            (folder / "adapter_config.json").unlink()
        elif how == "nan":
            tensors = load_file(weights)
            next(iter(tensors.values()))[0, 0] = float("nan")
            save_file(tensors, weights)
        elif how == "code":
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.py"}}))
        elif how == "other base":
            config = json.loads((folder / "adapter_config.json").read_text())
            config["target_modules"] = ["c_attn"]
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


BROKEN = {
    "absent": "no such folder",
    "truncated": "adapter_model.safetensors",
    "pickled": "pickled",
    "config": "adapter_config.json",
    "other base": "base model",
    "rank": "--max-lora-rank",
    "noop": "--allow-noop-adapters",
    "nan": "tensors with NaN or infinite values",
    "code": "`auto_map` is set",
}


@pytest.mark.parametrize("how", BROKEN)
def test_4_an_adapter_that_cannot_be_served(desk, rows, no_compute, broken, how: str) -> None:
    desk.write(rows(1))
    ended = desk.run("--adapter", f"mine={broken(how)}", adapters_dir=None)
    assert ended.code == 4
    assert "Error: adapter `mine`: " in ended.err
    assert BROKEN[how] in ended.err
    assert not desk.journal.exists()


def test_4_an_adapter_of_the_hub_that_cannot_be_had(desk, rows, no_compute, monkeypatch) -> None:
    desk.write(rows(1))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended = desk.run("--adapter", "mine=no-such-org/no-such-adapter@v2*0.5")
    assert ended.code == 4
    one_line(ended, "adapter `mine`: ", "no-such-org/no-such-adapter@v2 is not in the hub's local cache", "hf download")


def test_4_the_input_changes_while_it_is_read(desk, rows, monkeypatch) -> None:
    desk.write(rows(8))
    make = local.LocalEngine.shard

    def late(self, *given, **named):
        with desk.input.open("a") as file:
            file.write("\n")
        return make(self, *given, **named)

    monkeypatch.setattr(local.LocalEngine, "shard", late)
    ended = desk.run("--quiet")
    assert ended.code == 4
    one_line(ended, "in.jsonl: the file changed while it was being read")
    assert not desk.output.exists()


def test_4_all_broken_adapters_at_once(desk, rows, no_compute, tmp_path) -> None:
    desk.write(rows(1))
    ended = desk.run("--adapter", f"x={tmp_path / 'nope'}", "--adapter", f"y={tmp_path}")
    assert ended.code == 4
    assert [line.split("`")[1] for line in ended.err.splitlines()] == ["x", "y"]


def test_a_broken_adapter_of_the_folder_matters_only_to_rows_that_name_it(desk, rows, broken, tmp_path) -> None:
    folder = shutil.copytree(desk.adapters, tmp_path / "many")
    broken("truncated").rename(folder / "torn")
    desk.write(rows(4))
    ended = desk.run(adapters_dir=folder)
    assert ended.code == 0
    assert "Warning: adapter `torn` cannot be served, no row names it: " in ended.err
    desk.write([{**row, "adapter": "torn"} for row in rows(1)])
    ended = desk.run("--overwrite", adapters_dir=folder)
    assert ended.code == 4
    assert "in.jsonl:1: model: adapter `torn` cannot be served: " in ended.err
    assert "1 of 1 lines are invalid" in ended.err


def test_3_rows_of_broken_adapters_are_skipped_and_the_others_go_on(desk, rows, broken, tmp_path) -> None:
    desk.write([*rows(4), {"id": "t", "adapter": "torn", "prompt": "x"}, {"id": "n", "adapter": "no", "prompt": "x"}])
    flags = ["--adapter", f"torn={broken('truncated')}", "--adapter", f"no={tmp_path / 'nowhere'}"]
    ended = desk.run("--on-invalid", "skip", *flags)
    assert ended.code == 3
    assert [result["custom_id"] for result in desk.results()] == ["r0", "r1", "r2", "r3"]
    errors = {error["custom_id"]: error["response"]["body"]["error"] for error in desk.results(desk.errors)}
    assert {error["code"] for error in errors.values()} == {"model_not_found"}
    assert "adapter `torn` cannot be served: " in errors["t"]["message"]
    assert "adapter_model.safetensors" in errors["t"]["message"]
    assert "nowhere: no such folder" in errors["n"]["message"]


def test_a_link_out_of_the_adapters_folder_is_not_followed(desk, rows, tmp_path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "out").symlink_to(desk.adapters / "one")
    desk.write([{**row, "adapter": "out"} for row in rows(1)])
    ended = desk.run(adapters_dir=folder)
    assert ended.code == 4
    assert "in.jsonl:1: model: adapter `out` cannot be served: " in ended.err
    assert "leads out of --adapters-dir" in ended.err


def test_nor_is_one_inside_an_adapter(desk, rows, tmp_path) -> None:
    folder = tmp_path / "many"
    (folder / "in").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(desk.adapters / "one" / name, folder / "in" / name)
    (folder / "in" / "adapter_model.safetensors").unlink()
    (folder / "in" / "adapter_model.safetensors").symlink_to(desk.adapters / "one" / "adapter_model.safetensors")
    desk.write([{**row, "adapter": "in"} for row in rows(1)])
    ended = desk.run(adapters_dir=folder)
    assert ended.code == 4
    assert "in/adapter_model.safetensors: the link leads out of --adapters-dir" in ended.err


def test_noop_adapters_run_when_allowed(desk, rows, broken) -> None:
    desk.write([{**row, "adapter": "mine"} for row in rows(1)])
    assert desk.run("--adapter", f"mine={broken('noop')}", "--allow-noop-adapters", adapters_dir=None).code == 0


def test_3_invalid_lines_skipped_and_0_when_failures_are_allowed(desk, rows) -> None:
    job = [*rows(3), "not json", {**GOOD, "id": "r0"}, {**GOOD, "max_tokens": 10**6, "id": "long"}]
    desk.write(job)
    ended = desk.run("--on-invalid", "skip", "--json")
    assert ended.code == 3
    assert [result["custom_id"] for result in desk.results()] == ["r0", "r1", "r2"]
    errors = desk.results(desk.errors)
    assert [error["custom_id"] for error in errors] == [None, "r0", "long"]
    assert [error["response"]["body"]["error"]["code"] for error in errors] == [
        "invalid_json_line", "duplicate_custom_id", "token_limit_exceeded",
    ]  # fmt: skip
    assert "line 4: " in errors[0]["response"]["body"]["error"]["message"]
    assert (ended.summary["rows"], ended.summary["failed"], ended.summary["invalid"]) == (6, 3, 3)
    assert ended.summary["errors"] == str(desk.errors)
    assert desk.run("--on-invalid", "skip", "--overwrite", "--allow-failures").code == 0


def test_3_even_if_every_line_is_invalid(desk, no_compute) -> None:
    desk.write(["x", "y"])
    assert desk.run("--on-invalid", "skip").code == 3
    assert desk.output.read_bytes() == b""
    assert len(desk.results(desk.errors)) == 2
    assert desk.files() == {"out.jsonl", "out.errors.jsonl"}


def test_an_error_file_of_an_earlier_run_goes_with_overwrite(desk, rows) -> None:
    desk.write(["x", *rows(1)])
    assert desk.run("--on-invalid", "skip").code == 3
    assert desk.errors.exists()
    desk.write(rows(1))
    assert desk.run("--on-invalid", "skip", "--overwrite").code == 0
    assert not desk.errors.exists()


def test_1_the_output_folder_is_not_there(desk, rows, no_compute) -> None:
    desk.write(rows(1))
    ended = desk.run(output=desk.folder / "no" / "out.jsonl")
    assert ended.code == 1
    one_line(ended, "does not exist")


def test_1_the_output_folder_cannot_be_written(desk, rows, no_compute, monkeypatch) -> None:
    desk.write(rows(1))
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write everywhere
    ended = desk.run()
    assert ended.code == 1
    one_line(ended, "cannot be written")


def give_up(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The engine fails in its thirteenth step."""
    step, steps = Engine.step, iter(range(12))

    def torn(self, on_start):
        if next(steps, None) is None:
            raise error
        return step(self, on_start)

    monkeypatch.setattr(Engine, "step", torn)


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nlong\ntext"), "--kv-cache-memory"),
        (RuntimeError("CUDA error: device-side assert\nmore"), "the device failed: CUDA error: device-side assert;"),
    ],
)
def test_1_out_of_memory_or_device_lost_keeps_what_is_done(desk, rows, monkeypatch, error, says: str) -> None:
    desk.write(rows(40))
    with monkeypatch.context() as patched:
        give_up(patched, error)
        ended = desk.run("--quiet", max_num_seqs=4)
    assert ended.code == 1
    one_line(ended, says, "the same command resumes")
    assert not desk.output.exists()
    assert desk.journal.exists()
    again = desk.run("--quiet", "--json", max_num_seqs=4)
    assert again.code == 0
    assert again.summary["resumed"] >= 4
    assert [result["custom_id"] for result in desk.results()] == [f"r{number}" for number in range(40)]
