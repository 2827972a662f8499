"""A worker's settings: the same by flags and by variables, and read without the engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loramill.producer.cli import cli
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.settings import given_variables
from loramill.worker.worker_settings import WorkerOptions, worker_options_from

FLAGS = [
    *("--store", "redis://h/1", "--base-model", "org/base", "--base-name", "b", "--device", "all", "--lease", "1.5m"),
    *("--adapter", "a=/x", "--adapter", "c=/y*0.5", "--adapters", '{"d": "/z"}', "--adapters-dir", "dir"),
    *("--pin", "a", "--pin", "c,d", "--preload", "--until-empty", "--kv-cache-memory", "4GiB", "--dtype", "float32"),
    *("--files", "file:///p", "--store-prefix", "p", "--broker", "redis://b", "--concurrency", "2", "--id", "w"),
    *("--hang-timeout", "90s", "--watchdog", "2m", "--chat-template", "t.jinja", "--allow-noop-adapters"),
]


def test_flags_are_handed_on_as_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_SEED", "7")
    context = cli.commands["worker"].make_context("worker", list(FLAGS))
    options = WorkerOptions(**context.params)
    given = given_variables(context)
    assert "LORAMILL_SEED" not in given  # whoever gets them inherits what was a variable already
    assert options.seed == 7
    assert worker_options_from({**given, "LORAMILL_SEED": "7"}) == options
    assert (options.lease_s, options.hang_timeout_s, options.watchdog_s) == (90, 90, 120)
    assert options.pinned == ("a", "c", "d")


def test_a_worker_has_a_name() -> None:
    options = worker_options_from({"LORAMILL_STORE": "sqlite:///x", "LORAMILL_BASE_MODEL": "b"})
    assert options.worker_id is None
    assert options.name
    assert worker_options_from({"LORAMILL_STORE": "s", "LORAMILL_BASE_MODEL": "b", "LORAMILL_ID": "me"}).name == "me"


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [("LEASE", "0", "not above 0"), ("LEASE", "-1", "not a time"), ("CONCURRENCY", "0", "not in the range")],
)
def test_what_is_no_setting(variable: str, value: str, says: str) -> None:
    environ = {"LORAMILL_STORE": "s", "LORAMILL_BASE_MODEL": "b", f"LORAMILL_{variable}": value}
    with pytest.raises(Failure, match=says) as refused:
        worker_options_from(environ)
    assert refused.value.code is ExitCode.USAGE


@pytest.mark.parametrize("module", ["app", "serve"])
def test_the_worker_process_has_no_model(module: str) -> None:
    code = (
        f"import sys, loramill.worker.{module}, loramill.store.redis_store, loramill.store.sqlite_store; "
        "print({'torch', 'transformers', 'safetensors'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
