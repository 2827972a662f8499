"""The documentation says what the code does: flags, defaults, exit codes, fields, error codes, rules and examples."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import click
import pytest

from loramill.producer.api.app import make_app
from loramill.producer.api.context import Api
from loramill.producer.api.errors import CODES
from loramill.producer.cli import cli
from loramill.schemas.errors import ErrorCode
from loramill.schemas.failures import ExitCode
from loramill.schemas.fields import INERT, UNSUPPORTED
from loramill.schemas.sampling import ChatBody, CompletionBody

REPO = Path(__file__).parents[2]
README = (REPO / "README.md").read_text()
API = (REPO / "docs" / "api.md").read_text()
FORMATS = (REPO / "docs" / "formats.md").read_text()
PAGES = [path.relative_to(REPO).as_posix() for path in (*REPO.glob("*.md"), *REPO.glob("docs/*.md"))]


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next heading of any level."""
    _, _, after = page.partition(f"\n{heading}\n")
    assert after, f"no heading {heading!r}"
    return re.split(r"\n#+ ", after)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, its head left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def options() -> dict[str, click.Option]:
    """`loramill run`'s options by their long flag."""
    found = [option for option in cli.commands["run"].params if isinstance(option, click.Option)]
    return {option.opts[0] if option.opts[0].startswith("--") else option.opts[-1]: option for option in found}


def flag_rows() -> dict[str, str]:
    """The README's flags, each with what it says of the default."""
    found = {}
    for flags, default, *_ in rows(section(README, "## `loramill run`")):
        (flag,) = re.findall(r"--[a-z-]+", flags)
        found[flag] = default
    return found


def test_every_flag_is_documented_and_no_other() -> None:
    assert set(flag_rows()) == set(options())


@pytest.mark.parametrize("flag", options())
def test_defaults_are_as_documented(flag: str) -> None:
    option, said = options()[flag], flag_rows()[flag]
    if option.required:
        assert said == "required"
    elif option.is_flag:
        assert said == "off"
    elif isinstance(option.default, str | int):
        assert said == f"`{option.default}`"


@pytest.mark.parametrize("flag", options())
def test_every_flag_has_its_environment_variable(flag: str) -> None:
    assert options()[flag].envvar == "LORAMILL_" + flag[2:].replace("-", "_").upper()


