"""The engine's settings from environment variables alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import pytest

from loramill.producer import cli
from loramill.producer.options import RunOptions
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.settings import MODEL_FLAGS, ModelOptions, settings_from
from loramill.worker.specs import AdapterSpec

BASE = {"LORAMILL_BASE_MODEL": "org/base"}
SET = BASE | {
    "LORAMILL_ADAPTER": "a=/x y/1,b=/2",
    "LORAMILL_ADAPTERS": '{"c": {"path": "org/c", "scale": 0.5}}',
    "LORAMILL_ADAPTERS_DIR": "dir",
    "LORAMILL_PIN": "a,b",
    "LORAMILL_PRELOAD": "yes",
    "LORAMILL_KV_CACHE_MEMORY": "4GiB",
    "LORAMILL_LORA_HOST_BYTES": "auto",
    "LORAMILL_LORA_MODE": "static",
    "LORAMILL_MAX_NUM_SEQS": "5",
    "LORAMILL_CHAT_TEMPLATE": "",
}


def model_options_from(environ: Mapping[str, str]) -> ModelOptions:
    return settings_from(environ, MODEL_FLAGS, ModelOptions)


def test_the_base_alone_leaves_every_default() -> None:
    assert model_options_from(BASE) == ModelOptions(base_model="org/base")


def test_variables_are_read_as_the_command_line_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    options = model_options_from(SET | {"LORAMILL_INPUT": "other command's", "PATH": "/bin"})
    assert options == ModelOptions(
        base_model="org/base",
        adapters={"a": AdapterSpec("/x y/1"), "b": AdapterSpec("/2")},
        adapters_json={"c": AdapterSpec("org/c", scale=0.5)},
        adapters_dir=Path("dir"),
        pinned=("a", "b"),
        preload=True,
        kv_cache_memory=4 * 2**30,
        lora_mode="static",
        max_num_seqs=5,
    )
    for name, value in SET.items():
        monkeypatch.setenv(name, value)
    context = cli.run.make_context("run", ["-i", "in.jsonl", "-o", "out.jsonl"])
    ran = RunOptions(**context.params)
    assert all(getattr(ran, name) == getattr(options, name) for name in ModelOptions.__dataclass_fields__)


def test_only_the_given_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_BASE_MODEL", "of/the process")
    monkeypatch.setenv("LORAMILL_SEED", "7")
    assert model_options_from(BASE) == ModelOptions(base_model="org/base")
    with pytest.raises(Failure):
        model_options_from({})


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("LORAMILL_BASE_MODEL", "", "Missing option '--base-model'"),
        ("LORAMILL_MAX_NUM_SEQS", "0", "not in the range"),
        ("LORAMILL_DTYPE", "int8", "not one of"),
        ("LORAMILL_PRELOAD", "perhaps", "not a valid boolean"),
        ("LORAMILL_KV_CACHE_MEMORY", "4 apples", "not a size"),
        ("LORAMILL_ADAPTER", "a=x,a=y", "given twice"),
        ("LORAMILL_ADAPTERS", "[]", "not an object"),
    ],
)
def test_errors_are_the_command_lines_and_name_the_variable(
    variable: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = BASE | {variable: value}
    with pytest.raises(Failure) as refused:
        model_options_from(given)
    assert refused.value.code is ExitCode.USAGE
    (line,) = refused.value.lines
    assert says in line
    assert f"(env var: '{variable}')" in line
    for name, one in given.items():
        monkeypatch.setenv(name, one)
    with pytest.raises(click.UsageError) as usage:
        cli.run.make_context("run", ["-i", "in.jsonl", "-o", "out.jsonl"])
    assert usage.value.format_message() == line


def test_settings_are_read_without_the_engine() -> None:
    code = (
        "import sys; from loramill.worker.worker_settings import worker_options_from as read; "
        "read({'LORAMILL_BASE_MODEL': 'b', 'LORAMILL_STORE': 'sqlite:///x'}); "
        "print({'torch', 'transformers', 'pydantic'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
