"""Flags, environment variables and usage errors of the command line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from loramill.producer import cli
from loramill.producer.options import RunOptions
from loramill.worker.specs import AdapterSpec

REQUIRED = ["--input", "in.jsonl", "--output", "out.jsonl", "--base-model", "base"]
OPTIONS = [option for option in cli.run.params if isinstance(option, click.Option)]
# What each flag is set to, and what must arrive.
VALUES = {
    "--input": ("other.jsonl", "other.jsonl"),
    "--output": ("other.out", Path("other.out")),
    "--base-model": ("org/name", "org/name"),
    "--base-name": ("b", "b"),
    "--adapter": ("sql=a b/c", {"sql": AdapterSpec("a b/c")}),
    "--adapters": ('{"sql": "a b/c"}', {"sql": AdapterSpec("a b/c")}),
    "--adapters-file": ("a.toml", Path("a.toml")),
    "--adapters-dir": ("dir", Path("dir")),
    "--allow-noop-adapters": ("1", True),
    "--errors": ("bad.jsonl", Path("bad.jsonl")),
    "--max-loras-per-batch": ("3", 3),
    "--max-loaded-loras": ("40", 40),
    "--lora-host-bytes": ("1GiB", 2**30),
    "--lora-eviction-policy": ("lru", "lru"),
    "--pin": ("a,b", ("a", "b")),
    "--preload": ("1", True),
    "--lora-mode": ("static", "static"),
    "--order": ("input", "input"),
    "--explain": ("1", True),
    "--max-num-seqs": ("5", 5),
    "--max-num-batched-tokens": ("77", 77),
    "--max-model-len": ("99", 99),
    "--max-lora-rank": ("16", 16),
    "--dtype": ("float32", "float32"),
    "--device": ("cpu", "cpu"),
    "--devices": ("cpu,cpu", "cpu,cpu"),
    "--kv-cache-memory": ("4GiB", 4 * 2**30),
    "--no-prefix-sharing": ("1", True),
    "--chat-template": ("t.jinja", Path("t.jinja")),
    "--limit": ("10", 10),
    "--seed": ("18446744073709551615", 2**64 - 1),
    "--on-invalid": ("skip", "skip"),
    "--no-dedupe": ("1", True),
    "--overwrite": ("true", True),
    "--allow-failures": ("yes", True),
    "--json": ("on", True),
    "--quiet": ("1", True),
}


def long_flag(option: click.Option) -> str:
    return next(name for name in option.opts if name.startswith("--"))


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], RunOptions]:
    """What the command line comes to."""
    for option in OPTIONS:
        monkeypatch.delenv(str(option.envvar), raising=False)

    def parse(arguments: list[str]) -> RunOptions:
        context = cli.run.make_context("run", list(arguments))
        return RunOptions(**context.params)

    return parse


def test_the_table_above_has_every_flag() -> None:
    assert {long_flag(option) for option in OPTIONS} == set(VALUES)


@pytest.mark.parametrize("flag", VALUES)
def test_each_flag_and_its_environment_variable_set_the_same(parsed, monkeypatch, flag: str) -> None:
    option = next(option for option in OPTIONS if long_flag(option) == flag)
    written, wanted = VALUES[flag]
    variable = "LORAMILL_" + flag.removeprefix("--").upper().replace("-", "_")
    assert option.envvar == variable
    field = str(option.name)
    start = REQUIRED.index(flag) if flag in REQUIRED else len(REQUIRED)
    others = REQUIRED[:start] + REQUIRED[start + 2 :]
    by_flag = parsed([*others, flag, *([] if option.is_flag else [written])])
    monkeypatch.setenv(variable, written)
    by_variable = parsed(others)
    assert getattr(by_flag, field) == getattr(by_variable, field) == wanted


def test_help_shows_every_flag_with_its_variable() -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from loramill.producer.cli import main; main(['run', '--help'])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for flag in VALUES:
        assert flag in shown.stdout
        assert "LORAMILL_" + flag[2:].upper().replace("-", "_") in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "transformers", "pydantic"}, "--help must not wait for these"


def test_the_short_flags(parsed) -> None:
    options = parsed(["-i", "-", "-o", "x.jsonl", "--base-model", "b"])
    assert (options.input, options.output) == ("-", Path("x.jsonl"))


def test_several_adapters_from_one_variable(parsed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_ADAPTER", "a=/x y/1,b=/2")
    assert parsed(REQUIRED).adapters == {"a": AdapterSpec("/x y/1"), "b": AdapterSpec("/2")}


@pytest.mark.parametrize(
    ("written", "size"),
    [("auto", None), ("1000", 1000), ("512MB", 512 * 10**6), ("1.5GiB", 3 * 2**29), ("2k", 2000), ("1 TiB", 2**40)],
)
def test_sizes(parsed, written: str, size: int | None) -> None:
    assert parsed([*REQUIRED, "--kv-cache-memory", written]).kv_cache_memory == size


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("out.jsonl", "out.errors.jsonl"),
        ("a.b/out.jsonl.gz", "a.b/out.errors.jsonl.gz"),
        ("out.jsonl.zst", "out.errors.jsonl.zst"),
        ("out.txt", "out.errors.txt"),
        ("out", "out.errors"),
    ],
)
def test_where_failed_rows_go(parsed, output: str, errors: str) -> None:
    assert parsed(["-i", "x", "-o", output, "--base-model", "b"]).errors_path == Path(errors)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "'-i' / '--input'"),
        (["--no-such-flag"], "No such option"),
        ([*REQUIRED, "--adapter", "sql"], "'sql' is not NAME=PATH"),
        ([*REQUIRED, "--adapter", "sql="], "'sql=' is not NAME=PATH"),
        ([*REQUIRED, "--adapters", "[]"], "not an object"),
        ([*REQUIRED, "--adapters", '{"a": 1}'], "adapters.a: an adapter is a path"),
        ([*REQUIRED, "--adapters", '{"a": "x", "a": "y"}'], "'a' is given twice"),
        ([*REQUIRED, "--adapters", '{"a": {"path": "x", "scale": 0}}'], "0 is not a scale"),
        ([*REQUIRED, "--adapters", '{"a": {"path": "x", "rev": "m"}}'], "unknown key 'rev'"),
        ([*REQUIRED, "--adapter", "../x=y"], "not an adapter name"),
        ([*REQUIRED, "--adapter", "a" * 65 + "=y"], "not an adapter name"),
        ([*REQUIRED, "--adapter", "a=x", "--adapter", "a=y"], "given twice"),
        ([*REQUIRED, "--max-num-seqs", "0"], "not in the range"),
        ([*REQUIRED, "--limit", "0"], "not in the range"),
        ([*REQUIRED, "--limit", "many"], "not a valid integer"),
        ([*REQUIRED, "--seed", "-1"], "not in the range"),
        ([*REQUIRED, "--seed", str(2**64)], "not in the range"),
        ([*REQUIRED, "--dtype", "int8"], "not one of"),
        ([*REQUIRED, "--device", "tpu"], "not one of"),
        ([*REQUIRED, "--on-invalid", "ignore"], "not one of"),
        ([*REQUIRED, "--kv-cache-memory", "4 apples"], "not a size"),
        ([*REQUIRED, "--kv-cache-memory", "0"], "not above 0"),
        ([*REQUIRED, "stray"], "unexpected extra argument"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", *arguments])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert not said.out
    assert said.err.startswith("Error: ")
    assert said.err.count("\n") == 1
    assert says in said.err


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(cli.run, "callback", broken)
    monkeypatch.delenv("LORAMILL_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", *REQUIRED])
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("Error: ZeroDivisionError: by zero (LORAMILL_DEBUG=1 ")
    assert said.count("\n") == 1
    monkeypatch.setenv("LORAMILL_DEBUG", "1")
    with pytest.raises(SystemExit):
        cli.main(["run", *REQUIRED])
    assert "Traceback" in capsys.readouterr().err


def test_the_version(capsys) -> None:
    import loramill

    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"loramill {loramill.__version__}\n"