@pytest.mark.parametrize("page", PAGES)
def test_shown_commands_use_flags_that_exist(page: str) -> None:
    for block in re.findall(r"```sh\n(.*?)```", (REPO / page).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.removeprefix(".venv/bin/").startswith("loramill run"):
                used = {word.partition("=")[0] for word in shlex.split(line, comments=True) if word.startswith("--")}
                assert used <= set(options())


def test_exit_codes_are_as_documented() -> None:
    listed = [int(code.strip("`")) for code, _ in rows(section(README, "### Exit codes"))]
    assert listed == [code.value for code in ExitCode]


def test_honoured_fields_are_as_documented() -> None:
    listed = [field.strip("`") for field, *_ in rows(section(FORMATS, "### Fields of a body"))]
    assert len(listed) == len(set(listed))
    assert set(listed) == {*ChatBody.model_fields, *CompletionBody.model_fields}


@pytest.mark.parametrize(
    ("heading", "fields"), [("### Inert fields", INERT), ("### Refused fields", {*UNSUPPORTED, "best_of"})]
)
def test_other_fields_are_as_documented(heading: str, fields: set[str]) -> None:
    paragraph = section(FORMATS, heading).strip().split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == set(fields)


def test_error_codes_are_as_documented() -> None:
    listed = {code.strip("`") for code, _ in rows(section(FORMATS, "## Error file"))}
    # What only a whole batch can have, and what only the engine can say.
    assert listed == {*map(str, ErrorCode)} - {"empty_file", "too_many_tasks"} | {"engine_error"}


def test_the_api_s_routes_are_as_documented() -> None:
    routes = make_app(cast(Api, None)).openapi()["paths"]
    listed = {path for cell, *_ in rows(section(API, "## Routes")) for path in re.findall(r"(/[\w/{}]*)[`,]", cell)}
    assert listed == {*routes, "/"}


def test_the_api_s_codes_are_as_documented() -> None:
    listed = [code for _, codes in rows(section(API, "## Errors")) for code in re.findall(r"`(\w+)`", codes)]
    assert len(listed) == len(set(listed))
    text = "".join(path.read_text() for path in (REPO / "producer" / "api").glob("*.py"))
    said = {*re.findall(r"""code(?:: str )?=\s?"(\w+)\"""", text), *CODES.values()}
    said |= {f"{what.replace(' ', '_')}_not_found" for what in re.findall(r'not_found\("([\w ]+)"', text)}
    assert {*listed} == said


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = REPO / page
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_tree_in_the_readme_is_the_tree() -> None:
    named = re.findall(r"^([\w/]+)/ ", section(README, "## Files"), re.MULTILINE)
    assert [name for name in named if not (REPO / name).is_dir()] == []
    hidden = {"out", "build", "dist"}
    folders = {
        p.name for p in REPO.iterdir() if p.is_dir() and not p.name.startswith((".", "__")) and p.name not in hidden
    }
    assert folders - {"src"} <= set(named)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_print_what_they_say(code: str, desk: Path) -> None:
    """Each example runs as it stands; the comment behind `print(...)` is its output, line by line."""
    said = re.findall(r"print\(.*\)  # (.*)", code)
    with background_for(code, desk) as url:
        code = code.replace("http://127.0.0.1:8000", url)
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=desk, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [line for comment in said for line in comment.split(", ")]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with the examples, and nothing of the repository else."""
    (tmp_path / "examples").symlink_to(REPO / "examples")
    return tmp_path


def shown_command(begin: str) -> list[str]:
    """The arguments of the first `.venv/bin/loramill` command of the README that begins so."""
    command = re.search(rf"^\.venv/bin/loramill ({begin} (?:.*\\\n)*.*[^\\])$", README, re.MULTILINE)
    assert command
    return shlex.split(command[1].removesuffix("&").replace("\\\n", " "))


@contextmanager
def background_for(code: str, folder: Path) -> Iterator[str]:
    """What an example needs of the README's commands: a worker without `--until-empty`, or a server, at that URL."""
    arguments: list[str] = []
    if "Producer" in code:
        arguments = [word for word in shown_command("worker") if word != "--until-empty"]
    elif "8000" in code:
        arguments = [*shown_command("serve"), "--port", "0"]
    if not arguments:
        yield ""
        return
    command = [sys.executable, "-c", "from loramill.producer.cli import main; main()", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")}
    if "Producer" in code:
        environment["LORAMILL_STORE"] = "sqlite:///queue.db"
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = ""
        for line in process.stderr:
            url = line.rpartition("listening on ")[2].strip() if "listening on" in line else url
            if "ready" in line:
                break
        else:
            pytest.fail(f"it ended with {process.wait()}")
        # What it goes on to say must be read, or it waits for somebody who does.
        reader = threading.Thread(target=process.stderr.read, daemon=True)
        reader.start()
        yield url
        process.terminate()
        process.wait(60)
        reader.join()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_queue_s_commands_in_the_readme_run(desk: Path) -> None:
    environment = {**os.environ, "LORAMILL_STORE": "sqlite:///queue.db"}
    for begin in ("submit", "worker"):
        # Here one after the other, not side by side.
        arguments = [word for word in shown_command(begin) if word != "--wait"]
        done = subprocess.run(
            [Path(sys.executable).with_name("loramill"), *arguments], cwd=desk, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if begin == "submit":
            job = done.stdout.strip()
    done = subprocess.run(
        [Path(sys.executable).with_name("loramill"), "results", job], cwd=desk, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len((REPO / "examples" / "tiny" / "jobs.jsonl").read_text().splitlines())


def test_the_first_command_in_the_readme_runs(tmp_path: Path) -> None:
    arguments = [word.replace("answers.jsonl", str(tmp_path / "answers.jsonl")) for word in shown_command("run")]
    done = subprocess.run([Path(sys.executable).with_name("loramill"), *arguments], cwd=REPO, capture_output=True)
    assert done.returncode == 0, done.stderr
    jobs = (REPO / "examples" / "tiny" / "jobs.jsonl").read_text().splitlines()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(jobs)
