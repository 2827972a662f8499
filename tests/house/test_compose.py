"""docker-compose.yml and Dockerfile, as far as they can be held without an engine: every command line and variable in
them is one that this loramill knows."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from loramill.producer.cli import cli
from loramill.producer.serve_options import options_of
from tests.servers import RedisServer

REPO = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((REPO / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = [name for name in SERVICES if name != "redis"]


def arguments_of(service: dict[str, Any]) -> list[str]:
    """What `loramill` is given: the image's entry point is `loramill`."""
    entry = service.get("entrypoint", ["loramill"])
    assert entry[0] == "loramill"
    return [*entry[1:], *service.get("command", [])]


def variables(command: str) -> set[str]:
    return {str(option.envvar) for option in cli.commands[command].params if isinstance(option, click.Option)}


def test_the_tool_reads_it() -> None:
    tools = [["docker-compose"], ["docker", "compose"]]
    tool = next((one for one in tools if shutil.which(one[0]) and works(one)), None)
    if tool is None:
        pytest.skip("neither docker-compose nor docker's compose plugin is here")
    for profile in ("gpu", "commands"):
        said = subprocess.run(
            [*tool, "--profile", profile, "config", "-q"], cwd=REPO, capture_output=True, text=True, timeout=60
        )
        assert said.returncode == 0, said.stderr


def works(tool: list[str]) -> bool:
    return subprocess.run([*tool, "version"], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", OURS)
def test_commands_are_ours(name: str) -> None:
    arguments = arguments_of(SERVICES[name])
    if not arguments:
        return  # for whoever runs it to give
    command = cli.commands[arguments[0]]
    given = {option for option in arguments[1:] if option.startswith("--")}
    assert given <= {flag for option in command.params for flag in option.opts}


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting(name: str) -> None:
    command = "serve" if name == "api" else "worker"
    assert set(SERVICES[name]["environment"]) <= variables(command)


def test_the_worker_starts_with_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line and the variables together are complete."""
    for name in ("worker", "worker-gpu"):
        for variable, value in SERVICES[name]["environment"].items():
            monkeypatch.setenv(variable, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
        command, *rest = arguments_of(SERVICES[name])
        with cli.commands[command].make_context(command, rest) as context:
            assert context.params["store"] == "redis://redis:6379/0"


def test_the_api_starts_with_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address in there is everybody's, so it must have keys; only its port is open, and it says how it is."""
    api = SERVICES["api"]
    for variable, value in api["environment"].items():
        monkeypatch.setenv(variable, value)
    command, *rest = arguments_of(api)
    with cli.commands[command].make_context(command, rest) as context:
        options = options_of(context, dict(context.params))
    assert (options.host, options.port, options.keys) == ("0.0.0.0", 8000, Path("/keys/keys.toml"))
    assert api["ports"] == ["127.0.0.1:${LORAMILL_API_PORT:-8000}:8000"]
    assert api["volumes"] == ["keys:/keys"] and "keys" in COMPOSE["volumes"]
    compile(api["healthcheck"]["test"][-1], "healthcheck", "exec")
    assert re.search(r"install -d -o loramill -m 700 /keys", (REPO / "Dockerfile").read_text())


def test_the_example_is_where_the_models_are_mounted() -> None:
    mounted = {volume.rpartition(":")[0] for volume in SERVICES["worker"]["volumes"]}
    assert mounted == {"${LORAMILL_MODELS:-./examples/tiny}:/models"}
    assert (REPO / "examples" / "tiny" / "base").is_dir() and (REPO / "examples" / "tiny" / "adapters").is_dir()


def test_redis_starts_with_these_flags_and_can_hold_a_store(tmp_path: Path) -> None:
    from loramill.store.opening import open_store

    program, *flags = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", part) for part in SERVICES["redis"]["command"]]
    assert program == "redis-server"
    settings = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    with RedisServer(tmp_path / "redis", **settings) as server, open_store(server.url) as store:
        assert store.info().durable
        assert store.info().warnings == ()


def test_nothing_is_open_to_the_network() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_image_pins_what_the_tests_run_under() -> None:
    text = (REPO / "Dockerfile").read_text()
    assert "--constraint constraints.txt" in text
    assert re.search(r"^torch==[\d.]+$", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)
